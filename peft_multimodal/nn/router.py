"""Which modality every token of a layer's input has, in models whose layers read several.

    m(t) in {-1 none, 0 text, 1 image, 2 video, 3 audio}        B x L, for each call

How it is known differs from stack to stack of layers, and is told by the model:

- a tower reads one modality;
- in a decoder with placeholders, `mm_token_type_ids` say it where a call brings them, else `input_ids` beside the media
  tokens of the config. A placeholder is an image only where the call brings images: one that the model itself has
  written is text, like everything else that is generated;
- single-stream models put text and image side by side in an order of their own. It is measured once: the model runs on a
  tiny input, again with other tokens and again with another image, and the positions of the stack's input that move are
  text and image. In a call the text's length is known, and the rest is the image's.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.anatomy import Anatomy, describe, is_below, is_cross, stack_of
from ..core.parts import CallScope
from ..core.private import InsideCheckpoint
from ..core.stand_in import StandIn
from .single_streams import AUDIO, IMAGE, TEXT, VIDEO, Stream, measured

_OF_TOKEN = {"image": IMAGE, "media": IMAGE, "video": VIDEO, "audio": AUDIO}
_MEDIA = re.compile(r"pixel|image|video|audio|vis(ual|ion)|features|mm_encoder_outputs")


@dataclass
class Told:
    """What one call of the model says.

    Args:
        lengths: {argument: tokens in each row} of the texts.
        placeholders: (B, L), where tokens or their types were given; None where they weren't.
    """

    lengths: dict[str, int]
    placeholders: Tensor | None = None
    orders: dict[Any, Tensor] = field(default_factory=dict)  # of the stacks that have asked


class ModalityRouter:
    """Tells the modality of tokens in a model's layers.

    Hooks on the model see each call, and what they see dies with it; gradient checkpointing opens it again where it
    recomputes a layer. A call of an inner module alone is seen within `generate`, which BLIP-2 and encoder-decoders make:
    its tokens are the prompt's, and behind them text. Elsewhere it is not.

        >>> router = ModalityRouter(model)
        >>> router.modalities("vilt.encoder.layer.3")         # (0, 1)
        >>> router.modality("vilt.encoder.layer.3", states)   # in a hook of that layer: (B, L)

    Args:
        model: A Hugging Face model. The first question for the modalities of a single stream runs it on tiny inputs, for
            which it needs its weights: ask while it is wrapped. Other models are never run.
        anatomy: Of the model.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy | None = None) -> None:
        self._model = (model,)
        self.scope = CallScope()
        anatomy = anatomy or describe(model)
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._media_tokens = {i: _OF_TOKEN[name.partition("_")[0]] for name, i in anatomy.media_tokens.items()}
        self.streams: dict[str, Stream | None] = dict(self._streams(anatomy))
        self.hooks: list[Any] = []
        if any(stream is None or len(stream.modalities) > 1 for stream in self.streams.values()):
            self.hooks += [
                model.register_forward_pre_hook(self._open, with_kwargs=True),
                model.register_forward_hook(self.scope.close, always_call=True),
            ]
            self.inside = InsideCheckpoint(model, self.scope)
            self.prompt = CallScope()  # of a call of `generate`
            self.generate: Any = StandIn(model, "generate", self._generate) if hasattr(model, "generate") else None

    def remove(self) -> None:
        """Take everything out of the model."""
        if self.hooks:
            self.inside.remove()
            if self.generate is not None:
                self.generate.give_back()
        for handle in self.hooks:
            handle.remove()
        self.hooks = []

    # --- what is asked ---

    def modalities(self, path: str) -> tuple[int, ...]:
        """Those that the tokens of a layer, or of a module inside it, can have; one alone is the modality of all.

        Raises:
            ValueError: it has to be measured and can't be; the message says why.
        """
        stack = stack_of(path)
        if stack not in self.streams:
            raise ValueError(f"{path} lies in no stack of layers; there are {sorted(self.streams)}.")
        if self.streams[stack] is None:
            self.streams |= measured(self._model[0], [s for s, told in self.streams.items() if told is None])
        if (stream := self.streams[stack]) is None:
            raise ValueError(
                f"{stack} reads text and images in a way that tiny inputs don't show: either its first layer isn't reached, "
                "or its tokens already hold both. Leave these layers out."
            )
        return stream.modalities

    def modality(self, path: str, states: Tensor) -> Tensor | None:
        """(B, L) int64 for a layer's states (B, L, d); None where all tokens have one modality.

        Raises:
            ValueError: nothing says the modality in this call; the message says what to pass.
        """
        stream = self.streams[stack_of(path)]
        if stream is None:
            raise ValueError(f"{path} wasn't measured: ask for modalities({path!r}) before the first call.")
        if len(stream.modalities) == 1:
            return None
        model = type(self._model[0]).__name__
        scope = self.scope if self.scope.is_open else self.prompt
        if not scope.is_open:
            raise ValueError(
                f"{path} was called without {model}, whose inputs say which of its tokens are images. Call the model itself."
            )
        call: Told = scope.seen
        rows, length = states.shape[:2]
        if stream.order:
            key = (stack_of(path), length, states.device)
            kinds = call.orders.get(key)
            if kinds is None:
                kinds = self._lay_out(stream, call, length, states.device)
                if not torch.compiler.is_compiling():
                    call.orders[key] = kinds
            return kinds.expand(rows, length)
        if call.placeholders is None:
            raise ValueError(
                f"{model} was given inputs_embeds alone, which don't say which of its tokens are images. Pass input_ids, or "
                "mm_token_type_ids beside inputs_embeds: the processor makes them with return_mm_token_type_ids=True."
            )
        if scope is self.prompt and rows % len(call.placeholders) == 0:
            return grown(call.placeholders, rows, length).to(states.device)
        if call.placeholders.shape != states.shape[:2]:
            raise ValueError(
                f"{path} reads states of shape {tuple(states.shape)} where the call's tokens have shape "
                f"{tuple(call.placeholders.shape)}: which of them are images isn't known."
            )
        return call.placeholders.to(states.device)

    def _lay_out(self, stream: Stream, call: Told, length: int, device: torch.device) -> Tensor:
        """(1, L) of a single stream's order."""
        known = {name: call.lengths.get(name) for _, name in stream.order if isinstance(name, str)}
        if missing := [name for name, tokens in known.items() if tokens is None]:
            raise ValueError(f"The call has no {missing[0]}, which says how many of the tokens are text. Pass it.")
        lengths: list[Any] = [known[n] if isinstance(n, str) else n for _, n in stream.order]
        rest = length - sum(n for n in lengths if n is not None)
        kinds = [
            torch.full((1, rest if n is None else n), kind, device=device)
            for (kind, _), n in zip(stream.order, lengths, strict=True)
        ]
        return torch.cat(kinds, dim=1)

    # --- a call ---

    def _open(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        told = self._told(dict(zip(self._names, args, strict=False)) | kwargs)
        self.scope.open()
        self.scope.seen = told

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the model's `generate`."""
        inputs = dict(zip(self.generate.parameters(), args, strict=False)) | kwargs
        ids = inputs.get("inputs")
        if isinstance(ids, Tensor) and not ids.is_floating_point():
            inputs.setdefault("input_ids", ids)
        self.prompt.open()
        self.prompt.seen = self._told(inputs)
        try:
            return self.generate.original(*args, **kwargs)
        finally:
            self.prompt.close()

    def _told(self, inputs: dict[str, Any]) -> Told:
        told = Told({n: v.shape[1] for n, v in inputs.items() if n.endswith("input_ids") and isinstance(v, Tensor)})
        embeddings = inputs.get("inputs_embeds")
        if isinstance(embeddings, Tensor):
            told.lengths.setdefault("input_ids", embeddings.shape[1])
        told.placeholders = self._placeholders(inputs)
        return told

    def _placeholders(self, inputs: dict[str, Any]) -> Tensor | None:
        """(B, L), as the types of the tokens or the tokens themselves say it; None where neither is known."""
        types, ids = inputs.get("mm_token_type_ids"), inputs.get("input_ids")
        if types is not None:
            return types.long()
        if ids is None:
            return None
        kinds = torch.zeros_like(ids, dtype=torch.long)
        if any(_brings_media(name, value) for name, value in inputs.items()):
            for token, kind in self._media_tokens.items():
                kinds = kinds.masked_fill(ids == token, kind)
        return kinds

    # --- how it is known ---

    def _streams(self, anatomy: Anatomy) -> Iterator[tuple[str, Stream | None]]:
        """(stack, its stream), None where that has to be measured."""
        towers: dict[str, set[str]] = {}
        crossing = {stack_of(m.module) for m in anatomy.matrices if is_cross(m.module)}
        crossing = crossing or self._behind_an_encoder(anatomy)
        for matrix in anatomy.matrices:
            towers.setdefault(stack_of(matrix.module), set()).add(matrix.tower)
        sees = any(t.name == "vision" for t in anatomy.towers)
        takes = any(_MEDIA.search(name) for name in self._names)
        attending = {stack_of(m.module) for m in anatomy.matrices if m.letter in ("q", "qkv")}
        for stack, names in towers.items():
            if "vision" in names:
                yield stack, Stream((IMAGE,))
            elif not names & {"text", "decoder"}:
                if stack in attending:
                    yield stack, None
            elif stack in crossing:  # images come through the cross-attention
                yield stack, Stream((TEXT,))
            elif self._media_tokens:
                yield stack, Stream((TEXT, *sorted(set(self._media_tokens.values()))))
            else:
                yield stack, Stream((TEXT,)) if sees or not takes else None

    def _behind_an_encoder(self, anatomy: Anatomy) -> set[str]:
        """The stacks of an encoder-decoder's decoder. T5Gemma2's has one attention for both sequences."""
        model: Any = self._model[0]
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(
            model, "get_decoder"
        ):
            return set()
        inner = model.get_decoder()
        decoders = [path for path, module in model.named_modules() if module is inner and path]
        return {stack_of(m.module) for m in anatomy.matrices if any(is_below(m.module, path) for path in decoders)}


def grown(prompt: Tensor, rows: int, length: int) -> Tensor:
    """A prompt's modalities (B, P) for the rows of its beams and what was written since, all or, with a cache, alone."""
    beams = prompt.repeat_interleave(rows // len(prompt), dim=0)
    written = length - prompt.shape[1]
    return F.pad(beams, (0, written), value=TEXT) if written >= 0 else torch.full_like(beams[:, :length], TEXT)


def _brings_media(name: str, value: Any) -> bool:
    """Whether an argument holds images, videos or sound, rather than masks or sizes of them, or nothing."""
    if not _MEDIA.search(name):
        return False
    if isinstance(value, (list, tuple)):
        return any(_brings_media(name, one) for one in value)
    return value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, Mapping) and bool(value)
