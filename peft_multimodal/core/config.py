"""The fields that every method's config has, and how a field is checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from peft import PeftConfig

from .._version import INSTALL, __version__
from . import anatomy
from .companions import Origin, companions, record_of
from .registry import type_of

FORMAT_VERSION = 1  # of the adapter's files; raised when an older version of the package couldn't read them
SIGNATURE = 'a dictionary with {tower: [attentions, width]} as "towers" and {role: [[first, last], ...]} as "roles", as it was saved'

Config = TypeVar("Config", bound="MultimodalConfig")


@dataclass
class MultimodalConfig(PeftConfig):
    """The fields that every method of the package has; a method's own config adds to them.

    A wrong value is refused where it is set, with the name of the field, what is allowed and what was given.

    Args:
        task_type: PEFT's, such as "CAUSAL_LM"; None, the default, suits vision-language models.
        peft_type: Filled in by the method.
        auto_mapping: Filled in by PEFT.
        peft_version: Filled in by PEFT.
        base_model_name_or_path: The base model's id or folder; filled in.
        revision: The base model's revision.
        inference_mode: Whether the adapter is frozen.
        modules_to_save: Modules that are trained and saved as a whole beside the adapter, such as a projection.
        format_version: Of the adapter's files; filled in, and checked when they are loaded.
        package_version: Of this package; filled in.
        base_signature: What the base model has, {tower: [attentions, width]} among other things; filled in, and
            checked when the adapter is loaded.

    Raises:
        ValueError: a field has a wrong value, or the files have a newer format.

    Examples:
        >>> from peft import PeftConfig
        >>> config = AuroraModeApproxConfig(r=8, modules_to_save=["visual_projection"])
        >>> config.save_pretrained("config-alone")
        >>> isinstance(PeftConfig.from_pretrained("config-alone"), MultimodalConfig)
    """

    target_modules: ClassVar[Any] = None  # PEFT reads it off every config
    modules_to_save: list[str] | None = None
    format_version: int = FORMAT_VERSION
    package_version: str | None = None
    base_signature: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = type_of(self)
        self.package_version = self.package_version or __version__
        self.check("modules_to_save", "a list of strings", lambda v: v is None or is_strings(v))
        self.check("base_signature", SIGNATURE, lambda v: v is None or is_signature(v))
        if type(self.format_version) is not int or self.format_version < 1:
            raise ValueError(f"format_version must be a positive integer, got {self.format_version!r}")
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This adapter has format {self.format_version}, written by peft_multimodal {self.package_version}; this is "
                f"{__version__}, which reads formats up to {FORMAT_VERSION}. Upgrade: {INSTALL} in newer sources."
            )

    @property
    def is_loaded(self) -> bool:
        """Whether it describes an adapter that was made already, and so knows its base: it was read from a file."""
        return self.base_signature is not None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """Read a config from an adapter's folder or from the Hub, as `peft.PeftConfig.from_pretrained` does.

        Args:
            pretrained_model_name_or_path: A folder, or the id of a repository.
            subfolder: Within it.
            kwargs: `revision`, `token`, `cache_dir`, ...
        """
        source = str(pretrained_model_name_or_path)
        config: Any = super().from_pretrained(source, subfolder=subfolder, **kwargs)
        hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir") if kwargs.get(name) is not None}
        record_of(config).origin = Origin(source, subfolder, hub, tuple(config.modules_to_save or ()))
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config. Where a model is being saved, the adapter's companion files are written as well.

        Args:
            save_directory: A folder.
            kwargs: As of `peft.PeftConfig.save_pretrained`.
        """
        with companions(self, Path(save_directory)):
            super().save_pretrained(save_directory, **kwargs)

    def check(self, name: str, expected: str, accepts: Callable[[Any], Any]) -> None:
        """Raise the one message for a bad field unless `accepts(value)`."""
        value = getattr(self, name)
        if not accepts(value):
            raise ValueError(f"{type(self).__name__}.{name} must be {expected}, got {value!r}")

    def check_number(self, name: str, low: float, high: float = float("inf"), integer: bool = False) -> None:
        """The field is a number (no bool, no string) within [low, high]."""
        kinds = (int,) if integer else (int, float)
        expected = f"{'an integer' if integer else 'a number'} >= {low}" + (
            f" and <= {high}" if high < float("inf") else ""
        )
        self.check(name, expected, lambda v: type(v) in kinds and low <= v <= high)

    def check_choice(self, name: str, choices: Collection[str]) -> None:
        self.check(name, "one of " + ", ".join(map(repr, choices)), lambda v: isinstance(v, str) and v in choices)

    def check_flags(self, *names: str) -> None:
        for name in names:
            self.check(name, "True or False", lambda v: isinstance(v, bool))

    def check_sizes(self, *names: str) -> None:
        for name in names:
            self.check(name, "a positive integer or None", lambda v: v is None or (type(v) is int and v > 0))

    def check_strings(self, *names: str) -> None:
        for name in names:
            self.check(name, "a string or None", lambda v: v is None or (isinstance(v, str) and v))


