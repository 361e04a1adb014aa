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
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import PeftType
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.anatomy import Anatomy, Matrix, device_of, is_cross, is_linear, unwrap
from ..core.config import MultimodalConfig
from ..core.registry import Promises, method
from ..core.tuner import MultimodalTuner
from .aurora_fusion import GatedQueryTransformation, InformativeContext, reads_pictures
from .aurora_layers import (
    AuroraLinear,
    AuroraMatrixLayer,
    AuroraModeApproxLayer,
    AuroraMultiheadAttention,
    SharedFactors,
    drop_scope,
    group_of,
    pytorch_backend,
    scope_of,
)

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
        self.check(
            "alpha", "a positive number or None", lambda v: v is None or (type(v) in (int, float) and 0 < v < math.inf)
        )
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


@method(
    "aurora_mode_approx",
    AuroraModeApproxConfig,
    summary="Image-text tasks at a fraction of LoRA's parameters: one CP tensor updates every attention of every tower.",
    docs="docs/aurora-mode-approx.md",
    promises=Promises(),
)
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
    learning_rates = (1e-4, 1e-2)
    uses_shared_state = True  # U, V and lambda
    scalars = ("_gate_norm", ".gamma_norm")
    wraps = True

    @classmethod
    def default_targets(cls, config: AuroraModeApproxConfig, candidates: list[Matrix]) -> list[Matrix]:
        return [m for m in candidates if m.letter in ("q", "k", "v", "qkv")]

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
            (t.path for t in found.towers if t.name == "text" and reads_pictures(self.model, t.path)), None
        )
        if config.use_ice and self._ice_encoder is None:
            raise ValueError(
                "use_ice=True needs a fusion encoder that runs with and without the picture, as BLIP's text encoder does; "
                f"{found.model_class} has none. Leave use_ice off."
            )
        self._found = found

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, current_key: str,
        parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        factors = self._prepare_factors(peft_config, adapter_name)
        matrices = self._matched[current_key]
        if isinstance(target, AuroraMatrixLayer):
            self._update(target, adapter_name, peft_config, matrices)
            return
        base = unwrap(target)
        scope = scope_of(parent)
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
        self._update(layer, adapter_name, peft_config, matrices)
        layer.train(target.training)  # no dropout in a model that stands in eval mode
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _update(self, layer: AuroraMatrixLayer, adapter_name: str, config: Any, matrices: list[Matrix]) -> None:
        groups = [group_of(config.share, m) for m in matrices]
        layer.update_layer(adapter_name, matrices, groups, config.r, config.core, config.scaling, config.dropout)

    def _prepare_factors(self, config: AuroraModeApproxConfig, adapter_name: str) -> SharedFactors:
        """The store of shared factors, with those (and the fusion parts) of this adapter."""
        name = "aurora_mode_approx_shared"
        if not hasattr(self.model, name):
            self.model.add_module(name, SharedFactors(self.model))
        factors = self.model.get_submodule(name)
        if adapter_name not in factors.aurora_mode_approx_U:
            matrices = [m for found in self._matched.values() for m in found]
            shapes = {group_of(config.share, m): (m.d_in, m.d_out) for m in matrices}
            factors.add(adapter_name, config.r, config.core, shapes)
            factors.settle(adapter_name)
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
                rows = len(layer.factors.aurora_mode_approx_V[adapter_name][group])
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
            _, (P, _, U) = _parafac(stack, config.r, iterations=10, starts=("random",))
            P = P / P.square().mean().sqrt().clamp_min(1e-12)
            factors = members[0][1].factors
            factors.U(adapter_name, group).copy_(U / U.norm(dim=0) * math.sqrt(1 / config.r))
            for (_, layer, index), row in zip(members, P, strict=True):
                layer.aurora_mode_approx_P_norm[adapter_name][index].copy_(row)

    @classmethod
    @torch.no_grad()
    def from_lora(
        cls,
        model: PeftModel,
        config: AuroraModeApproxConfig | None = None,
        adapter_name: str = "default",
        iterations: int = 100,
    ) -> tuple[PeftModel, CompressionErrors]:
        """Compress a trained LoRA into CP factors.

        Args:
            model: A PeftModel with a LoRA adapter `adapter_name`. Its LoRA layers are taken out.
            config: Rank and sharing of the result; the target modules are the LoRA's.
            iterations: Of alternating least squares (tensorly's `parafac`).

        Returns:
            The base model with an Aurora adapter of the same name, and what was lost: [`CompressionErrors`]. A warning
            says when a larger R is needed.
        """
        base: Any = model.get_base_model()
        layers: dict[str, Any] = {
            path: module
            for path, module in base.named_modules()
            if isinstance(module, LoraLayer) and adapter_name in module._get_available_adapters()
        }
        if not layers:
            raise ValueError(f"The model has no LoRA adapter {adapter_name!r}.")
        lora: Any = model.peft_config[adapter_name]
        lost = [path for path, module in layers.items() if not is_linear(unwrap(module))]
        lost += list(lora.modules_to_save or ()) + ["DoRA's magnitudes"] * lora.use_dora
        lost += ["biases"] * (lora.bias != "none")
        if lost:
            raise ValueError(f"CP factors hold updates of linear layers alone; this LoRA also has: {', '.join(lost)}.")
        if config is not None and config.core != "cp":
            raise ValueError("from_lora makes CP factors: use core='cp'.")
        deltas = {
            path: module.get_delta_weight(adapter_name).t()
            if isinstance(unwrap(module), Conv1D)
            else module.get_delta_weight(adapter_name)
            for path, module in layers.items()
        }
        config = copy.copy(config) if config is not None else AuroraModeApproxConfig()
        config.target_modules, config.alpha = sorted(deltas), None
        unloaded: Any = model.unload()
        compressed: Any = get_peft_model(unloaded, config, adapter_name=adapter_name)
        tuner = compressed.base_model
        for group, members, stack in tuner._stacks(adapter_name, deltas):
            factors = members[0][1].factors
            if not stack.any():  # an untrained part of the LoRA: V stays 0
                continue
            weights, (P, V, U) = _parafac(stack, config.r, iterations, starts=("svd", "random", "random"))
            factors.U(adapter_name, group).copy_(U)
            factors.aurora_mode_approx_V[adapter_name][group].copy_(V)
            factors.aurora_mode_approx_lambda_norm[adapter_name][group].copy_(weights)
            for (_, layer, index), row in zip(members, P, strict=True):
                layer.aurora_mode_approx_P_norm[adapter_name][index].copy_(row)
        errors = CompressionErrors()
        for path, layer in tuner.matrix_layers(adapter_name).items():
            delta = deltas[path].float()
            errors.add(path, float((layer.get_delta_weight(adapter_name) - delta).norm()), float(delta.norm()))
        if errors.total > ACCEPTABLE:
            stacks = [stack for _, _, stack in tuner._stacks(adapter_name, deltas)]
            needed = max(config.r + 1, *(least_rank(stack, ACCEPTABLE) for stack in stacks))
            warnings.warn(
                f"r={config.r} is too small for this LoRA: {errors}. An error of {ACCEPTABLE} needs r={needed} at least. Take a "
                "larger r, or train on from here.",
                stacklevel=3,
            )
        return compressed, errors

    @torch.no_grad()
    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "sum"
    ) -> None:
        """Add an adapter whose update is exactly sum_a weights[a] dW_a: factors side by side, rank sum of ranks.

        Args:
            combination_type: "sum", or "cat" as PEFT calls it for LoRA, whose other types approximate the sum.

        Raises:
            ValueError: the adapters differ in matched modules or sharing, have a Tucker core, or parts that are no
                weight updates (GQT, ICE, modules_to_save).
        """
        if combination_type not in ("sum", "cat"):
            raise ValueError(
                f"combination_type={combination_type!r} isn't supported: Aurora adds updates up exactly, by factors side by "
                'side. Leave it out, or pass "sum" or "cat".'
            )
        if unknown := [a for a in adapters if a not in self.peft_config]:
            raise ValueError(f"No such adapter: {unknown}. There are {list(self.peft_config)}.")
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
        if whole := sorted({name for c in configs for name in c.modules_to_save or ()}):
            raise ValueError(
                f"The adapters train whole modules beside them (modules_to_save: {', '.join(whole)}), which are no weight "
                "updates and can't be added up. Add up adapters that were trained without modules_to_save."
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

    def _check_merge(self, adapter_names: list[str] | None, safe: bool, cp_only: bool, then: str) -> None:
        """Refuse before any weight is touched."""
        for name in adapter_names or self.active_adapters:
            config = self.peft_config[name]
            if not cp_only and (config.use_gqt or config.use_ice):
                raise ValueError(
                    f"Adapter {name!r} has {'GQT' if config.use_gqt else ''}{' and ' if config.use_gqt and config.use_ice else ''}"
                    f"{'ICE' if config.use_ice else ''}, which are no weight updates and can't be merged. Keep the adapter, or "
                    f"merge the CP part alone with cp_only=True ({then})."
                )
        if safe:
            for module in self.model.modules():
                if isinstance(module, AuroraMatrixLayer):
                    module.check_merge(adapter_names)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, cp_only: bool = False
    ) -> None:
        """Add the updates to the base weights; with `cp_only=True` GQT and ICE go on acting as they are."""
        self._check_merge(adapter_names, safe_merge, cp_only, "GQT and ICE go on acting")
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        cp_only: bool = False,
    ) -> nn.Module:
        """The base model with the updates in its weights; with `cp_only=True` GQT and ICE are dropped."""
        self._check_merge(adapter_names, safe_merge, cp_only, "GQT and ICE are dropped")
        return super().merge_and_unload(progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)

    @classmethod
    def drop_traces(cls, model: nn.Module) -> None:
        for module in model.modules():
            drop_scope(module)

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
            device = device_of(encoder)
            out = encoder(batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))
            for adapter in part.live_adapters():
                if not encoder.training:  # in training the hook has pushed them already
                    part.aurora_mode_approx_ice[adapter].push(out[0][:, 0])
        return max((int(part.aurora_mode_approx_ice[a].count) for a in part.live_adapters()), default=0)


