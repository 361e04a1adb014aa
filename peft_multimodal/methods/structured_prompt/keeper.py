"""Results that are kept from call to call, as long as nothing changes that they were computed from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...core.modules import device_of
from .dual_encoder import switched, trained_beside


class Kept(NamedTuple):
    model: Any  # its switches, the precision, and its parameters, whose versions tell whether they changed
    contexts: list[Tensor]  # the adapter's, by value: an average or a sharded optimizer writes past versions
    value: Any


class Keeper:
    """Keeps what was computed of a class list by a model and the contexts of an adapter.

    Args:
        model: The model.
        place: A module where the computations happen: its device has the autocast that counts.
    """

    def __init__(self, model: nn.Module, place: nn.Module) -> None:
        self.model, self.place = model, place
        self.kept: dict[tuple[str | None, str], Kept] = {}

    def trains(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters())

    def keeps(self, adapter_name: str | None) -> bool:
        """Whether anything is kept now: not in graphs, and in training nothing that an adapter had its part in."""
        return not torch.compiler.is_compiling() and (adapter_name is None or not self.trains())

    def __call__(
        self, adapter_name: str | None, kind: str, compute: Callable[[], Any], context: nn.Module | None = None
    ) -> Any:
        """`compute()`, or what it gave since anything changed; of the base model alone where there is no adapter."""
        if not self.keeps(adapter_name):
            return compute()
        trained = () if context is None else context.named_parameters()
        contexts = [p.detach() for name, p in trained if not name.startswith("attention.")]
        model, kept = self._state(adapter_name), self.kept.get((adapter_name, kind))
        if kept is None or kept.model != model or not all(map(torch.equal, kept.contexts, contexts)):
            with torch.inference_mode(False), torch.no_grad():  # so that any later call may use it
                kept = Kept(model, [p.clone() for p in contexts], compute())
            self.kept[adapter_name, kind] = kept
        return kept.value

    def _state(self, adapter_name: str | None) -> Any:
        switches = [(*m.active_adapters, m.disable_adapters, *m.merged_adapters) for m in switched(self.model)]
        aside = trained_beside(self.model) if adapter_name is None else set()  # changes with every step
        versions = [(id(p), p._version) for p in self.model.parameters() if id(p) not in aside]
        return autocast_dtype(device_of(self.place)), switches, versions

    def forget(self, *adapter_names: str) -> None:
        """What was computed with these adapters."""
        self.kept = {key: kept for key, kept in self.kept.items() if key[0] not in adapter_names}


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """In what a device computes now; None without autocast, in what the weights are."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
