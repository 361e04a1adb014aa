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
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import NoMatchingPeftModuleError
from peft.utils import PeftType
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..core.anatomy import (
    TOWERS,
    Anatomy,
    Site,
    own_modules,
    stack_of,
)
from ..core.config import TargetedConfig, heads_for
from ..core.parts import AttachedPart, CallScope, MultimodalLayer, check_rows, rows_beside, rows_by_name
from ..core.registry import Promises, Use, method
from ..core.sites import arguments_of, layers, towers
from ..core.stand_in import StandIn
from ..core.tuner import Injection, MultimodalTuner
from ..nn.transformer_block import TransformerBlock

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
            `layers_to_transform` names them by index, `target_modules` by their paths (`["layers.10", "layers.11"]`).

    Decoders have none: they generate from a cache of past tokens, which the adapter doesn't keep.
    The other arguments are those of [`TargetedConfig`].
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
        self.peft_type = PeftType("HARD_SAMPLE_DOMAIN_ADAPTER")
        for name in ("bottleneck_dim", "ff_mult"):
            self.check_number(name, 1, integer=True)
        if self.num_heads is None:
            self.num_heads = heads_for(self.bottleneck_dim)
        self.check_number("num_heads", 1, integer=True)
        self.check_number("num_layers", 0, 1000, integer=True)
        self.check_number("dropout", 0, 0.999)
        self.check_choice("placement", ("layer", "top"))
        self.check(
            "last_layers", "a positive integer, or None for all", lambda v: v is None or (type(v) is int and v > 0)
        )
        self.check("num_heads", "a divisor of bottleneck_dim", lambda v: self.bottleneck_dim % v == 0)
        self.check(
            "target_modules", "paths of layers (last_layers=None takes all)", lambda v: v is None or v != "all-linear"
        )
        if self.placement == "top":
            for name in ("target_modules", "exclude_modules", "layers_to_transform"):
                self.check(name, "None: placement='top' stands beside whole towers", lambda v: v is None)


# --- the adapter -----------------------------------------------------------------------------------------------------


class DomainBranch(nn.Module):
    """The module docstring's a and W_up.

    Args:
        config: The adapter's.
        width: d of the states that it reads.
        output_width: Of what it adds to; d in a layer.
    """

    def __init__(self, config: HardSampleDomainAdapterConfig, width: int, output_width: int) -> None:
        super().__init__()
        m = config.bottleneck_dim
        heads: Any = config.num_heads
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, m)
        self.blocks = nn.ModuleList(
            TransformerBlock(m, heads, config.ff_mult, config.dropout) for _ in range(config.num_layers)
        )
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


