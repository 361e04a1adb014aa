"""The CP tensor and the layers that it acts on: shared factors, the factored update, merging.

The equations stand in `aurora_mode_approx.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.anatomy import Matrix, device_of, linear_shape
from ..core.parts import AttachedPart, CallScope, MultimodalLayer

# --- the shared factors ----------------------------------------------------------------------------------------------


class AuroraModeApproxLayer(MultimodalLayer):
    """Base of everything that this method puts into a model."""


class SharedFactors(nn.Module, AttachedPart, AuroraModeApproxLayer):
    """U, V and lambda (or the Tucker core) of every adapter and group. It hangs below the model, is visited by PEFT as
    a layer, and is the one place of these parameters: layers look them up at each call."""

    role = ""
    adapter_layer_names = (
        "aurora_mode_approx_U",
        "aurora_mode_approx_V",
        "aurora_mode_approx_lambda_norm",  # Trainer gives names that end in `_norm` no weight decay
        "aurora_mode_approx_core",
    )

    aurora_mode_approx_U: Any  # each {adapter: {group: Parameter}}
    aurora_mode_approx_V: Any
    aurora_mode_approx_lambda_norm: Any
    aurora_mode_approx_core: Any

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        AttachedPart.__init__(self)
        self._model = (model,)  # a tuple is not registered as a child
        self.aurora_mode_approx_U = nn.ModuleDict()
        self.aurora_mode_approx_V = nn.ModuleDict()
        self.aurora_mode_approx_lambda_norm = nn.ModuleDict()
        self.aurora_mode_approx_core = nn.ModuleDict()

    def host(self) -> nn.Module:
        return self._model[0]

    def add(self, adapter_name: str, r: int, core: str, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Create the factors of an adapter of rank r; `shapes` is {group: (d_in, d_out)}."""
        cp = core == "cp"
        draw = {g: torch.randn(d_in, r) / math.sqrt(d_in) for g, (d_in, _) in shapes.items()}
        if not cp:  # the authors' choice: Linear's own initialisation
            draw = {g: torch.empty(d_in, r).uniform_(-1, 1) / math.sqrt(d_in) for g, (d_in, _) in shapes.items()}
        self.aurora_mode_approx_U[adapter_name] = nn.ParameterDict(draw)
        self.aurora_mode_approx_V[adapter_name] = nn.ParameterDict(
            {g: torch.zeros(d_out, r) for g, (_, d_out) in shapes.items()}
        )
        if cp:
            self.aurora_mode_approx_lambda_norm[adapter_name] = nn.ParameterDict({g: torch.ones(r) for g in shapes})
        else:
            cores = {g: nn.init.xavier_uniform_(torch.empty(r, r, r)) for g in shapes}
            self.aurora_mode_approx_core[adapter_name] = nn.ParameterDict(cores)

    def U(self, adapter: str, group: str) -> Tensor:
        """d_in x R."""
        return self.aurora_mode_approx_U[adapter][group]

    def modes(self, adapter: str, group: str, P: Tensor) -> Tensor:
        """V diag(lambda * P_n) (or V G(P_n)^T) for n rows of P, stacked: (n d_out) x R."""
        if adapter in self.aurora_mode_approx_core:
            V = self.aurora_mode_approx_V[adapter][group]
            core = self.aurora_mode_approx_core[adapter][group]
            return torch.einsum("oj,ijk,nk->noi", V, core, P).flatten(0, 1)
        V, c = self.V_and_modes(adapter, group, P)
        return (c[:, None, :] * V).flatten(0, 1)

    def V_and_modes(self, adapter: str, group: str, P: Tensor) -> tuple[Tensor, Tensor]:
        """V (d_out x R) and lambda * P_n (n x R) of a CP core."""
        return self.aurora_mode_approx_V[adapter][group], self.aurora_mode_approx_lambda_norm[adapter][group] * P


