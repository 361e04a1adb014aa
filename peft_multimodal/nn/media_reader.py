"""Images in the calls of a language model: taken out of `forward` and `generate`, read once, known to its layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, LogitsProcessorList

from ..core.parts import CallScope
from ..core.private import BeforeCandidates, FitLogitsProcessors
from ..core.stand_in import StandIn
from ..encoders.frozen import HoldsEncoders
from ..encoders.vision import frame_features
from .marker_logits import NoMarkers, fit_to_marker
from .media import MediaCache, Reading
from .media_inputs import NAMES, MediaInputs, Seeing


class MediaReader(HoldsEncoders):
    """Hangs below a language model: takes the images out of each call's inputs and holds what reads them.

    A call's state is a `Reading` in a scope of the thread, which ends with the call. A method's reader says by `resample`
    what its adapters make of images.

    Args:
        model: The language model.
        stack: The module in it whose forward runs the decoder's layers.
    """

    method: str  # what messages call it

    def __init__(self, model: nn.Module, stack: nn.Module) -> None:
        super().__init__(stack)
        self.sights: dict[str, Seeing] = {}  # of each adapter
        self.scope = CallScope()
        self._model = (model,)  # a tuple is not registered
        names = list(inspect.signature(model.forward).parameters)
        self._ids_argument = names.index("input_ids") if "input_ids" in names else None
        self.own_inputs = frozenset(names)  # a vision-language model's pixel_values are its own
        self._inputs = [n for n in NAMES if n not in self.own_inputs]
        self.hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
            stack.register_forward_pre_hook(self._before_stack, with_kwargs=True),
            # Trainer passes on the columns that the signature of `forward` names; the images are taken out by the hooks.
            StandIn(model, "forward", takes=self._inputs),
        ]
        if hasattr(model, "generate"):
            generation = Generation(model, self)
            self.hooks += [
                generation.generate_of,
                FitLogitsProcessors(model, generation.fit),
                BeforeCandidates(model, generation.refuse_assistants),
            ]

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.sights.pop(adapter_name, None)

    # --- a call of the model ---

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(kwargs)
        inputs = self.take(kwargs)
        if "past_key_values" in kwargs and "past_key_values" not in self.own_inputs and "cache" in self.own_inputs:
            kwargs.setdefault("cache", kwargs.pop("past_key_values"))  # as transformers calls it from 5.24 on
        adapter = self.acting(inputs)
        if adapter is None or (self.scope.is_open and self.scope.seen.generating):
            return args, kwargs
        ids = kwargs.get("input_ids")
        if ids is None and self._ids_argument is not None and len(args) > self._ids_argument:
            ids = args[self._ids_argument]
        past = past_length([*args, *kwargs.values()])
        if past and ids is not None and inputs.media is None:
            raise ValueError(
                "A call with past_key_values goes on with a text whose images it doesn't know. Pass the same "
                "media=MediaCache() to this and to the calls before."
            )
        marker = self.sights[adapter].marker
        for name in ("labels", "shift_labels"):
            if kwargs.get(name) is not None:  # a marker is never a target, and may lie beyond the vocabulary
                kwargs[name] = kwargs[name].masked_fill(kwargs[name] == marker, -100)
        if self.scope.is_open:
            self.scope.seen.undo()  # an interrupt in an earlier call has passed over its end
        reading = self.read(adapter, ids, inputs, goes_on=past > 0)
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
            self.scope.seen.offset = past_length([*args, *kwargs.values()])

    # --- the images ---

    def take(self, kwargs: dict[str, Any]) -> MediaInputs:
        """The images among a call's inputs, taken out of them."""
        return MediaInputs.take(kwargs, self._inputs)

    def acting(self, inputs: MediaInputs | None = None) -> str | None:
        """The adapter that reads a call's images."""
        active = self.live_adapters()
        if not active and inputs is not None and (passed := inputs.passed()):
            raise ValueError(
                f"{', '.join(passed)} reached a model whose {self.method} adapter is disabled or not active: nothing would read "
                "it. Leave it out, or enable the adapter."
            )
        if len(active) > 1:
            raise ValueError(f"Adapters {active} would read the same images: one {self.method} adapter can be active.")
        return active[0] if active else None

    def read(self, adapter: str, ids: Tensor | None, inputs: MediaInputs, goes_on: bool) -> Reading:
        """What the layers know of a call's images; `goes_on` if its text follows on one whose images are in `media`."""
        encode, has_encoder = partial(self.tokens, adapter), adapter in self.encoder_of
        return inputs.read(ids, adapter, self.sights[adapter], encode, has_encoder, self._model[0], goes_on)

    def tokens(self, adapter: str, images: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Pixels (N, F, C, H, W) or features (N, F, S, D) of N images or videos -> tokens (N, R, D)."""
        if images.ndim == 5:
            images = frame_features(self.encoder(adapter), images)
        return self.resample(adapter, images, frame_mask)

    def resample(self, adapter: str, features: Tensor, frame_mask: Tensor | None) -> Tensor:
        """Features (N, F, S, D) -> tokens (N, R, D)."""
        raise NotImplementedError


class Generation:
    """Stands in for a model's `generate`: images are read once, and markers are never written."""

    def __init__(self, model: nn.Module, reader: MediaReader) -> None:
        self.reader = reader
        self.generate_of = StandIn(model, "generate", self.generate)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        reader, scope = self.reader, self.reader.scope
        inputs = reader.take(kwargs)
        adapter = reader.acting(inputs)
        if adapter is None:
            return self.generate_of.original(*args, **kwargs)
        kwargs |= dict(zip(self.generate_of.parameters(), args, strict=False))
        ids = kwargs.get("input_ids", kwargs.get("inputs"))
        past, mask = past_length([*kwargs.values()]), kwargs.get("attention_mask")
        # As generate takes it: a mask that is longer than the text covers what is in the cache as well.
        goes_on = past > 0 and ids is not None and mask is not None and mask.shape[1] > ids.shape[1]
        if goes_on and inputs.media is None:
            raise ValueError(
                "generate goes on with a text whose images it doesn't know. Pass the whole text and all of its images, "
                "or the same media=MediaCache() as to the calls before."
            )
        marker: Any = reader.sights[adapter].marker
        other = kwargs.get("negative_prompt_ids")
        if other is not None and bool((other == marker).any()):
            raise ValueError("negative_prompt_ids has markers, but guidance reads that text without images.")
        kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or ()), NoMarkers(marker)])
        with torch.no_grad():
            reading = reader.read(adapter, ids, inputs, goes_on)
        reading.generating, reading.keeps, reading.start = True, True, past if goes_on else 0
        scope.open()
        scope.seen = reading
        try:
            return self.generate_of.original(**kwargs)
        except BaseException:
            reading.undo()
            raise
        finally:
            scope.close()

    def fit(self, processors: LogitsProcessorList) -> LogitsProcessorList:
        """The logits processors meet the marker's id in the text."""
        adapter = self.reader.acting()
        if adapter is None:
            return processors
        return fit_to_marker(processors, self.reader.sights[adapter].marker, self.without_images)

    @contextmanager
    def without_images(self) -> Iterator[None]:
        """For passes in the midst of `generate` that read another text."""
        scope = self.reader.scope
        reading: Reading = scope.seen
        scope.seen = Reading(MediaCache(), None, reading.attend, generating=True)
        try:
            yield
        finally:
            scope.seen = reading

    def refuse_assistants(self) -> None:
        if self.reader.acting() is not None:
            raise ValueError(
                f"Assisted decoding isn't supported beside {self.reader.method}: what proposes tokens knows no images, nor the "
                "marker. Leave out assistant_model=, prompt_lookup_num_tokens= and the like."
            )


def past_length(inputs: list[Any]) -> int:
    """How many tokens are in the key-value cache among a call's inputs."""
    return next((int(value.get_seq_length()) for value in inputs if isinstance(value, Cache)), 0)
