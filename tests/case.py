"""What a method's test file declares for the contract.

    CASES = [Case("my_method", my_config, my_parameters, anywhere=MyMethodConfig)]      # in tests/test_my_method.py

The contract's tests run every case on every family; what the method promises they read from its registration.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from families import FAMILIES
from peft import PeftConfig
from torch import nn

from peft_multimodal.core import registry
from peft_multimodal.core.registry import Method, Promises

ANY_MARKER, ANY_WIDTH = 9, 12  # of classes that are no family: the first word of the first row, and features' width


@dataclass(frozen=True)
class Case:
    """A method under contract.

    Args:
        name: The method's, with a dash and a word behind it for a variant: "my_method-with-this".
        config: (family, **changes) -> a small config, or None where the method doesn't apply to the family.
        parameters: (base, config) -> how many numbers train, by the formula of its page.
        anywhere: Makes a small config for classes that are no family here (transformers' auto mappings).
        whole: Makes a config of usual size, whose cost is measured on models of usual size; None: as `anywhere`.
        refusal: In the message where the method doesn't apply; "" where it applies everywhere.
        merge: What `merge_and_unload` takes; None where the method doesn't merge.
        bad: (field, value) of its own fields that a config refuses.
        other: Changes of a config that give an adapter other sizes; None where `test_contract.py` has them.
        fsdp_policy: How FSDP may take the model apart; "NO_WRAP": not at all.
    """

    name: str
    config: Callable[..., PeftConfig | None]
    parameters: Callable[[nn.Module, Any], int]
    anywhere: Callable[[], PeftConfig] | None = None
    whole: Callable[[], PeftConfig] | None = None
    refusal: str = ""
    merge: dict[str, Any] | None = None
    bad: tuple[tuple[str, Any], ...] = ()
    other: dict[str, Any] | None = None
    fsdp_policy: str = "TRANSFORMER_BASED_WRAP"

    @property
    def method(self) -> Method:
        return registry.METHODS[self.name.partition("-")[0]]

    @property
    def promises(self) -> Promises:
        return self.method.promises

    def has(self, field: str) -> bool:
        """Whether the method's config has a field of this name."""
        return field in {f.name for f in fields(self.method.config)}

    def families(self) -> list[str]:
        """Names of the families that it applies to."""
        return [name for name, family in FAMILIES.items() if self.config(family) is not None]


@functools.cache
def declared() -> dict[str, Case]:
    """The cases of all registered methods, by name."""
    modules = [importlib.import_module(f"test_{name}") for name in sorted(registry.METHODS)]
    return {case.name: case for module in modules for case in module.CASES}