ACCEPTABLE = 0.3  # relative error of a compressed LoRA's updates, all together


class CompressionErrors(dict[str, float]):
    """What `from_lora` loses: {module: ||dW_lora - dW_cp|| / ||dW_lora||}.

    A module that the LoRA has hardly changed may be lost as a whole (an error of 1) and matter little. `total` weighs modules
    by the size of their updates.

    Example:
        >>> model, errors = AuroraModeApproxModel.from_lora(lora, AuroraModeApproxConfig(r=64))
        >>> print(errors)
        relative error of the updates: 0.12 in all; by module 0.17 on average, from 0.03 to 0.98 (layers.0.q_proj)
    """

    def __init__(self) -> None:
        super().__init__()
        self._lost = self._whole = 0.0

    def add(self, module: str, lost: float, whole: float) -> None:
        """The norms of what is lost of an update, and of the update."""
        self[module] = lost / max(whole, 1e-12)
        self._lost, self._whole = math.hypot(self._lost, lost), math.hypot(self._whole, whole)

    @property
    def total(self) -> float:
        """||dW_lora - dW_cp|| / ||dW_lora|| of all modules together: 0 is exact, 1 is nothing kept."""
        return self._lost / max(self._whole, 1e-12)

    def __str__(self) -> str:
        worst = max(self, key=lambda module: self[module])
        return (
            f"relative error of the updates: {self.total:.2g} in all; by module {sum(self.values()) / len(self):.2g} on "
            f"average, from {min(self.values()):.2g} to {self[worst]:.2g} ({worst})"
        )


