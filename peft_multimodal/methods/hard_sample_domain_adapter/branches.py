"""The branch of HardSampleDomainAdapter, and the parts that add it to a layer or to a tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ...core.anatomy import own_modules
from ...core.parts import AttachedPart, CallScope, MultimodalLayer, rows_of
from ...core.sites import arguments_of
from ...core.stand_in import StandIn
from ...nn.transformer_block import TransformerBlock


class DomainBranch(nn.Module):
    """The method's a and W_up.

    Args:
        width: d of the states that it reads.
        output_width: Of what it adds to; d in a layer.
        m, layers, heads, ff_mult, dropout: Of its transformer layers: width, number, heads, and of their FFNs.
    """

    def __init__(
        self, width: int, output_width: int, m: int, layers: int, heads: int, ff_mult: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, m)
        self.blocks = nn.ModuleList(TransformerBlock(m, heads, ff_mult, dropout) for _ in range(layers))
        self.up = nn.Linear(m, output_width, bias=False)
        self.scale_norm = nn.Parameter(torch.ones(1))  # s; by its name the optimizer doesn't decay it
        nn.init.zeros_(self.up.weight)

    def read(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """a: (B, L, d) -> (B, L, m). The mask (B or 1, 1, L or 1, L) is True where a token may look."""
        a = self.down(self.norm(h))
        for block in self.blocks:
            a = block(a, mask)
        return a

    def write(self, a: Tensor) -> Tensor:
        """s a W_up."""
        return self.scale_norm * self.up(a)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        return self.write(self.read(h, mask))


class HardSampleDomainAdapterLayer(MultimodalLayer):
    """Base of everything that this method puts into a model."""


class DomainPart(AttachedPart, HardSampleDomainAdapterLayer):
    """Hangs below a frozen module and takes its `forward` over: the branches of all adapters at this place."""

    adapter_layer_names = ("hard_sample_domain_adapter_branch",)
    hard_sample_domain_adapter_branch: Any  # {adapter: DomainBranch}

    def __init__(self, host: nn.Module, role: str) -> None:
        super().__init__(host, role)
        self.scope = CallScope()  # `adapter_names` of a call
        self._positions = {name: i for i, name in enumerate(arguments_of(host))}
        self.stand_in = StandIn(host, "forward", self.forward)
        self.hooks = [self.stand_in]

    def argument(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """An argument of the host's call, by name or position; None where it is missing."""
        position = self._positions.get(name, len(args))
        return args[position] if position < len(args) else kwargs.get(name)

    def branch_output(self, branch: DomainBranch, h: Tensor, mask: Tensor | None) -> Tensor:
        """What one branch makes of states h (B, L, d), in its own dtype."""
        return branch(h, mask)

    def added(self, adapter_name: str, h: Tensor, mask: Tensor | None) -> Tensor:
        """What one adapter adds, for states h (B, L, d) and in their dtype."""
        branch = self.hard_sample_domain_adapter_branch[adapter_name]
        return self.branch_output(branch, self._cast_input_dtype(h, branch.scale_norm.dtype), mask).to(h.dtype)

    def acting(self) -> list[str]:
        """The adapters that act in this call here, on all rows or on some."""
        names = self.scope.values.get("adapter_names")
        if names is None:
            return self.live_adapters()
        return [] if self.disable_adapters else sorted(set(names) & set(self.hard_sample_domain_adapter_branch))

    def residual(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """What the acting adapters add: their sum, or to each row what its own adds."""
        if "adapter_names" not in self.scope.values:
            return sum(self.added(name, h, mask) for name in self.acting())  # type: ignore[return-value]
        total: Any = None
        rows_by_adapter = rows_of(self.scope, len(h), h.device)
        for name in self.acting():
            rows = rows_by_adapter[name]
            seen = mask if mask is None or len(mask) == 1 else mask[rows]
            part = self.added(name, h[rows], seen)
            total = part.new_zeros(len(h), *part.shape[1:]) if total is None else total
            total = total.index_copy(0, rows, part)
        return total


class DomainLayer(DomainPart):
    """h' = h + residual, with the layer's own mask.

    The mask arrives as transformers makes it: 4D boolean or additive, 2D of padding (flash attention), none at all
    where causality is left to the kernel (`is_causal`), or as the bounds of sequences that lie in one row.
    """

    def __init__(self, host: nn.Module, role: str) -> None:
        super().__init__(host, role)
        modules = list(own_modules(host).values())
        # PyTorch's own attention reads (L, B, d) unless told otherwise.
        self.sequence_first = any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in modules)
        self.is_causal = any(getattr(m, "is_causal", None) is True for m in modules)
        indices = (getattr(m, "layer_idx", None) for m in modules)
        self.layer_idx = next((i for i in indices if isinstance(i, int)), 0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the layer's `forward`."""
        if not self.acting():
            return self.stand_in.original(*args, **kwargs)
        self._check_cache(next((v for v in (*args, *kwargs.values()) if isinstance(v, Cache)), None))
        output = self.stand_in.original(*args, **kwargs)
        h = output[0] if isinstance(output, tuple) else output
        states = h.transpose(0, 1) if self.sequence_first else h
        shape = states.shape
        # Tokens in one row: windows' grids (B, H, W, d), and images that are packed into (L, d).
        states = states.unsqueeze(0) if states.dim() == 2 else states.flatten(1, -2)
        mask = self._mask(states, args, kwargs)
        added = self.residual(states, mask).reshape(shape)
        h = h + (added.transpose(0, 1) if self.sequence_first else added)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def _check_cache(self, past: Cache | None) -> None:
        if past is not None and past.get_seq_length(self.layer_idx) > 0:
            raise ValueError(
                f"{type(self.host()).__name__} generates from a cache of past tokens, which the adapter doesn't keep: "
                "call generate(..., use_cache=False)."
            )

    def _mask(self, h: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """What each token may look at: None, or boolean (B or 1, 1, L or 1, L)."""
        given, length = self.argument("attention_mask", args, kwargs), h.shape[1]
        if given is not None and (
            not isinstance(given, Tensor) or given.shape[-1] != length or self.sequence_first or given.dim() == 1
        ):
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(
                f"{type(self.host()).__name__} got an attention mask that the adapter can't read, {shape} for {length} "
                "tokens. Load the model with attn_implementation='sdpa', and generate with use_cache=False."
            )
        causal = kwargs.get("is_causal")
        causal = self.is_causal if causal is None else causal
        mask: Any = None
        if given is not None and given.dim() > 2:
            mask = given if given.dtype == torch.bool else given > MASKED
            mask = mask.unsqueeze(1) if mask.dim() == 3 else mask.any(dim=1, keepdim=True)  # heads may differ
        else:  # a mask of padding alone, or none: only then the kernels heed is_causal
            if given is not None:
                mask = given.bool()[:, None, None, :]
            if causal and length > 1:
                before = torch.ones(length, length, dtype=torch.bool, device=h.device).tril()[None, None]
                mask = before if mask is None else mask & before
        bounds = self.argument("cu_seqlens", args, kwargs)
        if bounds is not None:
            places = torch.arange(length, device=h.device)
            image = torch.bucketize(places, bounds[1:].to(places), right=True)
            together = (image[:, None] == image)[None, None]
            mask = together if mask is None else mask & together
        # A query that may look at nothing is padding: nobody reads it, and it must not be NaN.
        return None if mask is None else mask | ~mask.any(dim=-1, keepdim=True)


MASKED = -1e3  # what is added to the scores of tokens that may be seen is above it


class DomainTower(DomainPart):
    """y' = y + s mean(a) W_up on the pooled output of a tower, and on the first token, which stands for it elsewhere."""

    def branch_output(self, branch: DomainBranch, h: Tensor, mask: Tensor | None) -> Tensor:
        own = torch.ones(h.shape[:2], device=h.device) if mask is None else mask[:, 0, 0]
        a = branch.read(h, mask)
        weights = (own / own.sum(dim=1, keepdim=True)).to(a.dtype)
        return branch.write(torch.einsum("bl,blm->bm", weights, a))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the tower's `forward`."""
        if not self.acting():
            return self.stand_in.original(*args, **kwargs)
        wanted = kwargs.pop("return_dict", None)
        if wanted is None:
            wanted = getattr(getattr(self.host(), "config", None), "return_dict", True)
        output = self.stand_in.original(*args, **kwargs, return_dict=True)
        mask = self.argument("attention_mask", args, kwargs)
        h = output.last_hidden_state
        if mask is not None:
            mask = mask.bool() | ~mask.bool().any(dim=1, keepdim=True)  # a row of padding alone would be NaN
            mask = mask[:, None, None, :]
        added = self.residual(h, mask)
        if output.get("pooler_output") is not None:
            output["pooler_output"] = output.pooler_output + added
        if added.shape[-1] == h.shape[-1]:
            output["last_hidden_state"] = torch.cat([h[:, :1] + added[:, None], h[:, 1:]], dim=1)
        return output if wanted else output.to_tuple()
