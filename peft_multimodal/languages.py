"""A text tower that reads several languages, as processors and trainers see it, whichever method put it there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import Tensor, nn


class Teaching(NamedTuple):
    """What the frozen tower gives for English texts: the pooled output (B, d_t), at the level of tokens E (B, L, d_t)."""

    pooled: Tensor
    states: Tensor | None


class MultilingualTower(ABC):
    """A module below a frozen text tower. A language is an adapter: a frozen encoder S and a map A that is trained."""

    level: str  # what the model reads of the tower: "pooled" or "tokens"
    longest: dict[str, int | None]  # tokens that each language's encoder reads
    reads_padding: bool  # the tower itself: whether padding behind a text changes its features

    @property
    @abstractmethod
    def active_adapters(self) -> list[str]:
        """The languages that the tower reads now."""

    @abstractmethod
    def host(self) -> nn.Module:
        """The frozen tower."""

    @abstractmethod
    def widths(self, adapter_name: str) -> tuple[int, int]:
        """(d_s, d_t) of what the language's encoder gives and of what the tower gives."""

    @abstractmethod
    def frozen_weights(self, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
        """Names and values of all that decides what `teach` and `encode` give."""

    @abstractmethod
    def is_untrained(self, adapter_name: str) -> bool:
        """Whether `start_at` may still say where A starts; not where its weights are yet to be loaded."""

    @abstractmethod
    def start_at(self, mean: Tensor, adapter_name: str) -> None:
        """Let A give at first the mean teacher vector (d_t), which all texts have in common."""

    @abstractmethod
    def teach(self, input_ids: Tensor, attention_mask: Tensor | None) -> Teaching:
        """The frozen tower's outputs for English texts, in eval mode."""

    @abstractmethod
    def encode(self, input_ids: Tensor, mask: Tensor, adapter_name: str) -> Tensor:
        """H (B, L, d_s) of the language's frozen encoder."""

    @abstractmethod
    def project(
        self, H: Tensor, mask: Tensor, adapter_name: str, tokens: bool | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """A alone: Y (B, L, d_t), or None unless `tokens`, and y (B, d_t). By default the level decides."""

    @abstractmethod
    def standing_in(self, states: Tensor) -> AbstractContextManager[None]:
        """Within it the tower gives these states of its last layer (B, L, d_t), whatever text it is called with."""


def multilingual_tower(model: nn.Module) -> Any:
    """The [`MultilingualTower`] of a model; None where there is none."""
    return next((module for module in model.modules() if isinstance(module, MultilingualTower)), None)
