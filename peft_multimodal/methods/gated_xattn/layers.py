"""What GatedXAttn puts into a model: the gated block before a layer, the marker's row, the reader of a call's pictures.

The equations stand in `__init__.py`.
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    LogitsProcessor,
    LogitsProcessorList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from ...core.anatomy import device_of
from ...core.parts import AttachedPart, CallScope, HostedLayer, MultimodalLayer
from ...core.stand_in import StandIn
from ...encoders.frozen import Place, share
from ...encoders.vision import frame_features
from ...nn.media import MediaCache, Reading, Sight, text_time
from ...nn.perceiver import (
    CrossAttention,
    KeysValues,
    Resampler,
    feed_forward,
)

# --- the block -------------------------------------------------------------------------------------------------------


class GatedBlock(nn.Module):
    """The module docstring's y -> y2.

    Args:
        width: d of the decoder.
        vision_width: D of the images' tokens.
        heads, head_dim: Of the cross-attention.
        ff_mult: Width of the FFW in multiples of d; 0 leaves it out.
        gate: "scalar", "vector" or "none".
        gate_init: a_x and a_f at the start.
    """

    def __init__(
        self,
        width: int,
        vision_width: int,
        heads: int,
        head_dim: int,
        ff_mult: int,
        gate: str,
        gate_init: float,
    ) -> None:
        super().__init__()

        def new_gate() -> nn.Parameter | None:
            numbers = {"none": 0, "scalar": 1, "vector": width}[gate]
            return nn.Parameter(torch.full((numbers,), float(gate_init))) if numbers else None

        self.attention_norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, vision_width, heads, head_dim)
        self.attention_gate_norm = new_gate()  # names in `_norm` get no weight decay from Trainer
        self.ffw: nn.Sequential | None = None
        if ff_mult:
            self.ffw_norm = nn.LayerNorm(width)
            self.ffw = feed_forward(width, ff_mult)
            self.ffw_gate_norm = new_gate()
        if gate_init and gate != "none":  # the gates are open: what they let through is nothing yet
            lasts: list[Any] = [self.attention.out, *([self.ffw[-1]] if self.ffw else [])]
            for last in lasts:
                nn.init.zeros_(last.weight)

    def seeing_parameters(self) -> list[nn.Parameter]:
        """Those that a text without pictures doesn't use."""
        found = [*self.attention_norm.parameters(), *self.attention.parameters()]
        return found if self.attention_gate_norm is None else [*found, self.attention_gate_norm]

    def forward(self, y: Tensor, sight: Sight | None = None, keys_values: KeysValues | None = None) -> Tensor:
        """(B, L, d) -> (B, L, d).

        Args:
            sight, keys_values: How the tokens read their pictures, and what it picked of these; None: there are none.
        """
        stream = y.to(self.attention_norm.weight.dtype)
        if sight is not None and keys_values is not None:
            q = self.attention.queries(self.attention_norm(stream))
            pictures = sight.rows  # of generation's beams, several rows look at the same pictures
            attended = sight.attend(q.reshape(pictures, -1, *q.shape[2:]), *keys_values).reshape(q.shape)
            stream = stream + _opened(self.attention_gate_norm) * self.attention.output(attended)
        if self.ffw is not None:
            stream = stream + _opened(self.ffw_gate_norm) * self.ffw(self.ffw_norm(stream))
        return stream.to(y.dtype)


