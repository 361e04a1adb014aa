"""HardSampleDomainAdapter: small adapters inside frozen layers learn a narrow domain and leave general knowledge alone.

For the output h of a frozen layer, the adapter's residual is

    a  = LN(h) W_down + b                                   B x L x d -> B x L x m
    a  = TransformerBlock_1..n(a; the layer's own mask)     causal, padded or neither: as the frozen layer
    h' = h + s a W_up                                       m -> d

At the start W_up = 0 and s = 1, hence h' = h. With `placement="top"` one branch a tower stands beside the frozen
layers, and its vector joins the pooled one y before the model projects and normalises the sum:

    y' = y + s mean(a) W_up                                 mean over the sequence's own tokens

The frozen layers carry general knowledge, the adapters the domain's, and the two are combined into one vector: the
recipe of DAMO's talk on narrow domains, which goes with visiting hard pairs more often
(`peft_multimodal.training.hard_samples`).

Parameters a site, at an FFN of 4 m: 2 d + (d m + m) + n (12 m^2 + 13 m) + m d + 1.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import NoMatchingPeftModuleError
from torch import nn

from ...core.anatomy import TOWERS, Anatomy, Site, own_modules, stack_of
from ...core.config import TargetedConfig, check_bottleneck
from ...core.parts import CallScope
from ...core.registry import Promises, Use, method
from ...core.sites import arguments_of, layers, towers
from ...core.tuner import Injection, MultimodalTuner
from .branches import DomainBranch, DomainLayer, DomainPart, DomainTower, HardSampleDomainAdapterLayer

ENCODERS = tuple(tower for tower in TOWERS if tower != "decoder")


@dataclass
class HardSampleDomainAdapterConfig(TargetedConfig):
    """Configuration of [`HardSampleDomainAdapterModel`].

    Args:
        bottleneck_dim: Width m of the adapter.
        num_layers: Its transformer layers n; 0 leaves a linear bottleneck.
        num_heads: Their attention heads; None takes 4, or fewer where 4 doesn't divide the width.
        ff_mult: Their FFN's width in multiples of m.
        dropout: In the transformer layers, in training.
        placement: "layer" puts adapters into the chosen layers, "top" one beside each tower of a dual encoder.
        last_layers: With "layer": how many layers at the end of each stack get an adapter; None takes all of them.
            `layers_to_transform` names them by index, `target_modules` by their paths.
        target_modules: Paths of layers, such as `["layers.10", "layers.11"]`; None takes the last layers.
        exclude_modules: Names or a regex that are left out.
        towers: Any of "vision", "text", "fusion", "decoder"; None takes all. `describe(model)` shows what a model has.
        layers_to_transform: Only layers with these indices.
        layers_pattern: The name of the list of layers that the indices refer to.

    Decoders have none: they generate from a cache of past tokens, which the adapter doesn't keep.
    The other arguments are those of [`MultimodalConfig`].

    Raises:
        ValueError: a field has a wrong value.

    Examples:
        >>> HardSampleDomainAdapterConfig(bottleneck_dim=64, num_layers=1, towers=["vision", "text"])
    """

    bottleneck_dim: int = 64
    num_layers: int = 1
    num_heads: int | None = None
    ff_mult: int = 4
    dropout: float = 0.0
    placement: str = "layer"
    last_layers: int | None = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bottleneck(self)
        self.check_choice("placement", ("layer", "top"))
        self.check_sizes("last_layers")
        self.check(
            "target_modules", "paths of layers (last_layers=None takes all)", lambda v: v is None or v != "all-linear"
        )
        if self.placement == "top":
            for name in ("target_modules", "exclude_modules", "layers_to_transform"):
                self.check(name, "None: placement='top' stands beside whole towers", lambda v: v is None)


@method(
    "hard_sample_domain_adapter",
    HardSampleDomainAdapterConfig,
    summary="A narrow domain from little data, hard pairs first.",
    use=Use(
        have="image-text pairs of a narrow domain among general ones",
        want="the domain, and what the model knew",
        cost="0.2 % more time a step",
        compare="full fine-tuning of the same layers, which learns more. Clean your captions: wrong ones count as hard pairs",
    ),
    docs="docs/hard-sample-domain-adapter.md",
    promises=Promises(acts_on="layers", rows=True),
)
class HardSampleDomainAdapterModel(MultimodalTuner):
    """Gives a frozen vision-language model adapters for a narrow domain.

    Source: the recipe of DAMO's talk on narrow domains: adapters in frozen layers, and hard pairs more often.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import TrainingArguments
        >>> model = get_peft_model(clip, HardSampleDomainAdapterConfig(bottleneck_dim=64))
        >>> bank = HardSampleBank.from_model(model, dataset, id_column="id", collator=collator)
        >>> args = TrainingArguments("out", learning_rate=1e-3, remove_unused_columns=False)
        >>> ContrastiveTrainer(model, args, collator, dataset, hard_samples=bank).train()
    """

    tuner_layer_cls = HardSampleDomainAdapterLayer
    learning_rates = (1e-4, 5e-3)
    scalars = (".scale_norm",)
    not_mergeable = (
        "The adapter is a network of its own beside the frozen layers; that is no weight update, so it can't be merged. "
        "Keep the adapter, or get the general model back by unload()."
    )

    places = (
        "HardSampleDomainAdapter stands in the layers of encoders that read `hidden_states` through transformers' own masks. "
        "A decoder, which generates from a cache of past tokens, and layers of another build are adapted by AuroraModeApprox"
    )

    @classmethod
    def linear_tensors(cls, config: Any) -> str | None:
        return r"\.up\.weight$"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # {adapter: the bank of hard samples that it is trained with}; training sets it, inference doesn't need it.
        self.banks: dict[str, Any] = {}

    @classmethod
    def save_companions(cls, model: nn.Module, config: Any, adapter_name: str, folder: Path) -> None:
        """The bank of hard samples that the adapter was trained with."""
        tuner = next((m for m in model.modules() if isinstance(m, cls)), None)
        if tuner is not None and adapter_name in tuner.banks:
            tuner.banks[adapter_name].save(folder)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.banks.pop(adapter_name, None)

    # --- places ---

    @classmethod
    def candidates(cls, config: HardSampleDomainAdapterConfig, model: nn.Module, anatomy: Anatomy) -> list[Site]:
        """The layers of the encoders, or with placement="top" the two towers of a dual encoder."""
        if "decoder" in (config.towers or ()):
            raise ValueError(
                "A decoder generates from a cache of past tokens, which the adapter doesn't keep. Adapt the encoders, "
                f"towers={list(ENCODERS)}, and a decoder with AuroraModeApprox."
            )
        if config.placement == "top":
            check_dual(anatomy)
            return towers(model, anatomy)
        return layers(model, anatomy, ENCODERS, has_known_mask)

    @classmethod
    def default_targets(cls, config: HardSampleDomainAdapterConfig, candidates: list[Site]) -> list[Site]:
        if config.placement == "top" or config.last_layers is None or config.layers_to_transform is not None:
            return candidates
        stacks: dict[str, list[Site]] = defaultdict(list)
        for layer in candidates:
            stacks[stack_of(layer.module)].append(layer)
        last = {layer for stack in stacks.values() for layer in stack[-config.last_layers :]}
        return [layer for layer in candidates if layer in last]

    def make(self, injection: Injection, site: Site, module: nn.Module) -> DomainPart:
        return (DomainTower if site.kind == "tower" else DomainLayer)(module, site.role)

    def add(self, injection: Injection, site: Site, part: DomainPart) -> None:
        c = injection.config
        shape = (c.bottleneck_dim, c.num_layers, c.num_heads, c.ff_mult, c.dropout)
        part.hard_sample_domain_adapter_branch[injection.adapter_name] = DomainBranch(site.d_in, site.d_out, *shape)

    def row_scopes(self) -> list[CallScope]:
        return [part.scope for part in self.own_layers() if isinstance(part, DomainPart)]


def has_known_mask(layer: nn.Module) -> bool:
    """Whether a layer attends with a mask that is known: it reads one sequence by one, and doesn't convolve."""
    arguments = arguments_of(layer)
    masks = {name for name in arguments if "mask" in name}
    convolves = any(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for m in own_modules(layer).values())
    reads_states = arguments[0] in ("hidden_states", "hidden_state")
    return reads_states and masks <= {"attention_mask", "encoder_attention_mask"} and not convolves


def check_dual(anatomy: Anatomy) -> None:
    """Refuse a model that is no dual encoder."""
    towers = [t for t in anatomy.towers if t.attentions]
    if sorted(t.name for t in towers) != ["text", "vision"] or anatomy.fusion_layers or not all(t.path for t in towers):
        raise NoMatchingPeftModuleError(
            f"placement='top' joins the one vector that each tower of a dual encoder gives; {anatomy.model_class} has the "
            f"towers {[t.name for t in towers]} and reads their tokens. Use placement='layer'."
        )
