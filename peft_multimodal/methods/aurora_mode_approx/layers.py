"""The layers that the CP tensor acts on: the update of a module's matrices, and merging."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...core.anatomy import device_of, linear_shape
from ...core.parts import CallScope
from .factors import AddUpdate, AuroraModeApproxLayer, SharedFactors


@dataclass(frozen=True)
class Slices:
    """How one adapter acts on one module: consecutive matrices that share a group of factors form a block."""

    blocks: tuple[tuple[str, int, int], ...]  # (group, first row of P, end)
    scaling: float
    dropout: float


class AuroraMatrixLayer(nn.Module, AuroraModeApproxLayer):
    """Base of the wrapped layers: P, the factored update and its algebra."""

    adapter_layer_names = ("aurora_mode_approx_P_norm",)
    other_param_names = ("slices",)
    in_features: int  # of what the wrapped module reads and gives, as PEFT's LoRA layers name them
    out_features: int

    def __init__(self, base_layer: nn.Module, factors: SharedFactors, scope: CallScope | None) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.aurora_mode_approx_P_norm = nn.ParameterDict()
        self.slices: dict[str, Slices] = {}
        self.merged_adapters: list[str] = []
        self.scope = scope
        base: Any = self.get_base_layer()
        of_three = isinstance(base, nn.MultiheadAttention)
        self.in_features, self.out_features = (base.embed_dim, 3 * base.embed_dim) if of_three else linear_shape(base)
        self._factors = (factors,)  # a reference: in a tuple it is not registered, so it is saved once

    @property
    def factors(self) -> SharedFactors:
        return self._factors[0]

    def update_layer(
        self, adapter_name: str, groups: list[str], r: int, core: str, scaling: float, dropout: float
    ) -> None:
        """Let an adapter act on the module's matrices, each by the factors of its group."""
        starts = [i for i, g in enumerate(groups) if i == 0 or g != groups[i - 1]]
        blocks = tuple((groups[a], a, b) for a, b in zip(starts, [*starts[1:], len(groups)], strict=True))
        self.slices[adapter_name] = Slices(blocks, scaling, dropout)
        P = torch.randn(len(groups), r)
        if core == "tucker":
            nn.init.xavier_uniform_(P)
        self.aurora_mode_approx_P_norm[adapter_name] = nn.Parameter(P)

    @torch.no_grad()
    def start_at_ones(self, adapter_name: str) -> None:
        """P = 1 + 0.02 N(0, 1), in place of N(0, 1), of which P has been drawn."""
        self.aurora_mode_approx_P_norm[adapter_name].mul_(0.02).add_(1)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        device = device_of(self.get_base_layer()) if device is None else device
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def product(self, x: Tensor, adapter: str, group: str) -> Tensor:
        """drop(x U): (..., R). Within one call of the parent module, layers that read the same x share it."""
        scope = self.scope
        if scope is None or not scope.is_open:
            return self._product(x, adapter, group)
        if scope.seen is not x:
            scope.seen, scope.values = x, {}
        key = (adapter, group)
        if key not in scope.values:
            scope.values[key] = self._product(x, adapter, group)
        return scope.values[key]

    def _product(self, x: Tensor, adapter: str, group: str) -> Tensor:
        U = self.factors.U(adapter, group)
        dropout = self.slices[adapter].dropout
        xu = self._cast_input_dtype(x, U.dtype) @ U
        return F.dropout(xu, dropout) if self.training and dropout else xu

    def modes(self, adapter: str, block: tuple[str, int, int]) -> Tensor:
        """s V diag(lambda * P_n) of the block's matrices, stacked: d_out x R."""
        return self.factors.modes(adapter, block[0], self._rows(adapter, block))

    def _rows(self, adapter: str, block: tuple[str, int, int]) -> Tensor:
        """s P_n of the block's matrices: n x R."""
        scale = self.slices[adapter].scaling
        P = self.aurora_mode_approx_P_norm[adapter][block[1] : block[2]]
        return P if scale == 1.0 else scale * P

    def add_update(self, y: Tensor, x: Tensor, adapter: str) -> Tensor:
        """y + s ((x U) * lambda * P) V^T, in y's dtype."""
        blocks = self.slices[adapter].blocks
        if len(blocks) > 1:
            updates = [F.linear(self.product(x, adapter, b[0]), self.modes(adapter, b)) for b in blocks]
            return y + torch.cat(updates, dim=-1).to(y.dtype)
        xu = self.product(x, adapter, blocks[0][0])
        if self.factors.is_tucker(adapter) or xu.dtype != y.dtype:
            return y + F.linear(xu, self.modes(adapter, blocks[0])).to(y.dtype)
        V, c = self.factors.V_and_modes(adapter, blocks[0][0], self._rows(adapter, blocks[0]))
        flat = AddUpdate.apply(y.reshape(-1, y.shape[-1]), xu.reshape(-1, xu.shape[-1]), V, c)
        return flat.view(y.shape)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The whole update dW, d_out x d_in, by tensorly's algebra: for merging and inspection, never in training."""
        P, scale = self.aurora_mode_approx_P_norm[adapter], self.slices[adapter].scaling
        updates = [self.factors.updates(adapter, group, P[a:b], scale) for group, a, b in self.slices[adapter].blocks]
        return torch.cat([update.flatten(0, 1) for update in updates])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` can take dW apart: of a Conv1D it would take it for its transpose."""
        return self.has_adapter(adapter_name) and not isinstance(self.get_base_layer(), Conv1D)

    @torch.no_grad()
    def lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A = U^T and B = s V diag(lambda * P_n), a block of rows a matrix, in float32 or better.

        Matrices that share a group of factors share its R rows of A. A fused module whose matrices belong to several groups
        has the groups' rows of A one below the other, and their B along a diagonal.
        """
        wide = torch.promote_types(self.aurora_mode_approx_P_norm[adapter_name].dtype, torch.float32)
        blocks = self.slices[adapter_name].blocks
        A = torch.cat([self.factors.U(adapter_name, group).to(wide).t() for group, _, _ in blocks])
        B = [self.factors.modes(adapter_name, b[0], self._rows(adapter_name, b).to(wide)) for b in blocks]
        return A, torch.block_diag(*B)

    def base_weights(self) -> list[Tensor]:
        """Views of the base weight as d_out x d_in, in the order of the delta's rows."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add dW of the adapters, by default the active ones; `safe_merge` refuses what isn't finite beforehand."""
        if safe_merge:
            self.check_merge(adapter_names)
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.slices:
                for weight, update in self._weights_and_updates(adapter):
                    weight += update
                self.merged_adapters.append(adapter)

    @torch.no_grad()
    def check_merge(self, adapter_names: list[str] | None) -> None:
        """Raise ValueError if merging would give weights that aren't finite; the weights are not touched."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            for weight, update in self._weights_and_updates(adapter) if adapter in self.slices else ():
                if not bool(torch.isfinite(weight + update).all()):
                    raise ValueError(
                        f"Merging adapter {adapter!r} would give NaN or infinite weights ({self.role}); nothing was merged."
                    )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged updates out of the base weight again."""
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            for weight, update in self._weights_and_updates(adapter) if adapter in self.slices else ():
                weight -= update

    def _weights_and_updates(self, adapter: str) -> list[tuple[Tensor, Tensor]]:
        """Each base weight (a view) with its rows of dW, on its device and in its dtype."""
        weights = self.base_weights()
        updates = self.get_delta_weight(adapter).split([w.shape[0] for w in weights])
        return [(w, update.to(w.device, w.dtype)) for w, update in zip(weights, updates, strict=True)]

    def acting(self) -> list[str]:
        """The adapters whose update is added in this call; merged ones are in the weight already."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        return [] if self.merged else [a for a in self.active_adapters if a in self.slices]


class AuroraLinear(AuroraMatrixLayer):
    """A wrapped `nn.Linear` or `Conv1D`, possibly a fused q, k, v."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapters = self.acting()
        y = self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            y = self.add_update(y, x, adapter)
        return y

    def base_weights(self) -> list[Tensor]:
        base: Any = self.get_base_layer()
        if not base.weight.is_floating_point() or base.weight.shape.numel() != math.prod(linear_shape(base)):
            raise ValueError(
                f"{type(base).__name__} holds quantised weights, which an update can't be added to. Keep the adapter "
                "unmerged, or load the base in 16 or 32 bit to merge."
            )
        weight = base.weight.data
        return [weight.t() if isinstance(base, Conv1D) else weight]


class AuroraMultiheadAttention(AuroraMatrixLayer):
    """A wrapped `nn.MultiheadAttention`, whose q, k and v live in one parameter that is read, not called."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`; shapes (B, L, d) if `batch_first`, else (L, B, d), or (L, d) without a batch."""
        adapters = self.acting()
        base: Any = self.get_base_layer()
        if not adapters:
            return self.base_layer(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        inputs = [query, key, value]
        sources = [next(j for j in range(3) if inputs[j] is inputs[i]) for i in range(3)]
        if batched := query.dim() == 3:
            inputs = inputs if base.batch_first else [x.transpose(0, 1) for x in inputs]
        else:
            inputs = [x[None] for x in inputs]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        projected = self._project(inputs, sources, adapters)
        heads = (base.num_heads, base.head_dim)
        q, k, v = (x.unflatten(-1, heads).transpose(1, 2) for x in projected)  # B x h x L x d_h
        mask = _additive_mask(attn_mask, key_padding_mask, q)
        attention = None
        if need_weights:
            scores = q @ k.transpose(-1, -2) / math.sqrt(base.head_dim)
            attention = F.dropout((scores if mask is None else scores + mask).softmax(-1), base.dropout, self.training)
            out = attention @ v
            attention = attention.mean(1) if average_attn_weights else attention
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, base.dropout if self.training else 0.0)
        out = base.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], None if attention is None else attention[0]
        return out if base.batch_first else out.transpose(0, 1), attention

    def _project(self, inputs: list[Tensor], sources: list[int], adapters: list[str]) -> list[Tensor]:
        """q, k and v (B x L x d) with the adapters' updates; inputs of one source share the product x U."""
        bias: Any = self.get_base_layer().in_proj_bias
        biases = [None] * 3 if bias is None else bias.chunk(3)
        projected = [F.linear(x, w, b) for x, w, b in zip(inputs, self.base_weights(), biases, strict=True)]
        for adapter in adapters:
            products: dict[tuple[int, str], Tensor] = {}
            for group, first, end in self.slices[adapter].blocks:
                for i in range(first, end):
                    source = (sources[i], group)
                    if source not in products:
                        products[source] = self._product(inputs[i], adapter, group)
                    update = F.linear(products[source], self.modes(adapter, (group, i, i + 1)))
                    projected[i] = projected[i] + update.to(projected[i].dtype)
        return projected

    def base_weights(self) -> list[Tensor]:
        base: Any = self.get_base_layer()
        if base.in_proj_weight is not None:
            return list(base.in_proj_weight.data.chunk(3))
        return [base.q_proj_weight.data, base.k_proj_weight.data, base.v_proj_weight.data]


