"""The only file that touches PEFT's registries.

`peft.utils.register_peft_method` accepts only names that are members of the enum `peft.PeftType`. `register` adds
the member to the enum of the running process and then calls PEFT's own function. No file is edited, no stock class
is patched, and importing the package twice (or reloading it in a notebook) is no error.
"""

from __future__ import annotations

from typing import Any

from peft import mapping
from peft.utils import PeftType, register_peft_method


def add_peft_type(name: str) -> PeftType:
    """Add `name` as a member to `PeftType`: iteration, `PeftType(name)`, pickle, copy and JSON treat it as any other.

    Args:
        name: The member's name and value, upper case.
    """
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


def register(name: str, config_cls: type, model_cls: type) -> None:
    """Make a method known to PEFT under `name` (lower case); a reloaded module replaces its own earlier classes."""
    peft_type: Any = add_peft_type(name.upper())
    known = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if known is not None:
        if known.__module__ != config_cls.__module__:
            raise RuntimeError(
                f"Another package has registered the PEFT method {name!r} ({known.__module__}); uninstall one of the two."
            )
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING.pop(peft_type)
        mapping.PEFT_TYPE_TO_TUNER_MAPPING.pop(peft_type)
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING.pop(peft_type)
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
