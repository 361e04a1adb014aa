"""The tasks. A task is a module of this package with the functions of `Task`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from ..experiment import Experiment
from ..records import Record

Split = Literal["validation", "test"]


class Task(Protocol):
    """What a task module offers."""

    def run(self, experiment: Experiment, seed: int, split: Split) -> dict[str, Any]:
        """Train as the experiment says and evaluate on `split`.

        Returns:
            `metrics`, a flat mapping of floats; `items`, compact per-item outcomes for the paired bootstrap; and
            `cost`, a mapping as `measure.fit` gives it. All of it must be JSON.
        """

    def score(self, metrics: Mapping[str, float]) -> float:
        """What the choice of a setting maximises, from metrics on the validation split."""

    def report(self, records: Sequence[Record], plots: Path) -> str:
        """Markdown tables of the results that exist so far; images go into the folder `plots`."""


def names() -> list[str]:
    """The tasks there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Task:
    """The module `benchmarks.tasks.<name>`."""
    if name not in names():
        raise ValueError(f"There is no task {name!r}; there are {', '.join(names())}.")
    return cast(Task, importlib.import_module(f"{__name__}.{name}"))
