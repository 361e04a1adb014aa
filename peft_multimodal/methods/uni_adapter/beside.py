"""What UniAdapter puts into a model: what layers share, the branches of a layer, and what lets them act beside it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ...core.modules import dtype_of
from ...core.parts import AttachedPart, CallScope, MultimodalLayer, rows_of
from ...core.private import InsideCheckpoint
from ...core.stand_in import StandIn
from ...nn.router import ModalityRouter
from ...nn.single_streams import IMAGE
from .bottleneck import Branch, added_by_fusion, added_by_modality, added_in_a_tower


class UniAdapterLayer(MultimodalLayer):
    """Base of everything that this method puts into a model."""


class SharedSite(AttachedPart, UniAdapterLayer):
    """What the n-th layers of all stacks share, once and below the model: D, or the map M."""

    adapter_layer_names = ("uni_adapter_shared",)
    uni_adapter_shared: Any  # {adapter: Down, or Linear}


class UniAdapterBranch(AttachedPart, UniAdapterLayer):
    """The branches of all adapters of one kind at one layer. It hangs below the layer; `Beside` lets it act."""

    adapter_layer_names = ("uni_adapter_branch",)
    uni_adapter_branch: Any  # {adapter: Branch}

    def __init__(self, beside: Beside, role: str) -> None:
        super().__init__(beside.layer, role)
        self.beside = beside

    def remove_hooks(self) -> None:
        self.beside.leave(self)


class Beside:
    """Stands in for a layer's `forward`: hears what its sub-layers read, and adds what the branches make of it.

    Args:
        layer: The layer.
        path: Its path in the model.
        ffns: The maps in it by which its FFNs read the stream.
        queries: Those by which cross-attentions read it, where the layer belongs to a text and fuses.
        norms: What normalises in it.
        router: Knows which tokens are images, where texts and images stand in one sequence.
    """

    def __init__(
        self,
        layer: nn.Module,
        path: str,
        ffns: Sequence[nn.Module],
        queries: Sequence[nn.Module],
        norms: Sequence[nn.Module],
        router: ModalityRouter | None,
    ) -> None:
        self.layer, self.path, self.router = layer, path, router
        self.parts: dict[str, UniAdapterBranch] = {}  # by their kind
        self.call = CallScope()  # what was read in a call of the layer
        self.rows = CallScope()  # `adapter_names` of a call of the model
        for modules, hear in ((ffns, "read_ffn"), (queries, "read_query")):
            for module in modules:
                module.register_forward_pre_hook(Ear(self, hear))
        for module in norms:
            module.register_forward_hook(Ear(self, "read_norm"))
        self.stand_in = StandIn(layer, "forward", self.forward, innermost=True)
        self.inside = InsideCheckpoint(layer, self.call, self.finish)
        # PyTorch's own attention reads (L, B, d) unless told otherwise.
        mixers = [m for m in layer.modules() if isinstance(m, nn.MultiheadAttention)]
        self.batch_dim = int(any(not m.batch_first for m in mixers))

    def join(self, kind: str, role: str) -> UniAdapterBranch:
        """A new part of a kind: "layer", "image" or "fusion"."""
        self.parts[kind] = UniAdapterBranch(self, role)
        return self.parts[kind]

    def leave(self, part: UniAdapterBranch) -> None:
        """One part less; with the last one everything goes."""
        self.parts = {kind: other for kind, other in self.parts.items() if other is not part}
        if not self.parts:
            self.stand_in.give_back()
            self.inside.remove()
            for module in self.layer.modules():
                for hooks in (module._forward_pre_hooks, module._forward_hooks):
                    for key in [k for k, hook in hooks.items() if isinstance(hook, Ear) and hook.beside is self]:
                        del hooks[key]
            if self.router is not None:
                self.router.remove()

    # --- what a call says ---

    def read_ffn(self, module: nn.Module, args: tuple) -> None:
        if self.call.is_open:
            self.call.values.setdefault("ffns", []).append(args[0])

    def read_query(self, module: nn.Module, args: tuple) -> None:
        if self.call.is_open:
            self.call.values["query"] = args[0]

    def read_norm(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.call.is_open:
            self.call.values.setdefault("norms", []).append((args[0], output))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the layer's `forward`."""
        if not self.acting():
            return self.stand_in.original(*args, **kwargs)
        self.call.open()
        self.call.values["inputs"] = (*args, *kwargs.values())
        try:
            return self.finish(self.layer, (), self.stand_in.original(*args, **kwargs))
        finally:
            self.call.close()

    def finish(self, layer: nn.Module, args: tuple, output: Any) -> Any:
        """h' of h, inside what gradient checkpointing recomputes."""
        read = self.call.values
        if not (adapters := self.acting()) or "ffns" not in read:  # it is done already, inside of here
            return output
        inputs, norms = (*args, *read["inputs"]), read.get("norms", ())
        if not norms or all(norms[0][0] is not value for value in inputs):
            norms = ()  # post-LN: the stream is what comes out of a norm
        a = stream(read["query"], norms) if "query" in read else None
        h = output[0] if isinstance(output, tuple) else output
        x = of_all_tokens([stream(x, norms) for x in read["ffns"]], h)
        h = h + self.added(adapters, x, a).to(h.dtype)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    # --- what is added ---

    def acting(self) -> list[str]:
        """The adapters that act in this call here, on all rows or on some."""
        parts, names = self.parts.values(), self.rows.values.get("adapter_names")
        if names is None:
            return list(dict.fromkeys(name for part in parts for name in part.live_adapters()))
        return sorted({n for part in parts if not part.disable_adapters for n in names if part.has_adapter(n)})

    def added(self, adapters: list[str], x: Tensor, a: Tensor | None) -> Tensor:
        """What the acting adapters add: their sum, or to each row what its own adds."""
        kinds = None if self.router is None else self.router.modality(self.path, x)
        is_image = None if kinds is None else kinds >= IMAGE
        if "adapter_names" not in self.rows.values:
            total: Any = sum(self.added_by(adapter, x, a, is_image) for adapter in adapters)
            return total
        seen = x.shape[self.batch_dim] if x.ndim > 2 else 0  # patches of all images in one list are no rows
        total, dim, rows_by_adapter = torch.zeros_like(x), self.batch_dim, rows_of(self.rows, seen, x.device)
        for adapter in adapters:
            rows = rows_by_adapter[adapter]
            of_rows = [None if t is None else t.index_select(dim, rows) for t in (a, is_image)]
            added = self.added_by(adapter, x.index_select(dim, rows), *of_rows)
            total = total.index_copy(dim, rows, added.to(total.dtype))
        return total

    def added_by(self, adapter: str, x: Tensor, a: Tensor | None, is_image: Tensor | None) -> Tensor:
        """What one adapter adds, in its own dtype."""
        parts = {kind: part for kind, part in self.parts.items() if part.has_adapter(adapter)}
        branches: dict[str, Branch] = {kind: part.uni_adapter_branch[adapter] for kind, part in parts.items()}
        first, part = next(iter(branches.values())), next(iter(parts.values()))
        dtype = dtype_of(first.up)
        x, a = part._cast_input_dtype(x, dtype), part._cast_input_dtype(a, dtype)
        if a is not None:
            fused, rest = x[..., : a.shape[-2], :], x[..., a.shape[-2] :, :]  # behind a Q-Former's queries stands text
            added = added_by_fusion([branches[kind] for kind in ("layer", "fusion") if kind in branches], a, fused)
            return torch.cat([added, self.added_by(adapter, rest, None, None)], dim=-2) if rest.shape[-2] else added
        if is_image is not None:
            return added_by_modality(branches["layer"], branches["image"], x, is_image)
        return added_in_a_tower(branches["layer"], x) if "layer" in branches else torch.zeros_like(x)


class Ear:
    """A hook by which `Beside` hears a module in its layer.

    PEFT trains a copy of a module as a whole (`modules_to_save`): that is heard, too. In a copy of the layer it is the
    copy's own.
    """

    def __init__(self, beside: Beside, hear: str) -> None:
        self.beside, self.hear = beside, hear

    def __call__(self, *call: Any) -> None:
        getattr(self.beside, self.hear)(*call)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ear:
        return Ear(deepcopy(self.beside, memo), self.hear) if id(self.beside.layer) in memo else self


def stream(states: Tensor, norms: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The stream before what normalises it for a sub-layer; the states themselves where nothing does."""
    return next((before for before, after in norms if after is states), states)


def of_all_tokens(states: Sequence[Tensor], h: Tensor) -> Tensor:
    """What a layer's FFNs read, in the shape of what the layer gives.

    OPT's FFN reads all rows in one. A Q-Former has an FFN for its queries and one for its text, and chunks come one by one;
    where each of several reads all tokens, the first one's counts.
    """
    whole = next((x for x in states if x.numel() == h.numel()), None)
    return torch.cat(list(states), dim=-2) if whole is None else whole.reshape(h.shape)
