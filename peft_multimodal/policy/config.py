"""What each tower of a model shall do: stay frozen, train as a whole, or have an adapter of its own."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType
from torch import nn

from ..core.config import MultimodalConfig, TargetedConfig
from ..core.registry import method_of
from ..core.towers import PLACES

NAME = "tower_policy"
FROZEN = "frozen"

# Fields of PEFT's configs that reach beyond the modules of a tower: other weights, or hooks around the whole model's call.
_BEYOND = (
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "megatron_config",
    "alora_invocation_tokens",
    "arrow_config",
)

Config = TypeVar("Config", bound=type)


@dataclass(frozen=True)
class Train:
    """A tower whose own weights train, all of them.

    They are trained and saved as PEFT does it with `modules_to_save`: in a copy, so `disable_adapter()` still gives the base.

    Args:
        lr: Learning rate; None takes that of `TrainingArguments`.

    Examples:
        >>> policy = TowerPolicy(connector=Train(lr=2e-5))
    """

    lr: float | None = None

    def __post_init__(self) -> None:
        if self.lr is not None and not _is_rate(self.lr):
            raise ValueError(f"Train.lr must be a positive number or None, got {self.lr!r}")


def _knows_its_towers(cls: Config) -> Config:
    """Decorate the policy: a misspelt tower is answered by those that there are."""
    init: Any = cls.__init__  # type: ignore[misc]
    fields = {field.name for field in dataclasses.fields(cls)}

    @wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if unknown := sorted(kwargs.keys() - fields):
            close = difflib.get_close_matches(unknown[0], PLACES, n=1)
            meant = f" Did you mean {close[0]!r}?" if close else ""
            # PEFT looks for these words, and leaves out what a newer file has.
            raise TypeError(
                f"TowerPolicy got an unexpected keyword argument {unknown[0]!r}.{meant} The towers are {', '.join(PLACES)}."
            )
        init(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


@_knows_its_towers
@dataclass
class TowerPolicy(MultimodalConfig):
    """Says for each tower of a model what becomes of it; a PEFT config like any other.

    Each tower is `"frozen"` (the default), `Train(lr=...)`, or the config of an adapter: of this package's methods that take
    `towers=`, and of PEFT's that act on modules (LoRA, IA3, OFT, ...). An adapter is kept to its tower: `target_modules`
    choose within it, and None takes the method's own choice, or for PEFT's methods every linear module.

    What comes of it is one adapter: `save_pretrained`, `PeftModel.from_pretrained`, `merge_and_unload`, `disable_adapter`
    and the `Trainer` treat all towers as a whole, in one folder.

    Args:
        vision: The tower that reads pixels. `describe(model)` shows which towers a model has.
        text: The encoder that reads tokens.
        fusion: What joins images and texts by attention.
        decoder: What predicts tokens.
        connector: What connects them: LLaVA's projector, CLIP's two projections, Qwen-VL's merger.
        lr: `{name: learning rate}`, for towers and for what the configs name as `modules_to_save`; others have the one of
            `TrainingArguments`.

    The other arguments are those of [`MultimodalConfig`].

    Raises:
        TypeError: a tower's name is misspelt.
        ValueError: a tower is given what it can't be.

    Examples:
        >>> policy = TowerPolicy(text=AuroraModeApproxConfig(r=64), connector=Train(lr=2e-5), lr={"text": 1e-3})
        >>> print(policy.table(clip))
        >>> model = policy.apply(clip)
    """

    vision: Any = FROZEN
    text: Any = FROZEN
    fusion: Any = FROZEN
    decoder: Any = FROZEN
    connector: Any = FROZEN
    lr: dict[str, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(NAME.upper())
        for place in PLACES:
            setattr(self, place, _choice(place, getattr(self, place)))
        if self.lr is not None:
            self.lr = dict(self.lr)
        self.check("lr", "{name: positive number}", lambda v: v is None or all(map(_is_rate, v.values())))
        names = [*PLACES, *self.wholes()]
        if unknown := sorted((self.lr or {}).keys() - {*names}):
            raise ValueError(f"TowerPolicy.lr names {unknown}. There are {', '.join(names)}.")
        for place in self.lr or {}:
            if place in PLACES and getattr(self, place) == FROZEN:
                raise ValueError(f"TowerPolicy.lr has a learning rate for {place!r}, which is frozen. Leave it out.")
            if isinstance(given := getattr(self, place, None), Train) and given.lr is not None:
                raise ValueError(f"TowerPolicy: {place!r} has two learning rates, in Train and in lr. Leave one out.")
        if not self.chosen() and not self.modules_to_save:
            raise ValueError(f"TowerPolicy leaves every tower frozen. Give one of {', '.join(PLACES)} something to do.")

    # --- what it says ------------------------------------------------------------------------------------------------

    def chosen(self) -> dict[str, Train | PeftConfig]:
        """{tower: what trains in it} of the towers that aren't frozen."""
        return {place: getattr(self, place) for place in PLACES if getattr(self, place) != FROZEN}

    def members(self, adapter_name: str) -> dict[str, tuple[str, PeftConfig]]:
        """{tower: (adapter, config)} of the adapters that this one is made of, as the model's layers know them."""
        chosen = self.chosen().items()
        return {place: (f"{adapter_name}-{place}", c) for place, c in chosen if isinstance(c, PeftConfig)}

    def wholes(self) -> list[str]:
        """Names of the modules that the policy or one of its configs names as `modules_to_save`."""
        configs = [self, *(c for c in self.chosen().values() if isinstance(c, PeftConfig))]
        return [name for config in configs for name in getattr(config, "modules_to_save", None) or ()]

    def rates(self) -> dict[str, Any]:
        """The learning rates, as `parameter_groups` and the trainers of this package take them."""
        towers = {p: c.lr for p, c in self.chosen().items() if isinstance(c, Train) and c.lr is not None}
        towers |= {name: rate for name, rate in (self.lr or {}).items() if name in PLACES}
        wholes = {name: rate for name, rate in (self.lr or {}).items() if name not in PLACES}
        return {"tower_lr": towers or None, "saved_modules_lr": wholes or None}

    def to_dict(self) -> dict[str, Any]:
        """Nested configs as PEFT writes them."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: _as_json(value) for name, value in plain.items()}

    # --- what it does ------------------------------------------------------------------------------------------------

    def apply(self, model: nn.Module, adapter_name: str = "default") -> PeftModel:
        """`get_peft_model(model, policy)`: the model with what the policy says, its frozen towers frozen.

        Raises:
            ValueError: the model lacks a tower, or a method can't act there. The model is as it was before.
        """
        return get_peft_model(model, self, adapter_name)

    def optimizer(self, model: nn.Module, args: Any) -> Any:
        """The optimizer that `TrainingArguments` name, with the policy's learning rates: for `Trainer(optimizers=...)`.

        Gates, scales, biases and norms get no weight decay. With `model_init` or FSDP, where `Trainer` takes no optimizer,
        pass `**policy.rates()` to a trainer of this package.
        """
        from transformers import Trainer

        from ..training.learning_rates import parameter_groups

        groups = parameter_groups(model, args.learning_rate, args.weight_decay, **self.rates())
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
        if options.keys() & {"params", "model", "optimizer_dict"}:
            raise ValueError(
                f"optim={args.optim} chooses its parameters itself, so no tower can have a rate of its own."
            )
        return kind(groups, **options)

    def table(self, model: nn.Module) -> Any:
        """What trains in each tower, how many parameters, and at which learning rate; `print` it.

        Args:
            model: One that has the policy, or a bare one, which isn't changed.
        """
        from .table import PolicyTable

        return PolicyTable.of(self, model)


def _choice(place: str, value: Any) -> Any:
    """What a tower is given, once it is found to be possible; from a file it comes as a string or a mapping."""
    if isinstance(value, Mapping):
        value = Train(**value) if set(value) <= {"lr"} else _from_json(place, value)
    if value == FROZEN or isinstance(value, Train):
        return value
    if value is Train:
        return Train()
    if not isinstance(value, PeftConfig):
        raise ValueError(f"TowerPolicy.{place} must be 'frozen', Train(lr=...) or a PEFT config, got {value!r}")
    if reason := _impossible(value):
        raise ValueError(f"TowerPolicy.{place} can't be {type(value).__name__}: {reason}")
    return value


def _impossible(config: Any) -> str | None:
    """Why a config's adapter can't be kept to a tower."""
    if isinstance(config, MultimodalConfig):
        if isinstance(config, TargetedConfig):
            return None
        method = method_of(config)
        title = "A policy" if method is None else method.title
        return (
            f"{title} isn't an adapter of one tower. Make it around the policy's model, by get_peft_model of its own."
        )
    tuner = dict[Any, Any](PEFT_TYPE_TO_TUNER_MAPPING).get(config.peft_type)
    in_modules = isinstance(tuner, type) and issubclass(tuner, BaseTuner) and tuner.forward is BaseTuner.forward
    if not in_modules or config.is_prompt_learning or getattr(tuner, "uses_shared_state", False):
        return "it keeps weights or code outside of a tower's modules. LoRA, IA3, OFT and their like can."
    if getattr(config, "bias", "none") != "none":
        return "bias must be 'none', since PEFT trains the biases of the whole model."
    beyond = [name for name in _BEYOND if getattr(config, name, None)]
    return f"{beyond[0]} reaches beyond a tower. Leave it out." if beyond else None


def _from_json(place: str, values: Mapping[str, Any]) -> PeftConfig:
    kind = values.get("peft_type")
    if not isinstance(kind, str) or kind == NAME.upper() or kind not in dict[Any, Any](PEFT_TYPE_TO_CONFIG_MAPPING):
        raise ValueError(f"TowerPolicy.{place} is of the PEFT type {kind!r}, which isn't known here.")
    try:
        return PeftConfig.from_peft_type(**values)
    except (TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"TowerPolicy.{place} isn't the config of a {kind} adapter: {error}") from error


def _as_json(value: Any) -> Any:
    if isinstance(value, PeftConfig):
        return {name: _as_json(inner) for name, inner in value.to_dict().items()}
    if isinstance(value, Train):
        return dataclasses.asdict(value)
    return sorted(value) if isinstance(value, set) else value


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf
