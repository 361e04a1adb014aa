"""AuroraModeApprox: one CP tensor updates every attention of every modality (Wang et al., arXiv 2305.08381).

The updates of N frozen matrices W_n are the slices of one third-order tensor in CP form,

    dW_n = s V diag(lambda * P_n) U^T            U: d_in x R,  V: d_out x R,  lambda: R,  P: N x R

so the whole network shares U, V and lambda, and a matrix owns R numbers. In the forward pass nothing of size
d_out x d_in is made:

    y = W_n x + b + (drop(x U)) (s V diag(lambda * P_n))^T

At the start V = 0, hence y is the frozen model's. Matrices of equal shape share a group of factors (`share`). The q, k
and v of one attention read the same x, and share the product x U.

Two parts serve models with a fusion encoder (BLIP and its like); both are the identity at the start:

    gated query transformation      y' = y + tanh(g) ((1 + s_q) q + b_q)        q: the layer's self-attention output
    informative context enhancement F' = F + gamma softmax(F T^T / sqrt(d)) T   T: a bank of text features

The paper adds a mean of the batch's captions to matched pairs alone, which tells the matching head the label; here every
fused feature of every pair reads the same bank, which is kept with the adapter, so a pair's score doesn't depend on
its batch. `core="tucker"` gives the form of the authors' released code, dW_n = s V G(P_n)^T U^T with
G(c)_ij = sum_k C_ijk c_k.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import PeftType
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..anatomy import Anatomy, Matrix, is_cross, unwrap
from ..registry import register
from ..tuner import AttachedPart, CallScope, MultimodalConfig, MultimodalLayer, MultimodalTuner

SHARES = ("per_shape", "global", "per_modality", "none")


@dataclass
class AuroraModeApproxConfig(MultimodalConfig):
    """Configuration of [`AuroraModeApproxModel`].

    Args:
        r: Rank R of the CP tensor.
        alpha: The update is scaled by s = alpha / r; None means alpha = r, that is s = 1.
        dropout: Probability of dropping an entry of x U in training.
        share: Which matrices share U, V and lambda. "per_shape": those of equal (d_in, d_out). "global": all, an error
            where shapes differ. "per_modality": those of one tower and shape. "none": each has its own.
        core: "cp", or "tucker" for the form of the authors' released code (R^3 more parameters a group).
        init_weights: "gauss" draws U ~ N(0, 1/d_in) and P ~ N(0, 1); "inherit" takes U and P from a CP decomposition
            of the frozen weights. V is 0 either way.
        use_gqt: Add the gated query transformation to every layer with self- and cross-attention.
        gqt_branches: "query" (the paper's) and/or "cross" (the authors' code also adds the cross-attention's output).
        use_ice: Add the informative context enhancement to a text encoder that runs with and without the picture.
        ice_bank_size: Number of text features in the bank (first in, first out).
        target_modules: None takes q, k and v of every attention in the chosen towers.

    The other arguments are those of [`MultimodalConfig`].
    """

    r: int = 64
    alpha: float | None = None
    dropout: float = 0.1
    share: str = "per_shape"
    core: str = "cp"
    init_weights: str = "gauss"
    use_gqt: bool = False
    gqt_branches: list[str] | None = None
    use_ice: bool = False
    ice_bank_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("AURORA_MODE_APPROX")
        self.check_number("r", 1, integer=True)
        self.check("alpha", "a positive number or None", lambda v: v is None or (type(v) in (int, float) and v > 0))
        self.check_number("dropout", 0, 0.999)
        self.check_choice("share", SHARES)
        self.check_choice("core", ("cp", "tucker"))
        self.check_choice("init_weights", ("gauss", "inherit"))
        self.check_flag("use_gqt")
        self.check_flag("use_ice")
        self.gqt_branches = self.gqt_branches or ["query"]
        self.check("gqt_branches", "a list of 'query' and/or 'cross'", lambda v: v and set(v) <= {"query", "cross"})
        self.check_number("ice_bank_size", 1, integer=True)

    @property
    def scaling(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.r


# --- the shared factors ----------------------------------------------------------------------------------------------


class AuroraModeApproxLayer(MultimodalLayer):
    """Base of everything that this method puts into a model."""


class SharedFactors(AttachedPart, AuroraModeApproxLayer, nn.Module):
    """U, V and lambda (or the Tucker core) of every adapter and group. It hangs below the model, is visited by PEFT as
    a layer, and is the one place of these parameters: layers look them up at each call."""

    role = ""
    adapter_layer_names = (
        "aurora_mode_approx_U",
        "aurora_mode_approx_V",
        "aurora_mode_approx_lambda_norm",  # Trainer gives names that end in `_norm` no weight decay
        "aurora_mode_approx_core",
    )

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

    def add(self, adapter_name: str, config: AuroraModeApproxConfig, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Create the factors of an adapter; `shapes` is {group: (d_in, d_out)}."""
        r, cp = config.r, config.core == "cp"
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
        return self.aurora_mode_approx_U[adapter][group]  # type: ignore[index]

    def modes(self, adapter: str, group: str, P: Tensor) -> Tensor:
        """V diag(lambda * P_n) (or V G(P_n)^T) for n rows of P, stacked: (n d_out) x R."""
        V = self.aurora_mode_approx_V[adapter][group]  # type: ignore[index]
        if adapter in self.aurora_mode_approx_core:
            core = self.aurora_mode_approx_core[adapter][group]  # type: ignore[index]
            return torch.einsum("oj,ijk,nk->noi", V, core, P).flatten(0, 1)
        lam = self.aurora_mode_approx_lambda_norm[adapter][group]  # type: ignore[index]
        return ((lam * P)[:, None, :] * V).flatten(0, 1)


# --- the adapted layers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slices:
    """How one adapter acts on one module: consecutive matrices that share a group of factors form a block."""

    blocks: tuple[tuple[str, int, int], ...]  # (group, first row of P, end)
    rows: tuple[int, int]  # outputs of the module that are updated
    scaling: float
    dropout: float


class AuroraMatrixLayer(AuroraModeApproxLayer, nn.Module):
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
        self._factors = (factors,)  # a reference: in a tuple it is not registered, so it is saved once

    @property
    def factors(self) -> SharedFactors:
        return self._factors[0]

    def update_layer(self, adapter_name: str, config: AuroraModeApproxConfig, matrices: list[Matrix]) -> None:
        groups = [_group(config, m) for m in matrices]
        starts = [i for i, g in enumerate(groups) if i == 0 or g != groups[i - 1]]
        blocks = tuple((groups[a], a, b) for a, b in zip(starts, [*starts[1:], len(groups)], strict=True))
        rows = (matrices[0].rows[0], matrices[-1].rows[1])
        self.slices[adapter_name] = Slices(blocks, rows, config.scaling, config.dropout)
        P = torch.randn(len(matrices), config.r)
        if config.core == "tucker":
            nn.init.xavier_uniform_(P)
        self.aurora_mode_approx_P_norm[adapter_name] = nn.Parameter(P)
        self._move_adapter_to_device_of_base_layer(adapter_name)

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
        group, first, end = block
        scale = self.slices[adapter].scaling
        P = self.aurora_mode_approx_P_norm[adapter][first:end]
        return self.factors.modes(adapter, group, P if scale == 1.0 else scale * P)

    def add_update(self, y: Tensor, x: Tensor, adapter: str) -> Tensor:
        """y + s ((x U) * lambda * P) V^T, in y's dtype."""
        blocks = self.slices[adapter].blocks
        if len(blocks) > 1:
            parts = [F.linear(self.product(x, adapter, b[0]), self.modes(adapter, b)) for b in blocks]
            return y + torch.cat(parts, dim=-1).to(y.dtype)
        xu, W = self.product(x, adapter, blocks[0][0]), self.modes(adapter, blocks[0])
        if xu.dtype != y.dtype:
            return y + F.linear(xu, W).to(y.dtype)
        # The sum is made in the matrix product: one pass over y less.
        return torch.addmm(y.reshape(-1, y.shape[-1]), xu.reshape(-1, xu.shape[-1]), W.t()).view(y.shape)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The whole update dW, d_out x d_in, by tensorly's algebra: for merging and inspection, never in training."""
        return torch.cat([d for block in self.slices[adapter].blocks for d in self._delta_block(adapter, block)])

    @torch.no_grad()
    def _delta_block(self, adapter: str, block: tuple[str, int, int]) -> Tensor:
        import tensorly as tl
        from tensorly.cp_tensor import cp_to_tensor

        group, first, end = block
        factors, scale = self.factors, self.slices[adapter].scaling
        U = factors.U(adapter, group).float()
        P = self.aurora_mode_approx_P_norm[adapter][first:end].float()
        V = factors.aurora_mode_approx_V[adapter][group].float()  # type: ignore[index,operator]
        with tl.backend_context("pytorch", local_threadsafe=True):
            if adapter in factors.aurora_mode_approx_core:
                core = factors.aurora_mode_approx_core[adapter][group].float()  # type: ignore[index,operator]
                core = scale * tl.tenalg.mode_dot(core.permute(2, 1, 0), P, mode=0)  # n x j x i
                return tl.tenalg.multi_mode_dot(core, [V, U], modes=[1, 2])
            lam = factors.aurora_mode_approx_lambda_norm[adapter][group].float()  # type: ignore[index,operator]
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
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.slices:
                continue
            weights = self._weights()
            delta = self.get_delta_weight(adapter).to(weights[0].device)
            if safe_merge and not all(
                torch.isfinite(w + d.to(w.dtype)).all()
                for w, d in zip(weights, self._split(delta, weights), strict=True)
            ):
                raise ValueError(
                    f"Merging adapter {adapter!r} would give NaN or infinite weights; nothing was merged here."
                )
            for weight, part in zip(weights, self._split(delta, weights), strict=True):
                weight += part.to(weight.dtype)
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged updates out of the base weight again."""
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.slices:
                weights = self._weights()
                delta = self.get_delta_weight(adapter).to(weights[0].device)
                for weight, part in zip(weights, self._split(delta, weights), strict=True):
                    weight -= part.to(weight.dtype)

    @staticmethod
    def _split(delta: Tensor, weights: list[Tensor]) -> Iterable[Tensor]:
        return delta.split([w.shape[0] for w in weights])

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

    def _weights(self) -> list[Tensor]:
        base = self.get_base_layer()
        if not base.weight.is_floating_point() or base.weight.shape.numel() != math.prod(_shape(base)):
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
        """As `nn.MultiheadAttention`; shapes (B, L, d) if `batch_first` else (L, B, d)."""
        adapters, base = self.acting(), self.get_base_layer()
        if not adapters:
            return self.base_layer(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        weights = self._weights()
        biases = [None] * 3 if base.in_proj_bias is None else base.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        for adapter in adapters:
            for group, first, end in self.slices[adapter].blocks:
                for i in range(first, end):
                    x, W = (query, key, value)[i], self.modes(adapter, (group, i, i + 1))
                    update = F.linear(self.product(x, adapter, group), W).to(q.dtype)
                    q, k, v = q + update * (i == 0), k + update * (i == 1), v + update * (i == 2)
        if not base.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        heads = (base.num_heads, base.head_dim)
        q, k, v = (x.unflatten(-1, heads).transpose(1, 2) for x in (q, k, v))  # B x h x L x d_h
        mask = _additive_mask(attn_mask, key_padding_mask, q)
        attention = None
        if need_weights:
            scores = q @ k.transpose(-1, -2) / math.sqrt(base.head_dim)
            attention = F.dropout((scores if mask is None else scores + mask).softmax(-1), base.dropout, self.training)
            out = attention @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, base.dropout if self.training else 0.0)
        out = base.out_proj(out.transpose(1, 2).flatten(2))
        out = out if base.batch_first else out.transpose(0, 1)
        return out, attention.mean(1) if attention is not None and average_attn_weights else attention

    def _weights(self) -> list[Tensor]:
        base = self.get_base_layer()
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


# --- the fusion encoder's parts --------------------------------------------------------------------------------------


class GatedQueryTransformation(AttachedPart, AuroraModeApproxLayer, nn.Module):
    """y' = y + tanh(g) ((1 + s_q) q + b_q), q the output of the layer's self-attention block (B x L x d).

    Acts when the layer's cross-attention ran. Everything happens in hooks of the layer, hence inside the region that
    gradient checkpointing recomputes. 2 d + 1 parameters a branch.
    """

    adapter_layer_names = ("aurora_mode_approx_gqt",)

    def __init__(self, layer: nn.Module, path: str, attentions: list[str], role: str) -> None:
        nn.Module.__init__(self)
        AttachedPart.__init__(self)
        self.role = role
        self.aurora_mode_approx_gqt = nn.ModuleDict()
        self.scope = CallScope()
        self._layer = (layer,)
        blocks = {is_cross(a): a.removeprefix(path + ".").partition(".")[0] for a in attentions}
        opening, closing = self.scope.attach(layer)
        self.hooks = [
            opening,
            layer.get_submodule(blocks[False]).register_forward_hook(self._keep_query),
            layer.get_submodule(blocks[True]).register_forward_hook(self._keep_cross),
            closing,
        ]
        # After the closing hook was registered: PyTorch calls hooks in their order, so put this one first.
        self.hooks.append(layer.register_forward_hook(self._inject, prepend=True))

    def host(self) -> nn.Module:
        return self._layer[0]

    def add(self, adapter_name: str, branches: list[str], width: int) -> None:
        parameters = {}
        for branch in branches:
            parameters[f"{branch}_gate_norm"] = torch.zeros(())
            parameters[f"{branch}_scale_norm"] = torch.zeros(width)
            parameters[f"{branch}_shift_norm"] = torch.zeros(width)
        self.aurora_mode_approx_gqt[adapter_name] = nn.ParameterDict(parameters)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _keep_query(self, module: nn.Module, args: Any, output: Any) -> None:
        self.scope.values["query"] = output[0] if isinstance(output, tuple) else output

    def _keep_cross(self, module: nn.Module, args: Any, output: Any) -> None:
        self.scope.values["cross"] = output[0] if isinstance(output, tuple) else output

    def _inject(self, layer: nn.Module, args: Any, output: Any) -> Any:
        adapters = self.live_adapters()
        if not adapters or "cross" not in self.scope.values:  # text alone: nothing is fused
            return output
        y = output[0] if isinstance(output, tuple) else output
        for adapter in adapters:
            parameters = self.aurora_mode_approx_gqt[adapter]
            for branch in ("query", "cross"):
                if f"{branch}_gate_norm" in parameters:
                    gate, scale, shift = (parameters[f"{branch}_{n}_norm"] for n in ("gate", "scale", "shift"))
                    kept = self.scope.values[branch].to(scale.dtype)
                    y = y + (torch.tanh(gate) * ((1 + scale) * kept + shift)).to(y.dtype)
        return (y, *output[1:]) if isinstance(output, tuple) else y


class ContextBank(nn.Module):
    """gamma and the K latest text features (K x d, zeros until filled) of one adapter."""

    texts: Tensor
    count: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.gamma_norm = nn.Parameter(torch.zeros(()))
        self.register_buffer("texts", torch.zeros(size, width))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, features: Tensor) -> None:
        """Put B x d features in, the oldest fall out."""
        size = len(self.texts)
        features = features[-size:].to(self.texts.dtype)
        self.texts.copy_(torch.cat([features, self.texts])[:size])
        self.count.add_(len(features)).clamp_(max=size)

    def context(self, fused: Tensor) -> Tensor:
        """gamma softmax(F T^T / sqrt(d)) T for F of shape (..., d); zero while the bank is empty."""
        texts = self.texts.to(fused.dtype)
        scores = fused @ texts.t() / math.sqrt(fused.shape[-1])
        empty = torch.arange(len(texts), device=fused.device) >= self.count
        return self.gamma_norm.to(fused.dtype) * (
            scores.masked_fill(empty, torch.finfo(scores.dtype).min).softmax(-1) @ texts
        )


class InformativeContext(AttachedPart, AuroraModeApproxLayer, nn.Module):
    """F' = F + gamma softmax(F T^T / sqrt(d)) T on every fused token of a text encoder.

    In training, calls of the encoder without a picture fill the bank with their first tokens' states (detached);
    retrieval training makes such calls for its contrastive loss. Elsewhere call `collect_context`.
    """

    adapter_layer_names = ("aurora_mode_approx_ice",)

    def __init__(self, encoder: nn.Module, role: str) -> None:
        nn.Module.__init__(self)
        AttachedPart.__init__(self)
        self.role = role
        self.aurora_mode_approx_ice = nn.ModuleDict()
        self._encoder = (encoder,)
        self._position = list(inspect.signature(encoder.forward).parameters).index("encoder_hidden_states")
        self.hooks = [encoder.register_forward_hook(self._enhance, with_kwargs=True)]

    def host(self) -> nn.Module:
        return self._encoder[0]

    def add(self, adapter_name: str, size: int, width: int) -> None:
        self.aurora_mode_approx_ice[adapter_name] = ContextBank(size, width)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _enhance(self, encoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        adapters = self.live_adapters()
        if not adapters:
            return output
        picture = kwargs.get("encoder_hidden_states")
        picture = args[self._position] if picture is None and len(args) > self._position else picture
        fused = output[0]
        for adapter in adapters:
            bank = self.aurora_mode_approx_ice[adapter]
            if picture is None:
                if self.training:
                    bank.push(fused[:, 0].detach())
            else:
                fused = fused + bank.context(fused)
        if picture is None:
            return output
        if isinstance(output, tuple):
            return (fused, *output[1:])
        output["last_hidden_state"] = fused
        return output


# --- the model -------------------------------------------------------------------------------------------------------


class AuroraModeApproxModel(MultimodalTuner):
    """Adapts a vision-language model with one CP tensor for all its attentions (arXiv 2305.08381).

    Parameters: (d_in + d_out) R + N R + R a group of N matrices of equal shape; 2 d + 1 a layer and branch for the
    gated query transformation; 1 for the context enhancement.

    Example:
        >>> import peft_multimodal
        >>> from peft import get_peft_model
        >>> from transformers import CLIPModel
        >>> clip = CLIPModel.from_pretrained("openai/clip-vit-base-patch32")
        >>> model = get_peft_model(clip, peft_multimodal.AuroraModeApproxConfig(r=64))
    """

    prefix = "aurora_mode_approx_"
    tuner_layer_cls = AuroraModeApproxLayer

    @classmethod
    def default_targets(cls, config: AuroraModeApproxConfig, found: Anatomy) -> list[Matrix]:
        return [m for m in found.matrices if m.letter in ("q", "k", "v", "qkv")]

    def check_model(self, config: AuroraModeApproxConfig, matrices: list[Matrix], found: Anatomy) -> None:
        shapes = sorted({(m.d_in, m.d_out) for m in matrices})
        if config.share == "global" and len(shapes) > 1:
            raise ValueError(
                f"share='global' needs one shape, but the matched matrices have {len(shapes)} (d_in, d_out): {shapes}. Use "
                "share='per_shape', or restrict towers= or target_modules=."
            )
        towers = sorted({m.tower for m in matrices})
        self._gqt_layers = [p for p in found.fusion_layers if _tower(p, found) in (config.towers or _tower(p, found))]
        if config.use_gqt and not self._gqt_layers:
            raise ValueError(
                f"use_gqt=True needs layers with a self- and a cross-attention (a fusion encoder such as BLIP's or a "
                f"Q-Former); {found.model_class} has none in its towers {towers}. Leave use_gqt off."
            )
        self._ice_encoder = next(
            (t.path for t in found.towers if t.name == "text" and _fuses(self.model, t.path)), None
        )
        if config.use_ice and self._ice_encoder is None:
            raise ValueError(
                "use_ice=True needs a fusion encoder that runs with and without the picture, as BLIP's text encoder does; "
                f"{found.model_class} has none. Leave use_ice off."
            )
        self._found = found

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, current_key: str,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        factors = self._prepare_factors(peft_config, adapter_name)
        matrices = self._matched[current_key]
        if isinstance(target, AuroraMatrixLayer):
            target.update_layer(adapter_name, peft_config, matrices)
            return
        base = unwrap(target)
        scope = _scope_of(parent)
        if isinstance(base, nn.MultiheadAttention):
            if base.bias_k is not None or base.add_zero_attn:
                raise ValueError(
                    f"{current_key}: nn.MultiheadAttention with add_bias_kv or add_zero_attn isn't supported."
                )
            layer: AuroraMatrixLayer = AuroraMultiheadAttention(target, factors, None)
        else:
            layer = AuroraLinear(target, factors, scope)
        letters = "".join(m.letter for m in matrices)
        layer.role = matrices[0].role.replace(f".{matrices[0].letter}.", f".{letters}.")
        layer.update_layer(adapter_name, peft_config, matrices)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _prepare_factors(self, config: AuroraModeApproxConfig, adapter_name: str) -> SharedFactors:
        """The store of shared factors, with those (and the fusion parts) of this adapter."""
        name = "aurora_mode_approx_shared"
        if not hasattr(self.model, name):
            self.model.add_module(name, SharedFactors(self.model))
        factors = self.model.get_submodule(name)
        if adapter_name not in factors.aurora_mode_approx_U:
            matrices = [m for found in self._matched.values() for m in found]
            factors.add(adapter_name, config, {_group(config, m): (m.d_in, m.d_out) for m in matrices})
            factors._move_adapter_to_device_of_base_layer(adapter_name)
            if config.use_gqt:
                self._add_gqt(config, adapter_name)
            if config.use_ice:
                self._add_ice(config, adapter_name)
        return factors

    def _add_gqt(self, config: AuroraModeApproxConfig, adapter_name: str) -> None:
        attentions = {m.module.rpartition(".")[0] for m in self._found.matrices if m.letter == "q"}
        for index, path in enumerate(self._gqt_layers):
            layer = self.model.get_submodule(path)
            inside = [a for a in attentions if a.startswith(path + ".")]
            if not hasattr(layer, "aurora_mode_approx_gqt"):
                role = f"{_tower(path, self._found)}.gqt.{index}"
                layer.add_module("aurora_mode_approx_gqt", GatedQueryTransformation(layer, path, inside, role))
            width = next(m.d_in for m in self._found.matrices if m.letter == "q" and m.module.startswith(path + "."))
            layer.aurora_mode_approx_gqt.add(adapter_name, config.gqt_branches, width)

    def _add_ice(self, config: AuroraModeApproxConfig, adapter_name: str) -> None:
        encoder = self.model.get_submodule(self._ice_encoder)
        if not hasattr(encoder, "aurora_mode_approx_ice"):
            encoder.add_module("aurora_mode_approx_ice", InformativeContext(encoder, "fusion.ice"))
        width = next(t.hidden_size for t in self._found.towers if t.path == self._ice_encoder)
        encoder.aurora_mode_approx_ice.add(adapter_name, config.ice_bank_size, width)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        if config.init_weights == "inherit" and not config.inference_mode and not kwargs.get("low_cpu_mem_usage"):
            self._inherit(adapter_name)

    # --- tensorly's algebra, outside the training step ---------------------------------------------------------------

    def matrix_layers(self, adapter_name: str) -> dict[str, AuroraMatrixLayer]:
        """{module path: layer} of the layers that the adapter acts on."""
        return {
            path: m
            for path, m in self.model.named_modules()
            if isinstance(m, AuroraMatrixLayer) and adapter_name in m.slices
        }

    def _stacks(self, adapter_name: str, weights: Mapping[str, Tensor]) -> Iterable[tuple[str, list, Tensor]]:
        """For every group of factors: its name, the owning (path, layer, rows of P) and the stack N x d_out x d_in."""
        members: dict[str, list[tuple[str, AuroraMatrixLayer, int]]] = defaultdict(list)
        slabs: dict[str, list[Tensor]] = defaultdict(list)
        for path, layer in self.matrix_layers(adapter_name).items():
            start = 0
            for group, first, end in layer.slices[adapter_name].blocks:
                rows = len(layer.factors.aurora_mode_approx_V[adapter_name][group])  # type: ignore[index,arg-type]
                for index in range(first, end):
                    members[group].append((path, layer, index))
                    slabs[group].append(weights[path][start : start + rows].float())
                    start += rows
        for group, found in members.items():
            yield group, found, torch.stack(slabs[group])

    @torch.no_grad()
    def _inherit(self, adapter_name: str) -> None:
        """U and P from a CP decomposition of the frozen weights; V stays 0, so that the outputs do too."""
        config = self.peft_config[adapter_name]
        weights = {p: torch.cat(layer._weights()) for p, layer in self.matrix_layers(adapter_name).items()}
        for group, members, stack in self._stacks(adapter_name, weights):
            _, (P, _, U) = _parafac(stack, config.r, iterations=10)
            factors = members[0][1].factors
            factors.U(adapter_name, group).copy_(U / U.norm(dim=0) * math.sqrt(1 / config.r))
            for (_, layer, index), row in zip(members, P / P.std(), strict=True):
                layer.aurora_mode_approx_P_norm[adapter_name][index].copy_(row)

    @classmethod
    @torch.no_grad()
    def from_lora(
        cls,
        model: PeftModel,
        config: AuroraModeApproxConfig | None = None,
        adapter_name: str = "default",
        iterations: int = 100,
    ) -> tuple[PeftModel, dict[str, float]]:
        """Compress a trained LoRA into CP factors.

        Args:
            model: A PeftModel with a LoRA adapter `adapter_name`. Its LoRA layers are taken out.
            config: Rank and sharing of the result; the target modules are the LoRA's.
            iterations: Of alternating least squares (tensorly's `parafac`).

        Returns:
            The base model with an Aurora adapter of the same name, and {module: relative error
            ||dW_lora - dW_cp|| / ||dW_lora||}.
        """
        deltas = {
            path: module.get_delta_weight(adapter_name)
            for path, module in model.get_base_model().named_modules()
            if hasattr(module, "lora_A") and adapter_name in module.lora_A
        }
        if not deltas:
            raise ValueError(f"The model has no LoRA adapter {adapter_name!r} on linear layers.")
        if any(isinstance(unwrap(model.get_base_model().get_submodule(p)), Conv1D) for p in deltas):
            deltas = {
                p: d.t() if isinstance(unwrap(model.get_base_model().get_submodule(p)), Conv1D) else d
                for p, d in deltas.items()
            }
        config = copy.copy(config) if config is not None else AuroraModeApproxConfig()
        config.target_modules, config.alpha = sorted(deltas), None
        compressed = get_peft_model(model.unload(), config, adapter_name=adapter_name)
        tuner = compressed.base_model
        for group, members, stack in tuner._stacks(adapter_name, deltas):
            weights, (P, V, U) = _parafac(stack, config.r, iterations)
            factors = members[0][1].factors
            factors.U(adapter_name, group).copy_(U)
            factors.aurora_mode_approx_V[adapter_name][group].copy_(V)
            factors.aurora_mode_approx_lambda_norm[adapter_name][group].copy_(weights)
            for (_, layer, index), row in zip(members, P, strict=True):
                layer.aurora_mode_approx_P_norm[adapter_name][index].copy_(row)
        errors = {}
        for path, layer in tuner.matrix_layers(adapter_name).items():
            delta = deltas[path].float()
            errors[path] = float((layer.get_delta_weight(adapter_name) - delta).norm() / delta.norm().clamp_min(1e-12))
        return compressed, errors

    @torch.no_grad()
    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add an adapter whose update is exactly sum_a weights[a] dW_a: factors side by side, rank sum of ranks.

        Raises:
            ValueError: the adapters differ in matched modules or sharing, have a Tucker core, or parts that are no
                weight updates (GQT, ICE).
        """
        configs = [self.peft_config[a] for a in adapters]
        if len(adapters) != len(weights) or not adapters or adapter_name in self.peft_config:
            raise ValueError("add_weighted_adapter takes as many weights as adapters, at least one, and a new name.")
        layers = [self.matrix_layers(a) for a in adapters]
        same = all(
            found.keys() == layers[0].keys()
            and all(found[p].slices[a].blocks == layers[0][p].slices[adapters[0]].blocks for p in found)
            for a, found in zip(adapters, layers, strict=True)
        )
        if not same or any(c.core != "cp" or c.use_gqt or c.use_ice for c in configs):
            raise ValueError(
                "Only CP adapters over the same modules with the same sharing can be added up, and without GQT or ICE, "
                "which are no weight updates."
            )
        config = copy.deepcopy(configs[0])
        config.r, config.alpha, config.init_weights = sum(c.r for c in configs), None, "gauss"
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        factors = self.model.aurora_mode_approx_shared
        for group in factors.aurora_mode_approx_U[adapter_name]:
            for name in ("U", "V", "lambda_norm"):
                store = getattr(factors, f"aurora_mode_approx_{name}")
                parts = [store[a][group] for a in adapters]
                if name == "lambda_norm":
                    parts = [p * w * c.scaling for p, w, c in zip(parts, weights, configs, strict=True)]
                store[adapter_name][group].copy_(torch.cat(parts, dim=-1))
        for layer in layers[0].values():
            P = layer.aurora_mode_approx_P_norm
            P[adapter_name].copy_(torch.cat([P[a] for a in adapters], dim=-1))

    # --- merging -----------------------------------------------------------------------------------------------------

    def _refuse_merge(self, adapter_names: list[str] | None, cp_only: bool, then: str) -> None:
        for name in adapter_names or self.active_adapters:
            config = self.peft_config[name]
            if not cp_only and (config.use_gqt or config.use_ice):
                raise ValueError(
                    f"Adapter {name!r} has {'GQT' if config.use_gqt else ''}{' and ' if config.use_gqt and config.use_ice else ''}"
                    f"{'ICE' if config.use_ice else ''}, which are no weight updates and can't be merged. Keep the adapter, or "
                    f"merge the CP part alone with cp_only=True ({then})."
                )

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, cp_only: bool = False
    ) -> None:
        """Add the updates to the base weights; with `cp_only=True` GQT and ICE go on acting as they are."""
        self._refuse_merge(adapter_names, cp_only, "GQT and ICE go on acting")
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        cp_only: bool = False,
    ) -> nn.Module:
        """The base model with the updates in its weights; with `cp_only=True` GQT and ICE are dropped."""
        self._refuse_merge(adapter_names, cp_only, "GQT and ICE are dropped")
        return super().merge_and_unload(progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        for module in self.model.modules():
            _drop_scope(module)
        return super()._unload_and_optionally_merge(*args, **kwargs)

    @torch.no_grad()
    def collect_context(self, batches: Iterable[Mapping[str, Tensor]]) -> int:
        """Fill the context bank of the active adapter by running the text encoder on text alone.

        Args:
            batches: Tokenised texts, each a mapping with `input_ids` and `attention_mask` (B x L).

        Returns:
            The number of features in the bank.
        """
        part = next((p for _, _, p in self.attached_parts() if isinstance(p, InformativeContext)), None)
        if part is None:
            raise ValueError("No adapter of this model has use_ice=True.")
        encoder = part.host()
        for batch in batches:
            device = next(encoder.parameters()).device
            out = encoder(batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))
            for adapter in part.live_adapters():
                if not encoder.training:  # in training the hook has pushed them already
                    part.aurora_mode_approx_ice[adapter].push(out[0][:, 0])
        return max((int(part.aurora_mode_approx_ice[a].count) for a in part.live_adapters()), default=0)


