"""The three tables that most tasks report: what was reached, what it cost, and how sure the differences are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from . import report as tables
from .records import Record

PEER, BASE = "lora/r64", "base/frozen"
OTHERS = {PEER: "LoRA r=64", BASE: "frozen base"}

Groups = Mapping[str, Sequence[Record]]


def quality(groups: Groups, columns: Mapping[str, str]) -> str:
    """Mean ± standard deviation over seeds; `columns` is {name of a metric: head}."""
    rows = [
        [runs[0].label, str(len(runs)), *(tables.mean_spread([r.metrics[name] for r in runs]) for name in columns)]
        for runs in groups.values()
    ]
    return tables.markdown(["", "seeds", *columns.values()], rows)


def costs(groups: Groups) -> str:
    """Trained parameters, the adapter's file, processor seconds a step relative to LoRA r=64, memory, learning rate."""
    reference = tables.median(r.cost["step_processor_seconds"] for r in groups[PEER]) if PEER in groups else None
    rows = []
    for runs in groups.values():
        cost = runs[0].cost
        row = [runs[0].label, tables.count(cost["trainable_parameters"]), tables.megabytes(cost["adapter_bytes"])]
        if "step_processor_seconds" in cost:
            step = tables.median(r.cost["step_processor_seconds"] for r in runs)
            row += [
                f"{step / reference:.2f}" if reference else "",
                tables.megabytes(tables.median(r.cost["peak_extra_bytes"] for r in runs)),
                f"{runs[0].config['training']['learning_rate']:g}",
            ]
        rows.append(row + [""] * (6 - len(row)))
    heads = ["trained parameters", "file, MB", "step / LoRA r=64", "peak extra, MB", "learning rate"]
    return tables.markdown(["", *heads], rows)


def differences(groups: Groups, columns: Mapping[str, tables.ItemValues]) -> str:
    """Paired bootstrap against LoRA r=64 and the frozen base; `columns` is {head: a run's value for each item}."""
    rows = []
    for name, runs in groups.items():
        row = [runs[0].label]
        for values in columns.values():
            for other in OTHERS:
                compared = other in groups and other != name
                row.append(tables.difference(tables.paired(runs, groups[other], values)) if compared else "")
        rows.append(row)
    heads = [f"{head}: − {other}" for head in columns for other in OTHERS.values()]
    return tables.markdown(["", *heads], rows)