@dataclass
class TargetedConfig(MultimodalConfig):
    """The fields of methods that choose among a model's sites.

    Args:
        target_modules: PEFT's forms: a regex, a list of name endings, `"all-linear"`; None takes the method's default.
        exclude_modules: Names or a regex that are left out.
        towers: Any of "vision", "text", "fusion", "decoder"; None takes all. `describe(model)` shows what a model has.
        layers_to_transform: Only layers with these indices (with a list of name endings as `target_modules`).
        layers_pattern: The name of the list of layers that the indices refer to.

    The other arguments are those of [`MultimodalConfig`].
    """

    target_modules: list[str] | str | None = None  # type: ignore[misc]
    exclude_modules: list[str] | str | None = None
    towers: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.towers, str):
            self.towers = [self.towers]
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            self.check(
                name, "a string or a list of strings", lambda v: v is None or isinstance(v, str) or is_strings(v)
            )
        self.check("towers", "a list of strings", lambda v: v is None or is_strings(v))
        self.check("towers", f"any of {anatomy.TOWERS}", lambda v: v is None or (v and set(v) <= set(anatomy.TOWERS)))
        self.check(
            "layers_to_transform",
            "an index or a list of indices",
            lambda v: v is None or all(type(i) is int and i >= 0 for i in (v if isinstance(v, (list, tuple)) else [v])),
        )
        self.check(
            "layers_pattern",
            "set together with layers_to_transform",
            lambda v: not v or self.layers_to_transform is not None,
        )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, sorted(value) if isinstance(value, (list, tuple, set)) else value)


def takes_no_targets(tower: str, reason: str) -> Callable[[type[Config]], type[Config]]:
    """Decorate the config of a method that has no choice of sites: it refuses what would choose, and says why.

    Files of earlier releases hold these fields as null, which the constructor passes over.

    Args:
        tower: The one that the method acts on, which may be named.
        reason: Why `target_modules` and its like must be None.
    """

    def decorate(cls: type[Config]) -> type[Config]:
        init: Any = cls.__init__

        @wraps(init)
        def __init__(self: Config, *args: Any, **kwargs: Any) -> None:
            for name in _TARGETS & kwargs.keys():
                value = kwargs.pop(name)
                allowed: list[Any] = [None]
                expected = f"None: {reason}"
                if name == "towers":
                    allowed, expected = [None, tower, [tower], (tower,)], f"None or [{tower!r}]"
                if value not in allowed:
                    raise ValueError(f"{cls.__name__}.{name} must be {expected}, got {value!r}")
            init(self, *args, **kwargs)

        cls.__init__ = __init__  # type: ignore[method-assign, assignment]
        return cls

    return decorate


_TARGETS = TargetedConfig.__annotations__.keys()


def check_heads(config: Any, width: str) -> None:
    """`num_heads` divides the field `width`. Where nobody chose it, it is filled in: 4, or fewer where 4 doesn't divide."""
    size = getattr(config, width)
    if config.num_heads is None:
        config.num_heads = next(n for n in (4, 3, 2, 1) if size % n == 0)
    config.check_number("num_heads", 1, integer=True)
    config.check("num_heads", f"a divisor of {width}", lambda v: size % v == 0)


def check_bottleneck(config: Any) -> None:
    """Check the fields of a bottleneck with transformer layers in it."""
    for name in ("bottleneck_dim", "ff_mult"):
        config.check_number(name, 1, integer=True)
    check_heads(config, "bottleneck_dim")
    config.check_number("num_layers", 0, 1000, integer=True)
    config.check_number("dropout", 0, 0.999)


def is_strings(value: Any) -> bool:
    return isinstance(value, (list, tuple, set)) and all(isinstance(v, str) for v in value)


def is_signature(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    towers, roles = (value.get(name) or {} for name in ("towers", "roles"))
    return (
        isinstance(towers, dict)
        and all(_are_two_integers(size) for size in towers.values())
        and isinstance(roles, dict)
        and all(isinstance(spans, list) and all(map(_are_two_integers, spans)) for spans in roles.values())
    )


def _are_two_integers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(type(i) is int for i in value)
