"""`help()` of every public name is whole: arguments, an example, the source of a method; what is printed fits a screen."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from docs_reader import example_of
from families import FAMILIES
from methods import CASES
from methods import METHODS as CONFIGS

import peft_multimodal
from peft_multimodal import describe, matched_modules
from peft_multimodal.core.anatomy import SCREEN, table
from peft_multimodal.core.registry import METHODS
from peft_multimodal.core.tuner import MultimodalTuner

NAMES = sorted({*peft_multimodal.__all__} - {"__version__"})


def documented(value: Any) -> set[str]:
    """Names under "Args:" of a docstring; those of `MultimodalConfig`, to which every config refers, count too."""
    refers = isinstance(value, type) and issubclass(value, peft_multimodal.MultimodalConfig)
    names: set[str] = set()
    for owner in (value, peft_multimodal.MultimodalConfig) if refers else (value,):
        section = re.search(r"^Args:\n((?: +.*\n|\n)+)", (inspect.getdoc(owner) or "") + "\n", re.MULTILINE)
        names |= {*re.findall(r"^ {4}(\w+): ", section.group(1), re.MULTILINE)} if section else set()
    return names


def arguments(value: Any) -> set[str]:
    """What a caller passes; models of methods are made by `get_peft_model`, metrics by `evaluate`."""
    if isinstance(value, type) and (issubclass(value, MultimodalTuner) or "_info" in vars(value)):
        return set()
    return {*inspect.signature(value).parameters} - {"self"}


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_explained(name: str):
    value = getattr(peft_multimodal, name)
    assert arguments(value) <= documented(value)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_an_example_that_uses_it(name: str):
    made = {METHODS[m].model.__name__: METHODS[m].config.__name__ for m in METHODS}
    assert re.search(rf"\b(?:{name}|{made.get(name, name)})\b", example_of(name))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_names_its_source(name: str):
    assert "\nSource: " in (inspect.getdoc(METHODS[name].model) or "")


@pytest.mark.parametrize("name", sorted({family for family, _ in CASES}))
def test_tables_fit_a_screen(name: str):
    family = FAMILIES[name]
    model = family.build()
    configs = [CONFIGS[case](family) for other, case in CASES if other == name]
    tables = [str(describe(model)), *(str(matched_modules(model, config)) for config in configs)]
    assert max(len(line) for text in tables for line in text.splitlines()) <= SCREEN


def test_a_wide_table_loses_beginnings():
    text = table(("module", "role"), [(f"{'layers.' * 20}q_proj", "vision.q.3")], 30)
    assert text.splitlines()[2] == f"…{('layers.' * 20 + 'q_proj')[-17:]}  vision.q.3"
