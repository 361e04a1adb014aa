"""Which experiments the suite runs: one of each method; `full` marks the others, whose configs are made in any case."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import experiment


def one_a_method(task: str) -> list[Any]:
    """The task's experiments as parameters."""
    names = experiment.names(task)
    first = {name.partition("/")[0]: name for name in reversed(names)}.values()
    return [pytest.param(name, marks=() if name in first else pytest.mark.full) for name in names]
