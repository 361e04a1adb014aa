"""Logits processors beside a marker: it stands in the text, is never written, and may lie beyond the vocabulary."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, UnbatchedClassifierFreeGuidanceLogitsProcessor


class NoMarkers(LogitsProcessor):
    """Gives the marker no probability: text that is written brings no images."""

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


class WithoutImages(LogitsProcessor):
    """Guidance, whose second pass of the model reads a text of its own, which has no images."""

    def __init__(self, processor: LogitsProcessor, without_images: Callable[[], AbstractContextManager[None]]) -> None:
        self.processor, self.without_images = processor, without_images

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        with self.without_images():
            return self.processor(input_ids, scores)


def fit_to_marker(
    processors: LogitsProcessorList, marker: int, without_images: Callable[[], AbstractContextManager[None]]
) -> LogitsProcessorList:
    """Those of a `generate` whose text has markers; within `without_images` the model reads a text that has none."""

    def fit(processor: Any) -> Any:
        if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
            return WithoutImages(processor, without_images)
        looks_up_ids = len(inspect.signature(processor.__call__).parameters) <= 2  # with inputs of its own it doesn't
        return BeyondVocabulary(processor, marker) if looks_up_ids else processor

    return LogitsProcessorList(map(fit, processors))
