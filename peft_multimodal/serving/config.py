"""What a LoRA's config has to be before anything is computed from it: whoever wrote the folder may have written anything."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

LARGEST = 2**31  # no server's and no tensor's rank; above it floats overflow


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < LARGEST


def _is_scale(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST  # and not NaN


def _is_pattern(value: Any, holds: Callable[[Any], bool]) -> bool:
    return value is None or (isinstance(value, dict) and all(_compiles(key) and holds(v) for key, v in value.items()))


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a positive integer below 2^31", _is_rank),
    "lora_alpha": ("a number below 2^31", _is_scale),
    "rank_pattern": ("an object of positive integers by patterns of names", lambda v: _is_pattern(v, _is_rank)),
    "alpha_pattern": ("an object of numbers by patterns of names", lambda v: _is_pattern(v, _is_scale)),
    "use_rslora": ("true or false", lambda v: v is None or isinstance(v, bool)),
    "modules_to_save": ("a list of names or null", _is_names),
    "target_modules": ("a list of names, a pattern or null", lambda v: isinstance(v, str) or _is_names(v)),
}


def faults_of(config: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each field that is missing or holds what it can't."""
    for name, (wanted, holds) in _FIELDS.items():
        if name in ("r", "lora_alpha") and name not in config:
            yield f"adapter_config.json has no {name}."
        elif not holds(config.get(name)):
            yield f"{name} in adapter_config.json must be {wanted}, not {shown(config[name])}."


def shown(value: Any) -> str:
    """A value as a message holds it: without commands to a terminal, and cut where it is long."""
    try:
        text = ascii(value)
    except ValueError:  # an integer of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