def _additive_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The two masks of `nn.MultiheadAttention` (True or -inf: don't look) as one that is added to (B, h, L, S) scores."""

    def additive(mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))

    total = None
    if attn_mask is not None:
        total = additive(attn_mask)
        total = total.unflatten(0, q.shape[:2]) if total.dim() == 3 else total
    if key_padding_mask is not None:
        padding = additive(key_padding_mask)[:, None, None, :]
        total = padding if total is None else total + padding
    return total


def scope_of(parent: nn.Module) -> CallScope:
    """The call scope of a module whose children read the same input; its hooks are made with it."""
    scope = parent.__dict__.get("_aurora_mode_approx_scope")
    if scope is None:
        scope = CallScope()
        parent.__dict__["_aurora_mode_approx_scope"] = scope
        parent.__dict__["_aurora_mode_approx_hooks"] = scope.attach(parent)
    return scope


def drop_scope(module: nn.Module) -> None:
    """Remove what `scope_of` has left on a module."""
    for handle in module.__dict__.pop("_aurora_mode_approx_hooks", ()):
        handle.remove()
    module.__dict__.pop("_aurora_mode_approx_scope", None)


def matrix_layers(model: nn.Module, adapter_name: str) -> dict[str, AuroraMatrixLayer]:
    """{module path: layer} of the layers that an adapter acts on."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, AuroraMatrixLayer)}
    return {path: layer for path, layer in layers.items() if adapter_name in layer.slices}
