"""Parts of a batch that go through a model one after another, and again with the random numbers that they had."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def part_of(inputs: Mapping[str, Any], start: int, stop: int, size: int) -> dict[str, Any]:
    """A part of a batch; what isn't a tensor or a list of the batch's rows goes with every part."""

    def has_rows(value: Any) -> bool:
        return isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)

    return {
        name: value[start:stop] if has_rows(value) and len(value) == size else value for name, value in inputs.items()
    }


def random_states(device: torch.device) -> list[Tensor]:
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


@contextmanager
def with_random_states(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Within it random numbers are drawn as they were before: dropout is the same in both passes."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        yield