def _group(config: AuroraModeApproxConfig, matrix: Matrix) -> str:
    """Name of the factors that a matrix uses."""
    shape = f"{matrix.d_in}x{matrix.d_out}"
    if config.share == "none":
        return matrix.role.replace(".", "-")
    return f"{matrix.tower}-{shape}" if config.share == "per_modality" else shape


def _parafac(stack: Tensor, rank: int, iterations: int) -> tuple[Tensor, list[Tensor]]:
    """CP of an N x d_out x d_in tensor: weights (R) and factors [P, V, U] with columns of unit norm."""
    import tensorly as tl
    from tensorly.decomposition import parafac

    with tl.backend_context("pytorch", local_threadsafe=True):
        weights, factors = parafac(
            stack, rank, n_iter_max=iterations, init="random", normalize_factors=True, random_state=0, tol=1e-7
        )
    return weights, factors


def _shape(base: nn.Module) -> tuple[int, ...]:
    return (base.in_features, base.out_features) if isinstance(base, nn.Linear) else tuple(base.weight.shape)


def _tower(path: str, found: Anatomy) -> str:
    """The tower of a fusion layer: that of its cross-attention."""
    return next(m.tower for m in found.matrices if m.module.startswith(path + ".") and is_cross(m.module))


def _fuses(model: nn.Module, path: str) -> bool:
    """Whether a text tower can read a picture: its forward takes `encoder_hidden_states` and it has cross-attentions."""
    tower = model.get_submodule(path)
    takes = "encoder_hidden_states" in inspect.signature(tower.forward).parameters
    return takes and any(is_cross(name) for name, _ in tower.named_modules())


def _scope_of(parent: nn.Module) -> CallScope:
    """The call scope of a module whose children read the same input; its hooks are made with it."""
    scope = parent.__dict__.get("_aurora_mode_approx_scope")
    if scope is None:
        scope = CallScope()
        parent.__dict__["_aurora_mode_approx_scope"] = scope
        parent.__dict__["_aurora_mode_approx_hooks"] = scope.attach(parent)
    return scope


def _drop_scope(module: nn.Module) -> None:
    for handle in module.__dict__.pop("_aurora_mode_approx_hooks", ()):
        handle.remove()
    module.__dict__.pop("_aurora_mode_approx_scope", None)


register("aurora_mode_approx", AuroraModeApproxConfig, AuroraModeApproxModel)
