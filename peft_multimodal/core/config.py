"""The fields that every method's config has, and how a field is checked."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig

from .._version import INSTALL, __version__
from ..model_card import CardNotes, write_card
from . import anatomy

FORMAT_VERSION = 1  # of the adapter's files; raised when an older version of the package couldn't read them
SIGNATURE = 'a dictionary with {tower: [attentions, width]} as "towers" and {role: [[first, last], ...]} as "roles", as it was saved'

Config = TypeVar("Config", bound="MultimodalConfig")


@dataclass
class MultimodalConfig(PeftConfig):
    """The fields that every method of the package has.

    Args:
        modules_to_save: Modules that are trained and saved as a whole beside the adapter, such as a projection.
        format_version, package_version, base_signature: Filled in; they travel with the adapter and are checked
            when it is loaded.
    """

    target_modules: ClassVar[Any] = None  # PEFT reads it off every config
    modules_to_save: list[str] | None = None
    format_version: int = FORMAT_VERSION
    package_version: str | None = None
    base_signature: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # PEFT's own `PeftConfig.from_pretrained` passes by ours: the signature tells that it comes from a file.
        self.is_loaded = self.base_signature is not None
        self.has_weights = False  # of a loaded one: they have been found to fit
        self.best_is_loaded = False  # whether somebody cares for load_best_model_at_end
        self._local_base: str | None = None  # the base, if it was in a folder as seen where the model was wrapped
        self._card: tuple[str, CardNotes] | None = None  # the adapter's name and what its model knows for the card
        self._base_name: tuple[str | None] | None = None  # while `base_model_name_or_path` names a folder of the cache
        self.stored_in: str | None = None  # of a loaded one: the folder, if it is one on this machine
        self.stored_wholes: list[str] = []  # of a loaded one: its modules_to_save in the file
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

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        config = super().from_pretrained(*args, **kwargs)
        config.is_loaded = True
        root = args[0] if args else kwargs.get("pretrained_model_name_or_path", "")
        subfolder = args[1] if len(args) > 1 else kwargs.get("subfolder")
        config.stored_in = str(Path(root, subfolder or ""))
        config.stored_wholes = list(config.modules_to_save or ())
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Also renews the model card, which PEFT has begun: PEFT writes it before the weights, the config after them."""
        self.show_base()
        super().save_pretrained(save_directory, **kwargs)
        self._warn_of_checkpoint(Path(save_directory))
        if self._card is not None:
            adapter_name, notes = self._card
            folder = Path(save_directory)
            root = folder if adapter_name == "default" else folder.parent
            write_card(root, root.name, notes, self._local_base)

    def hide_base(self) -> None:
        """Name the base by a folder on this machine, or not at all, until `show_base`."""
        self.show_base()
        self._base_name = (self.base_model_name_or_path,)
        self.base_model_name_or_path = known_here(self.base_model_name_or_path)

    def show_base(self) -> None:
        if self._base_name is not None:
            (self.base_model_name_or_path,), self._base_name = self._base_name, None

    def _warn_of_checkpoint(self, folder: Path) -> None:
        """Once: the stock Trainer looks for its best model in a checkpoint's root, where "default" is."""
        if re.fullmatch(r"checkpoint-\d+", folder.parent.name) and not self.best_is_loaded:
            self.best_is_loaded = True
            warnings.warn(
                f"The adapter {folder.name!r} is saved in {folder}, where Trainer(load_best_model_at_end=True) doesn't look: "
                'it knows one adapter, called "default", and would keep the last weights. Give it '
                "callbacks=[peft_multimodal.AdapterCallback()], which loads the best of every adapter.",
                stacklevel=4,
            )

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

    def check_flag(self, name: str) -> None:
        self.check(name, "True or False", lambda v: isinstance(v, bool))


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

        cls.__init__ = __init__  # type: ignore
        return cls

    return decorate


_TARGETS = TargetedConfig.__annotations__.keys()


def heads_for(width: int) -> int:
    """Attention heads where nobody chose them: 4, or the largest number below that divides the width."""
    return next(n for n in (4, 3, 2, 1) if width % n == 0)


def is_strings(value: Any) -> bool:
    return isinstance(value, (list, tuple, set)) and all(isinstance(v, str) for v in value)


def known_here(base: str | None) -> str | None:
    """A folder on this machine with the config of a base model; None where there is none.

    PEFT compares the sizes of vocabularies by it when an adapter is saved, and asks the Hub where it isn't named a folder.
    """
    if not base or Path(base, "config.json").is_file():
        return base
    with suppress(HFValidationError):
        cached = try_to_load_from_cache(base, "config.json")
        if isinstance(cached, str):
            return str(Path(cached).parent)
    return None


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
