"""From results to the tables and plots of `benchmarks/README.md`; what the tasks' reports share."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peft_multimodal.core.registry import METHODS
from peft_multimodal.evaluation import PairedDifference, paired_bootstrap

from . import tasks
from .records import RESULTS, Record, read_records, write_atomically

README = Path(__file__).parent / "README.md"
OWN = tuple(f"{name}/" for name in METHODS)


def write_reports(results: Path = RESULTS, readme: Path = README) -> list[Path]:
    """Each task's report between its markers in the README; a task without results keeps what stands there."""
    text = readme.read_text("utf-8") if readme.is_file() else "# Benchmarks\n"
    for task in tasks.names():
        if found := read_records(task, results):
            text = insert(text, task, f"{tasks.load(task).report(found, results)}\n{hardware(found)}")
    write_atomically(readme, text)
    return [readme, *sorted(results.glob("*.png"))]


def insert(text: str, name: str, content: str) -> str:
    """`content` between the markers of `name`, which are put at the end when the text has none."""
    start, end = f"<!-- results: {name} -->", f"<!-- end of results: {name} -->"
    block = f"{start}\n{content.strip()}\n{end}"
    if start in text:
        return re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: block, text, flags=re.DOTALL)
    return f"{text.rstrip()}\n\n{block}\n"


def hardware(records: Sequence[Record]) -> str:
    """One sentence: where and with which versions the results were made."""
    kinds = sorted({(r.environment["cpu"], r.environment["cores"], r.environment["threads"]) for r in records})
    machines = "; ".join(f"{cpu}, {cores} cores, {threads} thread(s) used" for cpu, cores, threads in kinds)
    names = ("python", "torch", "transformers", "peft", "peft_multimodal")
    versions = ", ".join(f"{n} {' and '.join(sorted({r.environment[n] for r in records}))}" for n in names)
    return f"{machines}. {versions}."


def by_experiment(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The runs of each experiment in the order of seeds; ours last, else by the number of trainable parameters."""
    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r.experiment.startswith(OWN), parameters(r), r.experiment, r.seed)):
        groups.setdefault(record.experiment, []).append(record)
    return groups


def parameters(record: Record) -> int:
    return record.cost.get("trainable_parameters", 0)


def mean_spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± sample standard deviation over seeds; the mean alone of one seed."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def count(number: float) -> str:
    """1234567 as 1.23M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def megabytes(size: float) -> str:
    return f"{size / 1e6:.2f}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


ItemValues = Callable[[Record], tuple[Sequence[float], Sequence[Hashable]]]
"""Of a run: one value per test item, and the group that each item belongs to."""


def paired(a: Sequence[Record], b: Sequence[Record], values: ItemValues) -> PairedDifference | None:
    """Bootstrap over test items of a's mean minus b's, each item's value being its mean over the seeds of both.

    The frozen base, which has no seeds, is compared with every one; None where two trained ones have none in common.
    """
    if parameters(a[0]) and parameters(b[0]):
        seeds = {record.seed for record in a} & {record.seed for record in b}
        a, b = ([record for record in side if record.seed in seeds] for side in (a, b))
    if not a or not b:
        return None
    (left, groups), (right, others) = (_mean_values(side, values) for side in (a, b))
    if list(groups) != list(others):
        raise ValueError(f"{a[0].experiment} and {b[0].experiment} were evaluated on different items.")
    return paired_bootstrap(left, right, groups)


def _mean_values(records: Sequence[Record], values: ItemValues) -> tuple[np.ndarray, Sequence[Hashable]]:
    rows, groups = zip(*(values(record) for record in records), strict=True)
    return np.mean(np.asarray(rows, dtype=np.float64), axis=0), groups[0]


def difference(found: PairedDifference | None) -> str:
    """`+1.2 [-0.3, 2.7]`: the difference and its 95 % interval."""
    return "" if found is None else f"{found.difference:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


@dataclass(frozen=True)
class Point:
    """A point of a plot: seeds' values along y, and along x."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    own: bool


def plot_points(
    points: Sequence[Point],
    path: Path,
    xlabel: str,
    ylabel: str,
    log: bool = False,
    level: tuple[str, float] | None = None,
) -> None:
    """Means with the seeds' spread as error bars, ours in another colour, `level` a dashed line with its name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for own, colour in ((False, "tab:gray"), (True, "tab:red")):
        shown = [point for point in points if point.own == own]
        axes.errorbar(
            [statistics.fmean(p.x) for p in shown],
            [statistics.fmean(p.y) for p in shown],
            xerr=None if log else [_spread(p.x) for p in shown],
            yerr=[_spread(p.y) for p in shown],
            fmt="o",
            capsize=3,
            color=colour,
        )
        for point in shown:
            axes.annotate(
                point.label,
                (statistics.fmean(point.x), statistics.fmean(point.y)),
                xytext=(6, 4),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
    if level is not None:
        axes.axhline(level[1], linestyle="--", color="tab:blue", linewidth=1)
        axes.annotate(level[0], (0.01, level[1]), xycoords=("axes fraction", "data"), fontsize=8, color="tab:blue")
    if log:
        axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