def least_rank(stack: Tensor, error: float) -> int:
    """A bound from below on the R that leaves a relative error: what the unfoldings of N x d_out x d_in need.

    No tensor of CP rank R has an unfolding of a higher rank.
    """
    needed = 1
    for axis in range(3):
        unfolded = stack.movedim(axis, 0).flatten(1).double()
        energy = torch.linalg.eigvalsh(unfolded @ unfolded.T).clamp_min(0).flip(0)
        left = energy.sum() - energy.cumsum(0)
        needed = max(needed, 1 + int((left > error**2 * energy.sum()).sum()))
    return needed


def _tower(path: str, found: Anatomy) -> str:
    """The tower of a fusion layer: that of its cross-attention."""
    return next(m.tower for m in found.matrices if m.module.startswith(path + ".") and is_cross(m.module))


def _parafac(stack: Tensor, rank: int, iterations: int, starts: tuple[str, ...]) -> tuple[Tensor, list[Tensor]]:
    """CP of an N x d_out x d_in tensor: weights (R) and factors [P, V, U] with columns of unit norm.

    Alternating least squares ends in local minima: the best of the `starts` is taken.
    """
    from tensorly.decomposition import parafac

    best: Any = None
    least = math.inf
    with pytorch_backend():
        for seed, start in enumerate(starts):
            found, errors = parafac(
                stack.double(), rank, n_iter_max=iterations, init=start, normalize_factors=True, random_state=seed,
                tol=1e-10, return_errors=True,
            )  # fmt: skip
            if best is None or float(errors[-1]) < least:
                best, least = found, float(errors[-1])
    weights, factors = best
    return weights.to(stack.dtype), [f.to(stack.dtype) for f in factors]
