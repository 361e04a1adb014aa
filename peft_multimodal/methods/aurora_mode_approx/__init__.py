"""AuroraModeApprox: one CP tensor updates every attention of every modality (Wang et al., arXiv 2305.08381).

The updates of N frozen matrices W_n are the slices of one third-order tensor in CP form,

    dW_n = s V diag(lambda * P_n) U^T            U: d_in x R,  V: d_out x R,  lambda: R,  P: N x R

so the whole network shares U, V and lambda, and a matrix owns R numbers. In the forward pass nothing of size
d_out x d_in is made:

    y = W_n x + b + (drop(x U)) (s V diag(lambda * P_n))^T

At the start V = 0, hence y is the frozen model's. The matrices of one letter (q, k, v, o) and tower share a group of
factors; `share` has other groups, and in those that hold q, k and v of one attention, these share the product x U.

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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from ...core.anatomy import Anatomy, Matrix, Site, unwrap
from ...core.config import TargetedConfig
from ...core.registry import Promises, Use, method
from ...core.tuner import Injection, MultimodalTuner
from . import conversion
from .algebra import CompressionErrors
from .factors import AuroraModeApproxLayer, SharedFactors
from .fusion import GatedQueryTransformation, InformativeContext, attentions_in, gqt_sites, ice_sites
from .layers import AuroraLinear, AuroraMatrixLayer, AuroraMultiheadAttention, drop_scope, scope_of

SHARES = ("per_shape", "per_modality", "per_letter", "none")


@dataclass
class AuroraModeApproxConfig(TargetedConfig):
    """Configuration of [`AuroraModeApproxModel`].

    Args:
        r: Rank R of the CP tensor.
        alpha: The update is scaled by s = alpha / r; None means alpha = r, that is s = 1.
        dropout: Probability of dropping an entry of x U in training.
        share: Which matrices share U, V and lambda. "per_letter": the queries of a tower, its keys, its values, its outputs.
            "per_modality": all of one tower and shape. "per_shape", the paper's: all of equal (d_in, d_out), in any tower; an
            r four times as large has as many parameters then. "none": each has its own.
        core: "cp", or "tucker" for the form of the authors' released code (R^3 more parameters a group).
        init_weights: How U and P start; V is 0 in any case.

            - "gauss" draws U ~ N(0, 1/d_in) and P ~ N(0, 1).
            - "ones" draws the same U and P ~ 1 + 0.02 N(0, 1): all matrices of a group begin with one update and part
              later.
            - "inherit" takes U and P from a CP decomposition of the frozen weights.
        use_gqt: Add the gated query transformation to every layer with self- and cross-attention.
        gqt_branches: "query" (the paper's) and/or "cross" (the authors' code also adds the cross-attention's output).
        use_ice: Add the informative context enhancement to a text encoder that runs with and without the image.
        ice_bank_size: Number of text features in the bank (first in, first out).
        target_modules: PEFT's forms: a regex, a list of name endings, `"all-linear"`. None takes q, k and v of every attention
            in the chosen towers.
        exclude_modules: Names or a regex that are left out.
        towers: Any of "vision", "text", "fusion", "decoder"; None takes all. `describe(model)` shows what a model has.
        layers_to_transform: Only layers with these indices.
        layers_pattern: The name of the list of layers that the indices refer to.

    The other arguments are those of [`MultimodalConfig`].

    Raises:
        ValueError: a field has a wrong value.

    Examples:
        >>> AuroraModeApproxConfig(r=16, towers=["vision", "text"])
    """

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.1
    share: str = "per_letter"
    core: str = "cp"
    init_weights: str = "ones"
    use_gqt: bool = False
    gqt_branches: list[str] | None = None
    use_ice: bool = False
    ice_bank_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_number("r", 1, integer=True)
        self.check(
            "alpha", "a positive number or None", lambda v: v is None or (type(v) in (int, float) and 0 < v < math.inf)
        )
        self.check_number("dropout", 0, 0.999)
        if self.share == "global":
            warnings.warn("share='global' is gone: share='per_shape', which gives the same, is taken.", stacklevel=3)
            self.share = "per_shape"
        self.check_choice("share", SHARES)
        self.check_choice("core", ("cp", "tucker"))
        self.check_choice("init_weights", ("gauss", "ones", "inherit"))
        self.check_flags("use_gqt", "use_ice")
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
    use=Use(
        have="images with captions, or questions with answers",
        want="your task in a small file, and what the model knew",
        cost="0.5 MB for CLIP ViT-B/32",
        compare="PEFT's LoRA of r=3: as good here, in as small a file",
    ),
    docs="docs/aurora-mode-approx.md",
    promises=Promises(lora=True),
)
class AuroraModeApproxModel(MultimodalTuner):
    """Adapts a vision-language model with one CP tensor for all its attentions (arXiv 2305.08381).

    Parameters: (d_in + d_out) R + N R + R a group of N matrices of equal shape; 2 d + 1 a layer and branch for the
    gated query transformation; 1 for the context enhancement.

    Source: Wang et al. 2023, "Parameter-efficient Tuning of Large-scale Multimodal Foundation Model", arXiv
        2305.08381.

    Examples:
        >>> import peft_multimodal
        >>> from peft import get_peft_model
        >>> from transformers import CLIPModel
        >>> clip = CLIPModel.from_pretrained("openai/clip-vit-base-patch32")
        >>> model = get_peft_model(clip, peft_multimodal.AuroraModeApproxConfig(r=16))
    """

    tuner_layer_cls = AuroraModeApproxLayer
    learning_rates = (1e-4, 1e-2)
    uses_shared_state = True  # U, V and lambda
    scalars = ("_gate_norm", ".gamma_norm")
    wraps = True

    @classmethod
    def linear_tensors(cls, config: Any) -> str | None:
        return None if config.use_gqt else r"aurora_mode_approx_V\.|gamma_norm$"  # a gate of GQT saturates

    @classmethod
    def default_targets(cls, config: AuroraModeApproxConfig, candidates: list[Matrix]) -> list[Matrix]:
        return [m for m in candidates if m.letter in ("q", "k", "v", "qkv")]

    def check(self, config: AuroraModeApproxConfig, sites: list[Matrix], anatomy: Anatomy) -> None:
        if config.use_gqt and not gqt_sites(anatomy, config.towers):
            raise ValueError(
                f"use_gqt=True needs layers with a self- and a cross-attention (a fusion encoder such as BLIP's or a "
                f"Q-Former); {anatomy.model_class} has none in its towers {sorted({m.tower for m in sites})}. Leave use_gqt "
                "off."
            )
        if config.use_ice and not ice_sites(self.model, anatomy):
            raise ValueError(
                "use_ice=True needs a fusion encoder that runs with and without the image, as BLIP's text encoder does; "
                f"{anatomy.model_class} has none. Leave use_ice off."
            )
        for matrix in sites:
            module: Any = unwrap(self.model.get_submodule(matrix.module))
            if isinstance(module, nn.MultiheadAttention) and (module.bias_k is not None or module.add_zero_attn):
                raise ValueError(
                    f"{matrix.module}: nn.MultiheadAttention with add_bias_kv or add_zero_attn isn't supported."
                )

    def stores(self, injection: Injection) -> list[Site]:
        """The shared factors below the model, and what repairs a fusion encoder."""
        config, anatomy = injection.config, injection.anatomy
        gqt = gqt_sites(anatomy, config.towers) if config.use_gqt else []
        ice = ice_sites(self.model, anatomy) if config.use_ice else []
        return [Site("", "shared", "other", "", 0, 0), *gqt, *ice]

    def make(self, injection: Injection, site: Site, module: nn.Module) -> AuroraModeApproxLayer:
        if site.kind == "shared":
            return SharedFactors(module)
        if site.kind == "gqt":
            attentions = attentions_in(injection.anatomy, site.module)
            return GatedQueryTransformation(module, site.module, attentions, site.role)
        if site.kind == "ice":
            return InformativeContext(module, site.role)
        factors: Any = self.model.get_submodule("aurora_mode_approx_shared")
        if isinstance(unwrap(module), nn.MultiheadAttention):
            layer: AuroraMatrixLayer = AuroraMultiheadAttention(module, factors, None)
        else:
            parent = self.model.get_submodule(site.module.rpartition(".")[0])
            layer = AuroraLinear(module, factors, scope_of(parent))
        letters = "".join(m.letter for m in injection.at(site.module))
        layer.role = site.role.replace(f".{site.kind}.", f".{letters}.")
        return layer

    def add(self, injection: Injection, site: Site, part: Any) -> None:
        name, config = injection.adapter_name, injection.config
        if site.kind == "shared":
            shapes = {group_of(config.share, m): (m.d_in, m.d_out) for m in injection.sites}
            part.add(name, config.r, config.core, shapes)
        elif site.kind == "gqt":
            part.add(name, config.gqt_branches, site.d_in)
        elif site.kind == "ice":
            part.add(name, config.ice_bank_size, site.d_in)
        else:
            groups = [group_of(config.share, m) for m in injection.at(site.module)]
            part.update_layer(name, groups, config.r, config.core, config.scaling, config.dropout)
            if config.init_weights == "ones":
                part.start_at_ones(name)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        if config.init_weights == "inherit" and not config.inference_mode and not kwargs.get("low_cpu_mem_usage"):
            conversion.inherit(self.model, adapter_name, config.r)

    # --- from other adapters ---

    @classmethod
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
            adapter_name: Of the LoRA and of the result.
            iterations: Of alternating least squares (tensorly's `parafac`).

        Returns:
            The base model with an Aurora adapter of the same name, and what was lost: [`CompressionErrors`]. A warning
            says when a larger R is needed.
        """
        return conversion.from_lora(model, config or AuroraModeApproxConfig(), adapter_name, iterations)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "sum"
    ) -> None:
        """Add an adapter whose update is exactly sum_a weights[a] dW_a: factors side by side, rank sum of ranks.

        Args:
            adapters: Names of the adapters to add up.
            weights: One for each.
            adapter_name: The new adapter's.
            combination_type: "sum", or "cat" as PEFT calls it for LoRA, whose other types approximate the sum.

        Raises:
            ValueError: the adapters differ in matched modules or sharing, have a Tucker core, or parts that are no
                weight updates (GQT, ICE, modules_to_save).
        """
        known = self.peft_config
        conversion.check_addable(self.model, known, adapters, weights, adapter_name, combination_type)
        config = copy.deepcopy(known[adapters[0]])
        config.r, config.alpha, config.init_weights = sum(known[a].r for a in adapters), None, "gauss"
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        summands = [(a, weight, known[a].scaling) for a, weight in zip(adapters, weights, strict=True)]
        conversion.write_sum(self.model, adapter_name, summands)

    # --- merging ---

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

    def check_merge(self, adapter_names: list[str], safe: bool) -> None:
        super().check_merge(adapter_names, safe)
        self._check_merge(adapter_names, safe, False, "by get_peft_model without a policy")

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, cp_only: bool = False
    ) -> None:
        """Add the updates to the base weights.

        Args:
            adapter_names: Adapters to merge; None merges the active ones.
            safe_merge: Refuse an update that makes weights infinite or NaN.
            cp_only: Merge the updates though there are GQT and ICE, which go on acting as they are.

        Raises:
            ValueError: the adapter has GQT or ICE, and `cp_only` is False.
        """
        self._check_merge(adapter_names, safe_merge, cp_only, "GQT and ICE go on acting")
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        cp_only: bool = False,
    ) -> nn.Module:
        """The base model with the updates in its weights.

        Args:
            progressbar: Show one.
            safe_merge: Refuse an update that makes weights infinite or NaN.
            adapter_names: Adapters to merge; None merges the active ones.
            cp_only: Merge the updates though there are GQT and ICE, which are dropped.

        Returns:
            The base model, of its own class.

        Raises:
            ValueError: the adapter has GQT or ICE, and `cp_only` is False.
        """
        self._check_merge(adapter_names, safe_merge, cp_only, "GQT and ICE are dropped")
        return super().merge_and_unload(progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)

    @classmethod
    def drop_traces(cls, model: nn.Module) -> None:
        for module in model.modules():
            drop_scope(module)

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
        return part.collect(batches)


def group_of(share: str, matrix: Matrix) -> str:
    """Name of the factors that a matrix uses, by what shares them."""
    shape = f"{matrix.d_in}x{matrix.d_out}"
    if share == "none":
        return matrix.role.replace(".", "-")
    if share == "per_letter":
        return f"{matrix.tower}-{matrix.letter}-{shape}"
    return f"{matrix.tower}-{shape}" if share == "per_modality" else shape