class DomainPart(nn.Module, AttachedPart, HardSampleDomainAdapterLayer):
    """Hangs below a frozen module and takes its `forward` over: the branches of all adapters at this place."""

    adapter_layer_names = ("hard_sample_domain_adapter_branch",)
    hard_sample_domain_adapter_branch: Any  # {adapter: DomainBranch}

    def __init__(self, host: nn.Module, role: str) -> None:
        nn.Module.__init__(self)
        AttachedPart.__init__(self)
        self.role = role
        self.hard_sample_domain_adapter_branch = nn.ModuleDict()
        self.scope = CallScope()  # `adapter_names` of a call
        self._host = (host,)  # a tuple is not registered
        self._positions = {name: i for i, name in enumerate(arguments_of(host))}
        self.stand_in = StandIn(host, "forward", self.forward)

    def host(self) -> nn.Module:
        return self._host[0]

    def remove_hooks(self) -> None:
        super().remove_hooks()
        self.stand_in.give_back()

    def argument(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """An argument of the host's call, by name or position; None where it is missing."""
        position = self._positions.get(name, len(args))
        return args[position] if position < len(args) else kwargs.get(name)

    def add(self, adapter_name: str, config: HardSampleDomainAdapterConfig, width: int, output_width: int) -> None:
        self.hard_sample_domain_adapter_branch[adapter_name] = DomainBranch(config, width, output_width)

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
        names = self.scope.values.get("adapter_names")
        if names is None:
            return sum(self.added(name, h, mask) for name in self.acting())  # type: ignore[return-value]
        if len(names) != len(h):
            raise ValueError(
                f"{len(names)} adapter_names for {len(h)} rows: this tower doesn't see the batch row by row. Call "
                "model.set_adapter(name) and pass the rows of each adapter separately."
            )
        total: Any = None
        rows_of = rows_by_name(names, h.device)
        for name in self.acting():
            rows = rows_of[name]
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
        # Tokens in one row: windows' grids (B, H, W, d), and pictures that are packed into (L, d).
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
            picture = torch.bucketize(places, bounds[1:].to(places), right=True)
            together = (picture[:, None] == picture)[None, None]
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


# --- the model -------------------------------------------------------------------------------------------------------


@method(
    "hard_sample_domain_adapter",
    HardSampleDomainAdapterConfig,
    summary="A narrow domain from little data, hard pairs first.",
    use=Use(
        have="image-text pairs of a narrow domain among general ones",
        want="the domain, and general knowledge kept",
        cost="bank and sampler: 0.2 % of a training step",
        compare="full fine-tuning of the same layers: it learns more; mismatched captions are hard pairs, too",
    ),
    docs="docs/hard-sample-domain-adapter.md",
    promises=Promises(acts_on="layers", rows=True),
)
class HardSampleDomainAdapterModel(MultimodalTuner):
    """Gives a frozen vision-language model adapters for a narrow domain.

    Example:
        >>> config = HardSampleDomainAdapterConfig(bottleneck_dim=64, num_layers=1, towers=["vision", "text"])
        >>> model = get_peft_model(clip, config)
        >>> bank = HardSampleBank.from_model(model, dataset, id_column="id", collator=collator)
        >>> trainer = ContrastiveTrainer(model, args, train_dataset=dataset, data_collator=collator, hard_samples=bank)
        >>> trainer.train()
    """

    prefix = "hard_sample_domain_adapter_"
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
    def candidates(cls, config: HardSampleDomainAdapterConfig, model: nn.Module, found: Anatomy) -> list[Site]:
        """The layers of the encoders, or with placement="top" the two towers of a dual encoder."""
        if "decoder" in (config.towers or ()):
            raise ValueError(
                "A decoder generates from a cache of past tokens, which the adapter doesn't keep. Adapt the encoders, "
                f"towers={list(ENCODERS)}, and a decoder with AuroraModeApprox."
            )
        if config.placement == "top":
            check_dual(found)
            return towers(model, found)
        return layers(model, found, ENCODERS, has_known_mask)

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
        part.add(injection.adapter_name, injection.config, site.d_in, site.d_out)

    # --- rows of a batch ---

    @contextmanager
    def rows(self, adapter_names: Sequence[str], inputs: Collection[Any]) -> Iterator[None]:
        if self.model.training:
            raise ValueError(
                "adapter_names=[...] is for inference: call model.eval(), and train one adapter at a time."
            )
        check_rows(adapter_names, self.peft_config, inputs)
        with rows_beside(self.model, adapter_names), ExitStack() as stack:
            for _, _, part in self.attached_parts():
                scope: CallScope = part.scope  # type: ignore[attr-defined]
                scope.open()
                scope.values["adapter_names"] = list(adapter_names)
                stack.callback(scope.close)
            yield


def has_known_mask(layer: nn.Module) -> bool:
    """Whether a layer attends with a mask that is known: it reads one sequence by one, and doesn't convolve."""
    arguments = arguments_of(layer)
    masks = {name for name in arguments if "mask" in name}
    convolves = any(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for m in own_modules(layer).values())
    reads_states = arguments[0] in ("hidden_states", "hidden_state")
    return reads_states and masks <= {"attention_mask", "encoder_attention_mask"} and not convolves


def check_dual(found: Anatomy) -> None:
    """Refuse a model that is no dual encoder."""
    towers = [t for t in found.towers if t.attentions]
    if sorted(t.name for t in towers) != ["text", "vision"] or found.fusion_layers or not all(t.path for t in towers):
        raise NoMatchingPeftModuleError(
            f"placement='top' joins the one vector that each tower of a dual encoder gives; {found.model_class} has the "
            f"towers {[t.name for t in towers]} and reads their tokens. Use placement='layer'."
        )