class TakePart(torch.autograd.Function):
    """The stream as it is, with gradients of zero for parameters that had nothing to do.

    Under distributed training every process has to have a gradient of every parameter, also one whose texts have no
    pictures.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], *map(torch.zeros_like, ctx.saved_tensors)


def _opened(gate: Tensor | None) -> Tensor | float:
    return 1.0 if gate is None else gate.tanh()


# --- the layers ------------------------------------------------------------------------------------------------------


class GatedXAttnLayer(MultimodalLayer):
    """Base of everything that this method puts into a model."""


class NoMarkers(LogitsProcessor):
    """Gives the marker no probability: text that is written brings no pictures."""

    def __init__(self, marker: int) -> None:
        self.marker = marker

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.marker : self.marker + 1] = -torch.inf  # nothing, where it lies beyond the vocabulary
        return scores


class BeyondVocabulary(LogitsProcessor):
    """Lets a logits processor look up the marker's id where the vocabulary doesn't have it: it has no probability."""

    def __init__(self, processor: LogitsProcessor, marker: int) -> None:
        self.processor, self.marker = processor, marker

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        known = scores.shape[-1]
        wide = nn.functional.pad(scores, (0, max(0, self.marker + 1 - known)), value=-torch.inf)
        return self.processor(input_ids, wide)[..., :known]


class WithoutPictures(LogitsProcessor):
    """Guidance, whose second pass of the model reads a text of its own, which has no pictures."""

    def __init__(self, processor: LogitsProcessor, reader: MediaReader) -> None:
        self.processor, self.reader = processor, reader

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        with self.reader.without_pictures():
            return self.processor(input_ids, scores)


class Seeing(NamedTuple):
    """How an adapter reads images."""

    marker: int  # id of the token that stands for one
    attend: str  # "last" or "all_previous"
    vision_width: int  # D


class MediaReader(nn.Module, AttachedPart, GatedXAttnLayer):
    """Hangs below the model: takes the pictures out of each call's inputs and holds what the layers share.

    A call's state is a `Reading` in a scope of the thread, which ends with the call.
    """

    role = ""
    adapter_layer_names = ("gated_xattn_resampler", "gated_xattn_shared")
    gated_xattn_resampler: Any  # {adapter: Resampler}
    gated_xattn_shared: Any  # {adapter: GatedBlock}, of adapters with share_blocks

    def __init__(self, model: nn.Module, stack: nn.Module) -> None:
        nn.Module.__init__(self)
        AttachedPart.__init__(self)
        self.gated_xattn_resampler = nn.ModuleDict()
        self.gated_xattn_shared = nn.ModuleDict()
        self.encoders = nn.ModuleDict()
        self.encoder_of: dict[str, str] = {}
        self.sights: dict[str, Seeing] = {}
        self.identity: dict[str, str] = {}  # by which a MediaCache knows its adapter, whatever the adapter is called
        self.scope = CallScope()
        self._model, self._stack = (model,), (stack,)  # tuples are not registered
        names = list(inspect.signature(model.forward).parameters)
        self._ids_argument = names.index("input_ids") if "input_ids" in names else None
        self.own_inputs = frozenset(names)  # a vision-language model's pixel_values are its own
        media = ("pixel_values", "vision_features", "frame_mask", "media")
        self._inputs = [n for n in media if n not in self.own_inputs]
        self.hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
            stack.register_forward_pre_hook(self._before_stack, with_kwargs=True),
        ]
        # Trainer passes on the columns that the signature of `forward` names; the pictures are taken out by the hooks.
        self.stand_ins = {"forward": StandIn(model, "forward", takes=self._inputs)}
        for name in ("generate", "_get_logits_processor", "_get_candidate_generator"):
            if hasattr(model, name):
                self.stand_ins[name] = StandIn(model, name, getattr(self, name))

    def host(self) -> nn.Module:
        return self._stack[0]

    def remove_hooks(self) -> None:
        super().remove_hooks()
        for stand_in in self.stand_ins.values():
            stand_in.give_back()

    def add(
        self,
        adapter_name: str,
        seeing: Seeing,
        resampler: Resampler,
        shared: GatedBlock | None = None,
        encoder: nn.Module | None = None,
        place: Place | None = None,
    ) -> None:
        """Let an adapter read images.

        Args:
            shared: The one block of all layers, where they share one.
            encoder, place: Of its images, and where it was read.
        """
        if encoder is not None:
            self.encoder_of[adapter_name] = share(self.encoders, encoder, place)
        self.sights[adapter_name] = seeing
        self.identity[adapter_name] = uuid.uuid4().hex
        self.gated_xattn_resampler[adapter_name] = resampler
        if shared is not None:
            self.gated_xattn_shared[adapter_name] = shared
        self.settle(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.encoder_of.pop(adapter_name, None)
        self.sights.pop(adapter_name, None)
        self.identity.pop(adapter_name, None)
        for key in set(self.encoders) - set(self.encoder_of.values()):
            del self.encoders[key]

    def train(self, mode: bool = True) -> MediaReader:
        super().train(mode)
        self.encoders.eval()  # frozen: no dropout, ever
        return self

    # --- around the model's forward and generate ---

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(kwargs)
        given = self._take(kwargs)
        if "past_key_values" in kwargs and "past_key_values" not in self.own_inputs and "cache" in self.own_inputs:
            kwargs.setdefault("cache", kwargs.pop("past_key_values"))  # as transformers calls it from 5.24 on
        adapter = self._acting(given)
        if adapter is None or (self.scope.is_open and self.scope.seen.generating):
            return args, kwargs
        ids = kwargs.get("input_ids")
        if ids is None and self._ids_argument is not None and len(args) > self._ids_argument:
            ids = args[self._ids_argument]
        past = _past_length([*args, *kwargs.values()])
        if past and ids is not None and "media" not in given:
            raise ValueError(
                "A call with past_key_values goes on with a text whose pictures it doesn't know. Pass the same "
                "media=MediaCache() to this and to the calls before."
            )
        marker = self.sights[adapter].marker
        for name in ("labels", "shift_labels"):
            if kwargs.get(name) is not None:  # a marker is never a target, and may lie beyond the vocabulary
                kwargs[name] = kwargs[name].masked_fill(kwargs[name] == marker, -100)
        if self.scope.is_open:
            self.scope.seen.undo()  # an interrupt in an earlier call has passed over its end
        reading = self.read(adapter, ids, given, goes_on=past > 0)
        self.scope.open()
        self.scope.seen = reading
        return args, kwargs

    def _after(self, model: nn.Module, args: tuple, output: Any) -> None:
        if self.scope.is_open and not self.scope.seen.generating:
            if output is None:  # the call failed
                self.scope.seen.undo()
            self.scope.close()

    def _before_stack(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.scope.is_open and self.scope.seen.generating:
            self.scope.seen.offset = _past_length([*args, *kwargs.values()])

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the model's `generate`: pictures are read once, and markers are never written."""
        stand_in = self.stand_ins["generate"]
        given = self._take(kwargs)
        adapter = self._acting(given)
        if adapter is None:
            return stand_in.original(*args, **kwargs)
        kwargs |= dict(zip(stand_in.parameters(), args, strict=False))
        ids = kwargs.get("input_ids", kwargs.get("inputs"))
        past, mask = _past_length([*kwargs.values()]), kwargs.get("attention_mask")
        # As generate takes it: a mask that is longer than the text covers what is in the cache as well.
        goes_on = past > 0 and ids is not None and mask is not None and mask.shape[1] > ids.shape[1]
        if goes_on and "media" not in given:
            raise ValueError(
                "generate goes on with a text whose pictures it doesn't know. Pass the whole text and all of its pictures, "
                "or the same media=MediaCache() as to the calls before."
            )
        marker: Any = self.sights[adapter].marker
        other = kwargs.get("negative_prompt_ids")
        if other is not None and bool((other == marker).any()):
            raise ValueError("negative_prompt_ids has markers, but guidance reads that text without pictures.")
        kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or ()), NoMarkers(marker)])
        with torch.no_grad():
            reading = self.read(adapter, ids, given, goes_on)
        reading.generating, reading.keeps, reading.start = True, True, past if goes_on else 0
        self.scope.open()
        self.scope.seen = reading
        try:
            return stand_in.original(**kwargs)
        except BaseException:
            reading.undo()
            raise
        finally:
            self.scope.close()

    @contextmanager
    def without_pictures(self) -> Iterator[None]:
        """For passes in the midst of `generate` that read another text."""
        reading: Reading = self.scope.seen
        self.scope.seen = Reading(MediaCache(), None, reading.attend, generating=True)
        try:
            yield
        finally:
            self.scope.seen = reading

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the model's, which `generate` calls where tokens are proposed and then checked."""
        if self._acting({}) is not None:
            raise ValueError(
                "Assisted decoding isn't supported beside GatedXAttn: what proposes tokens knows no pictures, nor the "
                "marker. Leave out assistant_model=, prompt_lookup_num_tokens= and the like."
            )
        return self.stand_ins["_get_candidate_generator"].original(*args, **kwargs)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Stands in for the model's, which `generate` calls: its processors meet the marker's id in the text."""
        found = self.stand_ins["_get_logits_processor"].original(*args, **kwargs)
        adapter = self._acting({})
        if adapter is None:
            return found
        marker: Any = self.sights[adapter].marker
        return LogitsProcessorList(self._fitted(processor, marker) for processor in found)

    def _fitted(self, processor: Any, marker: int) -> Any:
        if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
            return WithoutPictures(processor, self)
        return BeyondVocabulary(processor, marker) if _looks_up_ids(processor) else processor

    def _take(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The pictures among a call's inputs, taken out of them."""
        found = {name: kwargs.pop(name) for name in self._inputs if name in kwargs}
        return {name: value for name, value in found.items() if value is not None}

    def _acting(self, given: dict[str, Any]) -> str | None:
        """The adapter that reads this call's pictures."""
        active = self.live_adapters()
        if not active and given:
            raise ValueError(
                f"{', '.join(given)} reached a model whose GatedXAttn adapter is disabled or not active: nothing would read "
                "it. Leave it out, or enable the adapter."
            )
        if len(active) > 1:
            raise ValueError(f"Adapters {active} would read the same pictures: one GatedXAttn adapter can be active.")
        return active[0] if active else None

    # --- the pictures ---

    def read(self, adapter: str, ids: Tensor | None, given: dict[str, Any], goes_on: bool) -> Reading:
        """The pictures of a call and the places of its text.

        Args:
            ids: (B, L).
            given: Of pixel_values, vision_features, frame_mask and media, those that were passed.
            goes_on: Whether the text follows on one whose pictures are in `media`.

        Raises:
            ValueError: a row has more markers than pictures, no row has a marker though there are pictures, an id is
                neither the marker nor in the vocabulary, a shape is wrong, or `media` is another adapter's.
        """
        seeing = self.sights[adapter]
        media = given.get("media")
        if media is not None and not isinstance(media, MediaCache):
            raise ValueError(f"media must be a MediaCache, got {type(media).__name__}.")
        media = MediaCache() if media is None else media
        if media.places and media.adapter not in (None, self.identity[adapter]):
            raise ValueError(
                f"media holds pictures as another adapter than {adapter!r} has read them. Take one MediaCache for each "
                "adapter, and give it the pictures."
            )
        known_places = media.places
        pictures = self._pictures(adapter, given)
        if ids is None:
            if pictures is not None or media.latents is not None:
                raise ValueError("Pictures were given without input_ids, in which their markers stand.")
            return Reading(media, None, seeing.attend)
        if pictures is not None and len(pictures) != len(ids):
            raise ValueError(f"Pictures of {len(pictures)} rows were given for {len(ids)} rows of text.")
        marks: Any = ids == seeing.marker
        self._check_markers(seeing.marker, ids, marks, given)
        known = media.counts(ids)
        if len(known) != len(ids):
            raise ValueError(f"media holds the pictures of {len(known)} rows, the text has {len(ids)}.")
        new = marks.sum(dim=1) - (0 if goes_on else known)
        self._check_counts(new, 0 if pictures is None else pictures.shape[1], known)
        if pictures is not None:
            self._append(media, adapter, pictures, given.get("frame_mask"), new)
        keeps = "media" in given and not torch.is_grad_enabled()
        times = text_time(marks, known if goes_on else None)
        return Reading(media, times, seeing.attend, keeps=keeps, known=known_places)

    def _check_markers(self, marker: int, ids: Tensor, marks: Tensor, given: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or not ids.numel():  # embeddings may stand in for ids
            return
        model: Any = self._model[0]
        size = getattr(model.get_input_embeddings(), "num_embeddings", None)
        largest = int(ids.masked_fill(marks, 0).max())
        if size is not None and largest >= size:
            raise ValueError(
                f"input_ids hold {largest}, but the embedding of {type(model).__name__} has {size} rows and the marker is "
                f"media_token_id={marker}. If {largest} is the tokenizer's marker, set media_token_id={largest} "
                "(InterleavedProcessor.media_token_id tells it); if not, the tokenizer isn't this model's."
            )
        pictures = [name for name in ("pixel_values", "vision_features") if name in given]
        if pictures and not bool(marks.any()):
            raise ValueError(
                f"{pictures[0]} hold images, but no row of input_ids has their marker, media_token_id={marker}: nothing would "
                "read them. InterleavedProcessor.media_token stands in the text for each image; without images leave "
                f"{pictures[0]} out."
            )

    def _check_counts(self, new: Tensor, given: int, known: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        for row, (needed, before) in enumerate(zip(new.tolist(), known.tolist(), strict=True)):
            if needed > given:
                raise ValueError(
                    f"Row {row} has {needed + before} markers but {given + before} pictures: each marker in input_ids "
                    "stands for one picture of pixel_values or vision_features."
                )
            if needed < 0:
                raise ValueError(f"Row {row} has {needed + before} markers, but media holds {before} pictures of it.")

    def _pictures(self, adapter: str, given: dict[str, Any]) -> Tensor | None:
        """Pixels (B, T, F, C, H, W) or features (B, T, F, S, D)."""
        pixels, features = given.get("pixel_values"), given.get("vision_features")
        width = self.sights[adapter].vision_width
        if pixels is not None and features is not None:
            raise ValueError("pixel_values and vision_features were both given: pictures come in one of them.")
        if pixels is not None:
            if adapter not in self.encoder_of:
                raise ValueError(
                    f"pixel_values were given, but adapter {adapter!r} has no vision_encoder: pass vision_features (B, T, F, "
                    f"S, {width})."
                )
            if pixels.ndim not in (5, 6):
                raise ValueError(
                    f"pixel_values have shape {tuple(pixels.shape)}, not (B, T, C, H, W) of pictures or (B, T, F, C, H, W) of "
                    "videos: T is the number of pictures in a row."
                )
            found = pixels if pixels.ndim == 6 else pixels[:, :, None]
        elif features is None:
            found = None
        elif features.ndim != 5 or features.shape[-1] != width:
            raise ValueError(f"vision_features have shape {tuple(features.shape)}, not (B, T, F, S, {width}).")
        else:
            found = features
        mask = given.get("frame_mask")
        if mask is not None and (found is None or mask.shape != found.shape[:3]):
            shape = None if found is None else tuple(found.shape[:3])
            raise ValueError(f"frame_mask has shape {tuple(mask.shape)}, the frames have (B, T, F) = {shape}.")
        return found

    def _append(
        self, media: MediaCache, adapter: str, pictures: Tensor, frame_mask: Tensor | None, counts: Tensor
    ) -> None:
        """Add to `media` the first `counts` (B) of each row's pictures; the others stand in no text."""
        b = len(counts)
        if torch.compiler.is_compiling():
            latents = self.tokens(adapter, pictures.flatten(0, 1), _flat(frame_mask)).unflatten(0, (b, -1))
        else:
            most = int(counts.max())
            if not most:
                return
            pictures = pictures[:, :most]
            mask = None if frame_mask is None else frame_mask[:, :most]
            own = torch.arange(most, device=counts.device) < counts[:, None]
            if bool(own.all()):
                latents = self.tokens(adapter, pictures.flatten(0, 1), _flat(mask)).unflatten(0, (b, most))
            else:
                own = own.to(pictures.device)
                found = self.tokens(adapter, pictures[own], None if mask is None else mask[own])
                latents = found.new_zeros(b, most, *found.shape[1:])
                latents[own.to(found.device)] = found
        media.append(latents, counts)
        media.adapter = self.identity[adapter]

    def tokens(self, adapter: str, pictures: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Pixels (N, F, C, H, W) or features (N, F, S, D) of N pictures or videos -> tokens (N, R, D)."""
        resampler: Resampler = self.gated_xattn_resampler[adapter]
        if pictures.ndim == 5:
            pictures = frame_features(self.encoders[self.encoder_of[adapter]], pictures)
        device = resampler.frames.device
        return resampler(pictures.to(device), None if frame_mask is None else frame_mask.to(device).bool())


def _flat(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.flatten(0, 1)


def _looks_up_ids(processor: Any) -> bool:
    """Whether it may look up ids among scores: not with inputs of its own."""
    return len(inspect.signature(processor.__call__).parameters) <= 2


def _past_length(inputs: list[Any]) -> int:
    """How many tokens are in the key-value cache among a call's inputs."""
    return next((int(value.get_seq_length()) for value in inputs if isinstance(value, Cache)), 0)


class Wrapper(nn.Module, HostedLayer, GatedXAttnLayer):
    """Stands in a frozen module's place. What is asked of it beside a call is answered by the module."""

    def __init__(self, base_layer: nn.Module, role: str) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self.role = role

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def host(self) -> nn.Module:
        return self.base_layer


class SeeingLayer(Wrapper):
    """Wraps a frozen decoder layer with the block before it.

    The block is recomputed with the layer under gradient checkpointing: it gets the pictures' tokens as an input.
    """

    adapter_layer_names = ("gated_xattn_block",)
    gated_xattn_block: Any  # {adapter: GatedBlock}; empty for adapters with share_blocks

    def __init__(self, base_layer: nn.Module, reader: MediaReader, role: str) -> None:
        super().__init__(base_layer, role)
        self.gated_xattn_block = nn.ModuleDict()
        self.sharing: set[str] = set()
        self._reader = (reader,)

    def add(self, adapter_name: str, block: GatedBlock | None) -> None:
        """Let an adapter act here: by a block of its own, or (None) by the one of all layers."""
        if block is None:
            self.sharing.add(adapter_name)
            return
        self.gated_xattn_block[adapter_name] = block
        self.settle(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.sharing.discard(adapter_name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(self.see(hidden_states), *args, **kwargs)

    def see(self, y: Tensor) -> Tensor:
        """(B, L, d) -> (B, L, d), read on by the frozen layer."""
        (reader,) = self._reader
        adapter = next((a for a in reader.live_adapters() if a in self.sharing or a in self.gated_xattn_block), None)
        if adapter is None:
            return y
        if not reader.scope.is_open:
            raise RuntimeError(
                "A decoder layer ran outside of a call of its model, where nothing is known of pictures. Call the model that "
                "the adapter was made for, not a part of it."
            )
        shared = adapter in self.sharing
        block: GatedBlock = reader.gated_xattn_shared[adapter] if shared else self.gated_xattn_block[adapter]
        reading: Reading = reader.scope.seen
        sight = reading.sight(y)
        if sight is None:
            idle = block.seeing_parameters()
            if not reading.is_missed:
                reading.is_missed = True
                idle += reader.gated_xattn_resampler[adapter].parameters()
            if self.training and torch.is_grad_enabled():
                y = TakePart.apply(y, *(p for p in idle if p.requires_grad))
            return self._run(block, y)
        make = block.attention.keys_values
        if reading.keeps:
            key = adapter if shared else (adapter, self.role)
            return block(y, sight, reading.keys_values(key, sight, lambda m: make(m.to(y.device))))

        def see(y: Tensor, latents: Tensor) -> Tensor:
            return block(y, sight, sight.pick(*make(latents)))

        latents: Any = reading.media.latents
        return self._run(see, y, latents.to(y.device))

    def _run(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        layer: Any = self.base_layer
        if self.training and torch.is_grad_enabled() and getattr(layer, "gradient_checkpointing", False):
            return layer._gradient_checkpointing_func(function, *tensors)
        return function(*tensors)


class MarkerEmbedding(Wrapper):
    """Wraps the frozen token embedding: the marker gets a row of its own, which trains."""

    adapter_layer_names = ("gated_xattn_marker_norm",)
    gated_xattn_marker_norm: Any  # {adapter: (d)}, as the embedding gives it, that is after any scaling

    def __init__(self, base_layer: nn.Module, role: str) -> None:
        super().__init__(base_layer, role)
        self.gated_xattn_marker_norm = nn.ParameterDict()
        self.markers: dict[str, int] = {}

    @torch.no_grad()
    def add(self, adapter_name: str, marker: int) -> None:
        """The row starts as the vocabulary's own; one beyond it as the mean of rows that are spread over it."""
        embedding: Any = self.base_layer
        device, size = device_of(embedding), embedding.num_embeddings
        ids = torch.tensor([marker]) if marker < size else torch.linspace(0, size - 1, min(size, 1024)).long()
        self.markers[adapter_name] = marker
        self.gated_xattn_marker_norm[adapter_name] = nn.Parameter(embedding(ids.to(device)).mean(dim=0))
        self.settle(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.markers.pop(adapter_name, None)

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = next(iter(self.live_adapters()), None)
        if adapter is None:
            return self.base_layer(input_ids, *args, **kwargs)
        marks = input_ids == self.markers[adapter]
        rows = self.base_layer(input_ids.masked_fill(marks, 0), *args, **kwargs)
        return torch.where(marks[..., None], self.gated_xattn_marker_norm[adapter].to(rows.dtype), rows)