class AddUpdate(torch.autograd.Function):
    """y + xu W^T with W = V diag(c_n), stacked over n.

    The sum is made in the matrix product, one pass over y less; and W is made again in the backward pass instead of
    being kept for it: it would cost d_out R numbers a matrix, as much as x U itself for short inputs.

    Shapes: y (M, n d_out), xu (M, R), V (d_out, R), c (n, R).
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, xu: Tensor, V: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(xu, V, c)
        return torch.addmm(y, xu, (c[:, None, :] * V).flatten(0, 1).t().to(xu.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        xu, V, c = ctx.saved_tensors
        grad_xu = grad @ (c[:, None, :] * V).flatten(0, 1).to(grad.dtype) if ctx.needs_input_grad[1] else None
        grad_V = grad_c = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            grad_W = (grad.t() @ xu).to(V.dtype).unflatten(0, (len(c), len(V)))
            grad_V, grad_c = (grad_W * c[:, None, :]).sum(0), (grad_W * V).sum(1)
        return grad if ctx.needs_input_grad[0] else None, grad_xu, grad_V, grad_c


# --- the adapted layers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slices:
    """How one adapter acts on one module: consecutive matrices that share a group of factors form a block."""

    blocks: tuple[tuple[str, int, int], ...]  # (group, first row of P, end)
    rows: tuple[int, int]  # outputs of the module that are updated
    scaling: float
    dropout: float


class AuroraMatrixLayer(nn.Module, AuroraModeApproxLayer):
    """Base of the wrapped layers: P, the factored update and its algebra."""

    adapter_layer_names = ("aurora_mode_approx_P_norm",)
    other_param_names = ("slices",)

    def __init__(self, base_layer: nn.Module, factors: SharedFactors, scope: CallScope | None) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.aurora_mode_approx_P_norm = nn.ParameterDict()
        self.slices: dict[str, Slices] = {}
        self.merged_adapters: list[str] = []
        self.scope = scope
        self.in_features, self.out_features = self.features()
        self._factors = (factors,)  # a reference: in a tuple it is not registered, so it is saved once

    def features(self) -> tuple[int, int]:
        """Widths of what the wrapped module reads and gives, as PEFT's LoRA layers name them."""
        raise NotImplementedError

    @property
    def factors(self) -> SharedFactors:
        return self._factors[0]

    def update_layer(
        self,
        adapter_name: str,
        matrices: list[Matrix],
        groups: list[str],
        r: int,
        core: str,
        scaling: float,
        dropout: float,
    ) -> None:
        """Let an adapter act on the module's matrices, each by the factors of its group."""
        starts = [i for i, g in enumerate(groups) if i == 0 or g != groups[i - 1]]
        blocks = tuple((groups[a], a, b) for a, b in zip(starts, [*starts[1:], len(groups)], strict=True))
        rows = (matrices[0].rows[0], matrices[-1].rows[1])
        self.slices[adapter_name] = Slices(blocks, rows, scaling, dropout)
        P = torch.randn(len(matrices), r)
        if core == "tucker":
            nn.init.xavier_uniform_(P)
        self.aurora_mode_approx_P_norm[adapter_name] = nn.Parameter(P)
        self._move_adapter_to_device_of_base_layer(adapter_name)

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
            parts = [F.linear(self.product(x, adapter, b[0]), self.modes(adapter, b)) for b in blocks]
            return y + torch.cat(parts, dim=-1).to(y.dtype)
        xu = self.product(x, adapter, blocks[0][0])
        if adapter in self.factors.aurora_mode_approx_core or xu.dtype != y.dtype:
            return y + F.linear(xu, self.modes(adapter, blocks[0])).to(y.dtype)
        V, c = self.factors.V_and_modes(adapter, blocks[0][0], self._rows(adapter, blocks[0]))
        flat = AddUpdate.apply(y.reshape(-1, y.shape[-1]), xu.reshape(-1, xu.shape[-1]), V, c)
        return flat.view(y.shape)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The whole update dW, d_out x d_in, by tensorly's algebra: for merging and inspection, never in training."""
        return torch.cat([d for block in self.slices[adapter].blocks for d in self._delta_block(adapter, block)])

    @torch.no_grad()
    def _delta_block(self, adapter: str, block: tuple[str, int, int]) -> Tensor:
        import tensorly as tl
        from tensorly.cp_tensor import cp_to_tensor

        group, first, end = block
        factors, scale = self.factors, self.slices[adapter].scaling
        dtype = torch.promote_types(factors.U(adapter, group).dtype, torch.float32)
        U, V = factors.U(adapter, group).to(dtype), factors.aurora_mode_approx_V[adapter][group].to(dtype)
        P = self.aurora_mode_approx_P_norm[adapter][first:end].to(dtype)
        with pytorch_backend():
            if adapter in factors.aurora_mode_approx_core:
                core = factors.aurora_mode_approx_core[adapter][group].to(dtype)
                core = scale * tl.tenalg.mode_dot(core.permute(2, 1, 0), P, mode=0)  # n x j x i
                return tl.tenalg.multi_mode_dot(core, [V, U], modes=[1, 2])
            lam = factors.aurora_mode_approx_lambda_norm[adapter][group].to(dtype)
            return cp_to_tensor((scale * lam, [P, V, U]))

    def _weights(self) -> list[Tensor]:
        """Views of the base weight as d_out x d_in, in the order of the delta's rows."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add dW of the adapters to the base weight.

        Args:
            safe_merge: Check the result before the weight is touched; raises ValueError if it isn't finite.
            adapter_names: Default: the active ones.
        """
        if safe_merge:
            self.check_merge(adapter_names)
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.slices:
                for weight, part in self._weights_and_updates(adapter):
                    weight += part
                self.merged_adapters.append(adapter)

    @torch.no_grad()
    def check_merge(self, adapter_names: list[str] | None) -> None:
        """Raise ValueError if merging would give weights that aren't finite; the weights are not touched."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            for weight, part in self._weights_and_updates(adapter) if adapter in self.slices else ():
                if not bool(torch.isfinite(weight + part).all()):
                    raise ValueError(
                        f"Merging adapter {adapter!r} would give NaN or infinite weights ({self.role}); nothing was merged."
                    )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged updates out of the base weight again."""
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            for weight, part in self._weights_and_updates(adapter) if adapter in self.slices else ():
                weight -= part

    def _weights_and_updates(self, adapter: str) -> list[tuple[Tensor, Tensor]]:
        """Each base weight (a view) with its part of dW, on its device and in its dtype."""
        weights = self._weights()
        parts = self.get_delta_weight(adapter).split([w.shape[0] for w in weights])
        return [(w, p.to(w.device, w.dtype)) for w, p in zip(weights, parts, strict=True)]

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

    def features(self) -> tuple[int, int]:
        return linear_shape(self.get_base_layer())

    def _weights(self) -> list[Tensor]:
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
        q, k, v = (
            x.unflatten(-1, (base.num_heads, base.head_dim)).transpose(1, 2) for x in projected
        )  # B x h x L x d_h
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
        projected = [F.linear(x, w, b) for x, w, b in zip(inputs, self._weights(), biases, strict=True)]
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

    def features(self) -> tuple[int, int]:
        base: Any = self.get_base_layer()
        return base.embed_dim, 3 * base.embed_dim

    def _weights(self) -> list[Tensor]:
        base: Any = self.get_base_layer()
        if base.in_proj_weight is not None:
            return list(base.in_proj_weight.data.chunk(3))
        return [base.q_proj_weight.data, base.k_proj_weight.data, base.v_proj_weight.data]


