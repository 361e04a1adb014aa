"""The one list of methods, and the only file that touches PEFT's registries.

    @method(
        "my_method", MyMethodConfig, summary="...", use=Use(...), docs="docs/my-method.md", promises=Promises(...)
    )
    class MyMethodModel(MultimodalTuner): ...

makes a method known to PEFT and to this package: the doctor, the model card, the contract tests and the tables of the
documentation read `METHODS`.

`peft.utils.register_peft_method` accepts only names that are members of the enum `peft.PeftType`. `method` adds the member
to the enum of the running process and then calls PEFT's own function. No file is edited, no stock class is patched, and
importing the package twice (or reloading it in a notebook) is no error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from peft import PeftConfig, mapping
from peft.utils import PeftType, register_peft_method

Tuner = TypeVar("Tuner", bound=type)


@dataclass(frozen=True)
class Promises:
    """What a method claims. Whatever depends on it reads it here, and the contract's tests hold the method to it.

    Args:
        starts_as: What equals the base model before training: "base" (every output), or "images" (what images alone give;
            texts are read in another way from the start).
        acts_on: What a method puts something into: "matrices", the "layers" of encoders, the layers of the "decoder", or a
            whole "tower".
        classes: Whether it tells apart what `set_classes` names.
        rows: Whether `adapter_names=[...]` gives each row of a batch its own adapter.
        lora: Whether an adapter is a LoRA, exactly: its layers give `lora_factors`, and `export_lora` writes them for servers.
        companions: Files that stand beside the adapter's weights, by their path in its folder.
    """

    starts_as: Literal["base", "images"] = "base"
    acts_on: Literal["matrices", "layers", "decoder", "tower"] = "matrices"
    classes: bool = False
    rows: bool = False
    lora: bool = False
    companions: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Use:
    """When to take a method: its row of the README's table.

    Args:
        have: What the user has.
        want: What the user wants.
        cost: What it costs, in one or two figures that a benchmark printed.
        compare: What else to try on the same data.
    """

    have: str
    want: str
    cost: str
    compare: str


@dataclass(frozen=True)
class Method:
    """A method as it is registered.

    Args:
        name: As PEFT knows it, in lower case; the prefix of its parameters is this and an underscore.
        config, model: Its two classes.
        summary: What it is for, in one line.
        use: When to take it.
        docs: Path of its page in the repository.
        promises: What it claims.
        smallest: Makes a config of little more than defaults, to say what would be adapted.
    """

    name: str
    config: type[PeftConfig]
    model: Any
    summary: str
    use: Use
    docs: str
    promises: Promises
    smallest: Callable[[], Any]

    @property
    def title(self) -> str:
        """As people call it: the config's name without "Config"."""
        return self.config.__name__.removesuffix("Config")


METHODS: dict[str, Method] = globals().get("METHODS", {})  # a reloaded module keeps what is registered
"""Every method by its name."""


def method(
    name: str,
    config: type[PeftConfig],
    *,
    summary: str,
    use: Use,
    docs: str,
    promises: Promises,
    smallest: Callable[[], Any] | None = None,
) -> Callable[[Tuner], Tuner]:
    """Register the decorated tuner; the arguments are those of [`Method`].

    A reloaded module replaces its own earlier classes.

    Raises:
        RuntimeError: another package has registered a method of this name.
    """

    def register(model: Tuner) -> Tuner:
        tell_peft(name, config, model)
        METHODS[name] = Method(name, config, model, summary, use, docs, promises, smallest or config)
        return model

    return register


def type_of(config: Any) -> PeftType | None:
    """The PEFT type of a config of this package, by its class."""
    return next((PeftType(m.name.upper()) for m in METHODS.values() if isinstance(config, m.config)), None)


def method_of(config: Any) -> Method | None:
    """The method of a config, or of a PEFT type's value; None where it isn't one of this package's."""
    peft_type = getattr(config, "peft_type", config)
    return METHODS.get(str(getattr(peft_type, "value", peft_type)).lower())


def add_peft_type(name: str) -> PeftType:
    """Add a member (upper case) to `PeftType`: iteration, `PeftType(name)`, pickle, copy and JSON treat it as any other."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # EnumType.__setattr__ refuses members; the metaclass's parent doesn't.
    type.__setattr__(PeftType, name, member)
    return member


class Prefix(str):
    """The prefix of a method's parameters, which PEFT holds against the names of adapters.

    PEFT warns of names that are a piece of it ("a", "ro", "aurora"), whose weights it couldn't tell apart by their keys.
    These methods tell theirs by where they stand in the model, so no name is in the way.
    """

    def __contains__(self, name: object) -> bool:
        return False


def tell_peft(name: str, config: type, model: Any) -> None:
    """Let PEFT know a config and its model under a name; again, where a module is reloaded.

    Raises:
        RuntimeError: another package has registered this name.
    """
    peft_type: Any = add_peft_type(name.upper())
    known = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if known is not None:
        if known.__module__ != config.__module__:
            raise RuntimeError(
                f"Another package has registered the PEFT method {name!r} ({known.__module__}); uninstall one of the two."
            )
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING.pop(peft_type)
        mapping.PEFT_TYPE_TO_TUNER_MAPPING.pop(peft_type)
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING.pop(peft_type)
    model.prefix = f"{name}_"
    register_peft_method(name=name, config_cls=config, model_cls=model, prefix=Prefix(model.prefix))
