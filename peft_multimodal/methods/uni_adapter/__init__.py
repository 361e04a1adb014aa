"""UniAdapter: bottlenecks beside the FFN of every layer, one down projection for all modalities (Lu et al., 2302.06605).

A layer's bottleneck reads what its FFN reads, before it is normalised, and adds to what the layer gives:

    z(x) = act(LN(x) D + b)                                                       B x L x d -> B x L x m
    h'   = h + s U z(x)                                                           m -> d

D, its bias and its norm are one for the n-th layers of all stacks of a width (`share="down"`): vision, text and fusion
exchange what they learn there. U is the tower's own. Where a text layer has a cross-attention, and it ran in this call,

    h'   = h + s U_t z(a) + s (U_m z(c) + U_t z(c))       a: before the cross-attention, c: after it, which the FFN reads

the fusion's U_m joins the text's U_t, and the first summand, the query residual, keeps the text's query alive. z of
[a; c] is one product, and U_m + U_t are added up before they meet the tokens.

At the start all U = 0, hence h' = h. `cross_norm=True` normalises the fusion's summand as the paper has it,
s g LN(U_m z(c) + U_t z(c)), behind a learned gate g that starts at 0; then U_m is drawn, for a norm above zeros would
give any small number the size of the stream.

`share="middle"` gives each tower a D of its own and puts one m x m map M in front of all U, which start as the identity
and pair layers of any widths: z(x) = M act(LN(x) D + b). `share="none"` shares nothing.

Parameters: 2 d + d m + m a shared D, m d + d a branch (a tower's U, or a fusion's), 2 d + 1 a `cross_norm`. With "middle"
or "none" each branch has its D; "middle" has m^2 a shared map.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

from torch import nn

from ...core.anatomy import Anatomy, Site, base_model, stack_of
from ...core.config import TargetedConfig
from ...core.parts import CallScope
from ...core.registry import Promises, Use, method
from ...core.tuner import Injection, MultimodalTuner
from ...nn.router import ModalityRouter
from ...nn.single_streams import IMAGE
from .beside import Beside, SharedSite, UniAdapterBranch, UniAdapterLayer
from .bottleneck import ACTIVATIONS, Branch, Down
from .layers import FFNLayer, ffn_layers, norms_of

SHARES = ("down", "middle", "none")


@dataclass
class UniAdapterConfig(TargetedConfig):
    """Configuration of [`UniAdapterModel`].

    Args:
        bottleneck_dim: Width m of the bottlenecks.
        scale: The factor s of what they add.
        activation: "relu" (the paper's), "gelu" or "silu".
        share: What the n-th adapted layers of all stacks have in common: "down", the down projection and its norm, where
            their widths are equal; "middle", an m x m map, whatever their widths; "none", nothing.
        query_residual: Whether fusion layers also add the text's bottleneck of what stood before the cross-attention.
        cross_norm: Whether fusion layers normalise what they add, behind a gate.
        norm: Whether a bottleneck normalises what it reads.
        target_modules: Paths of layers; None takes every layer that has an FFN.
        exclude_modules: Names or a regex that are left out.
        towers: Any of "vision", "text", "fusion", "decoder"; None takes all. `describe(model)` shows what a model has.
        layers_to_transform: Only layers with these indices.
        layers_pattern: The name of the list of layers that the indices refer to.

    The other arguments are those of [`MultimodalConfig`].

    Raises:
        ValueError: a field has a wrong value.

    Examples:
        >>> UniAdapterConfig(bottleneck_dim=128, share="middle")
    """

    bottleneck_dim: int = 128
    scale: float = 0.1
    activation: str = "relu"
    share: str = "down"
    query_residual: bool = True
    cross_norm: bool = False
    norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_number("bottleneck_dim", 1, integer=True)
        self.check("scale", "a positive number", lambda v: type(v) in (int, float) and 0 < v < float("inf"))
        self.check_choice("activation", list(ACTIVATIONS))
        self.check_choice("share", SHARES)
        self.check_flags("query_residual", "cross_norm", "norm")
        self.check("target_modules", "paths of layers (None takes all)", lambda v: v is None or v != "all-linear")


@dataclass(frozen=True)
class Plan:
    """What is known before one adapter's parts are made."""

    layers: dict[str, FFNLayer]  # by their paths
    shared: dict[str, int]  # {path of a layer: the number of what it shares}
    router: ModalityRouter | None


@method(
    "uni_adapter",
    UniAdapterConfig,
    summary="Images, texts and their fusion share bottlenecks beside the FFNs, and so exchange what they learn.",
    use=Use(
        have="images with captions or questions, and a model that fuses them",
        want="one adapter that image and text layers share",
        cost="4.8M parameters for BLIP-base",
        compare="PEFT's LoRA of as many parameters, which can be merged",
    ),
    docs="docs/uni-adapter.md",
    promises=Promises(acts_on="layers", rows=True),
)
class UniAdapterModel(MultimodalTuner):
    """Puts bottlenecks beside a frozen model's FFNs, with one down projection for all modalities (arXiv 2302.06605).

    Source: Lu et al. 2023, "UniAdapter: Unified Parameter-Efficient Transfer Learning for Cross-modal Modeling",
        arXiv
    2302.06605.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import BlipForImageTextRetrieval
        >>> blip = BlipForImageTextRetrieval.from_pretrained("Salesforce/blip-itm-base-coco")
        >>> model = get_peft_model(blip, UniAdapterConfig(bottleneck_dim=128))
    """

    tuner_layer_cls = UniAdapterLayer
    learning_rates = (1e-4, 1e-2)
    uses_shared_state = True  # D, or the map in the middle
    scalars = (".gate_norm",)
    not_mergeable = (
        "The bottlenecks are networks of their own beside the frozen FFNs; that is no weight update, so they can't be "
        "merged. Keep the adapter, or get the base model back by unload()."
    )
    places = "UniAdapter stands beside the FFNs of layers with an attention, and none was found"

    @classmethod
    def linear_tensors(cls, config: UniAdapterConfig) -> str | None:
        return r"\.up\.(weight|bias)$|gate_norm$"

    @classmethod
    def candidates(cls, config: UniAdapterConfig, model: nn.Module, anatomy: Anatomy) -> list[Site]:
        """Every branch that there can be: of a layer, of the images in it, of the fusion in it."""
        sites: list[Site] = []
        numbers: dict[str, Iterator[int]] = defaultdict(count)
        router = ModalityRouter(base_model(model), anatomy)
        for layer in ffn_layers(base_model(model), anatomy):
            branches = [("layer", layer.tower, f"{layer.tower}.layer")]
            if reads_texts_and_images(router, layer.path):
                branches.append(("image", layer.tower, f"{layer.tower}.image"))
            if layer.fusion_tower:
                branches.append(("fusion", layer.fusion_tower, "fusion.layer"))
            for kind, tower, stem in branches:
                sites.append(Site(layer.path, kind, tower, f"{stem}.{next(numbers[stem])}", layer.width, layer.width))
        router.remove()
        return sites

    def prepare(self, config: UniAdapterConfig, sites: list[Site], anatomy: Anatomy) -> Plan:
        layers = {layer.path: layer for layer in ffn_layers(self.model, anatomy)}
        return Plan(layers, shared_sites(config.share, sites), self._router(sites))

    def _router(self, sites: list[Site]) -> ModalityRouter | None:
        """The one that all layers of the model ask where texts and images stand in one sequence."""
        mixed = [site.module for site in sites if site.kind == "image"]
        if not mixed:
            return None
        besides = (part.beside for _, _, part in self.attached_parts() if isinstance(part, UniAdapterBranch))
        router = next((b.router for b in besides if b.router is not None), None) or ModalityRouter(self.model)
        router.modalities(mixed[0])  # measured now, rather than in the first call
        return router

    def stores(self, injection: Injection) -> Iterator[Site]:
        """What layers share, below the model."""
        widths = {injection.prepared.shared[s.module]: s.d_in for s in injection.sites if injection.prepared.shared}
        for number, width in sorted(widths.items()):
            yield Site("", f"site_{number}", "other", f"shared.site.{number}", width, width)

    def make(self, injection: Injection, site: Site, module: nn.Module) -> SharedSite | UniAdapterBranch:
        if not site.module:
            return SharedSite(module, site.role)
        plan: Plan = injection.prepared
        beside = next((m.beside for m in module.children() if isinstance(m, UniAdapterBranch)), None)
        if beside is None:
            layer = plan.layers[site.module]
            ffns, queries = ([self.model.get_submodule(p) for p in paths] for paths in (layer.ffns, layer.queries))
            router = plan.router if any(s.kind == "image" for s in injection.at(site.module)) else None
            beside = Beside(module, site.module, ffns, queries, norms_of(module, site.d_in), router)
        return beside.join(site.kind, site.role)

    def add(self, injection: Injection, site: Site, part: SharedSite | UniAdapterBranch) -> None:
        config, name, m = injection.config, injection.adapter_name, injection.config.bottleneck_dim
        down = Down(site.d_in, m, config.activation, config.norm)
        if isinstance(part, SharedSite):
            part.uni_adapter_shared[name] = down if config.share == "down" else identity(m)
            return
        number = injection.prepared.shared.get(site.module)
        store = None if number is None else self.model.get_submodule(f"{self.prefix}site_{number}")
        part.uni_adapter_branch[name] = Branch(
            site.d_in,
            m,
            config.scale,
            down=None if config.share == "down" else down,
            shared=None if store is None else (store.uni_adapter_shared, name),
            reads_query=config.query_residual and site.kind == "layer",
            normed=config.cross_norm and site.kind == "fusion",
        )

    def row_scopes(self) -> list[CallScope]:
        parts = [part for part in self.own_layers() if isinstance(part, UniAdapterBranch)]
        return list({id(part.beside): part.beside.rows for part in parts}.values())


def reads_texts_and_images(router: ModalityRouter, path: str) -> bool:
    """Whether a layer's tokens are known to be texts' and images'."""
    with suppress(ValueError):  # a stack whose order the model doesn't show has one branch for all
        return len({modality >= IMAGE for modality in router.modalities(path)}) == 2
    return False


def shared_sites(share: str, sites: Sequence[Site]) -> dict[str, int]:
    """{path of a layer: the number of what it shares}: that of the n-th adapted layers of all stacks, of one width."""
    ranks: Counter[str] = Counter()
    keys: dict[str, tuple[int, int]] = {}
    for site in sites if share != "none" else ():
        if site.module not in keys:
            stack = stack_of(site.module)
            keys[site.module] = (ranks[stack], site.d_in if share == "down" else 0)
            ranks[stack] += 1
    numbers = {key: n for n, key in enumerate(sorted(set(keys.values())))}
    return {path: numbers[key] for path, key in keys.items()}


def identity(width: int) -> nn.Linear:
    """The map in the middle, at its start."""
    linear = nn.Linear(width, width, bias=False)
    nn.init.eye_(linear.weight)
    return linear