def _additive_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The two masks of `nn.MultiheadAttention` (True or -inf: don't look) as one that is added to (B, h, L, S) scores."""

    def additive(mask: Tensor) -> Tensor:
        return (
            torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else mask
        )

    total = None
    if attn_mask is not None:
        total = additive(attn_mask)
        total = total.unflatten(0, q.shape[:2]) if total.dim() == 3 else total
    if key_padding_mask is not None:
        padding = additive(key_padding_mask)[:, None, None, :]
        total = padding if total is None else total + padding
    return total


@contextmanager
def pytorch_backend() -> Iterator[None]:
    """tensorly on PyTorch tensors in this thread; unlike tensorly's own context, the process's default is left alone."""
    import tensorly as tl

    before = tl.get_backend()
    tl.set_backend("pytorch", local_threadsafe=True)
    try:
        yield
    finally:
        tl.set_backend(before, local_threadsafe=True)


# --- groups and scopes ----------------------------------------------------------------------------------------------


def group_of(share: str, matrix: Matrix) -> str:
    """Name of the factors that a matrix uses, by what shares them."""
    shape = f"{matrix.d_in}x{matrix.d_out}"
    if share == "none":
        return matrix.role.replace(".", "-")
    return f"{matrix.tower}-{shape}" if share == "per_modality" else shape


def scope_of(parent: nn.Module) -> CallScope:
    """The call scope of a module whose children read the same input; its hooks are made with it."""
    scope = parent.__dict__.get("_aurora_mode_approx_scope")
    if scope is None:
        scope = CallScope()
        parent.__dict__["_aurora_mode_approx_scope"] = scope
        parent.__dict__["_aurora_mode_approx_hooks"] = scope.attach(parent)
    return scope


def drop_scope(module: nn.Module) -> None:
    for handle in module.__dict__.pop("_aurora_mode_approx_hooks", ()):
        handle.remove()
    module.__dict__.pop("_aurora_mode_approx_scope", None)
