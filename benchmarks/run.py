"""The benchmarks' only command.

    python -m benchmarks.run --task retrieval                                     # list the experiments
    python -m benchmarks.run --task retrieval --experiment aurora_mode_approx/r64 lora/r64 --seeds 0 1 2
    python -m benchmarks.run select --task retrieval --experiment lora/r64        # settings, on validation data
    python -m benchmarks.run report                                               # tables and plots of benchmarks/README.md

A run that has a result is skipped, so an interrupted series goes on where it stopped. With `--limit-steps` the results
go to `runs/smoke` instead.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import set_seed

from . import experiment as experiments
from . import records, tasks
from .report import write_reports

SMOKE = Path("runs/smoke")
CONSOLE = Console()
FINALISTS = 2


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.command == "report":
        for path in write_reports(options.results):
            CONSOLE.print(f"wrote {path}")
    elif not options.task:
        CONSOLE.print("tasks:", ", ".join(tasks.names()))
    elif not options.experiment:
        list_experiments(options.task)
    else:
        chosen = experiments.names(options.task) if options.experiment == ["all"] else options.experiment
        found = [experiments.load(options.task, name) for name in chosen]
        if options.command == "select":
            for item in found:
                select(item, options.seeds, options.limit_steps, options.results)
        else:
            for seed in options.seeds:
                for item in found:
                    if not item.trains and seed != options.seeds[0]:
                        continue  # nothing random in it
                    run(item, seed, options.limit_steps, options.results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=("run", "select", "report"), default="run")
    parser.add_argument("--task", choices=tasks.names())
    parser.add_argument("--experiment", nargs="+", metavar="METHOD/VARIANT", help="one or more, or `all`")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="0 1 2 unless given")
    parser.add_argument("--limit-steps", type=int, metavar="N", help="train N steps only; the results are thrown away")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help=argparse.SUPPRESS)
    return parser


def list_experiments(task: str) -> None:
    """Print the task's experiments and how many seeds each has."""
    done = [record.experiment for record in records.read_records(task)]
    table = Table("experiment", "row", "choice", "results")
    for name in experiments.names(task):
        item = experiments.load(task, name)
        choice = "open" if item.open else "-" if item.chosen is None else str(item.chosen)
        table.add_row(name, item.label, choice, str(done.count(name)))
    CONSOLE.print(table)


def run(item: experiments.Experiment, seed: int, limit: int | None, results: Path = records.RESULTS) -> None:
    """Train and evaluate once on test data, unless that result exists."""
    if item.open and limit is None:
        CONSOLE.print(f"{item.name} has an open choice and is left out: `select` one of its choices first")
        return
    folder = results if limit is None else SMOKE
    path = records.record_path(item.task, item.name, seed, folder)
    if path.exists() and limit is None:
        CONSOLE.print(f"{item.name}, seed {seed}: there is a result")
        return
    item = item if limit is None else item.limited(limit)
    started = time.perf_counter()
    outcome = _outcome(item, seed, "test")
    record = records.Record(
        task=item.task,
        experiment=item.name,
        label=item.label,
        seed=seed,
        config=item.as_dict(),
        environment=records.environment(),
        **outcome,
    )
    record.write(folder)
    score = tasks.load(item.task).score(outcome["metrics"])
    CONSOLE.print(f"{item.name}, seed {seed}: {score:.2f} in {time.perf_counter() - started:.0f} s, {path}")


def select(
    item: experiments.Experiment, seeds: Sequence[int], limit: int | None, results: Path = records.RESULTS
) -> None:
    """Try the experiment's choices on validation data and write the best one into its file.

    Every choice is tried with the first seed, and the best two with the others too: their mean decides. What is tried is
    kept in `results/<task>/choices`, and not tried again.
    """
    if not item.choices:
        CONSOLE.print(f"{item.name} has nothing to choose")
        return
    left = list(range(len(item.choices)))
    scores: dict[int, list[float]] = {index: [] for index in left}
    for seed in seeds:
        for index in left:
            scores[index].append(_try(item, index, seed, limit, results))
        left = sorted(left, key=lambda index: -sum(scores[index]))[:FINALISTS]
    best = left[0]
    CONSOLE.print(
        f"{item.name}: chosen {item.choices[best]}, {sum(scores[best]) / len(scores[best]):.2f} on validation"
    )
    if limit is None:
        item.decide(best)


def _try(item: experiments.Experiment, index: int, seed: int, limit: int | None, results: Path) -> float:
    """Score of one choice with one seed, from the file where it was tried before."""
    tried = item.choose(index)
    folder = (results if limit is None else SMOKE) / item.task / "choices"
    path = folder / f"{item.name.replace('/', '_')}_{index}{f'_seed{seed}' if seed else ''}.json"
    kept = records.read_json(path) if limit is None else None
    if kept is None or kept["config"] != tried.as_dict():
        try:
            metrics = _outcome(tried if limit is None else tried.limited(limit), seed, "validation")["metrics"]
            score = tasks.load(item.task).score(metrics)
        except FloatingPointError as error:  # a setting that diverges is a bad one, not a broken run
            metrics, score = {"error": str(error)}, 0.0
        kept = {"choice": item.choices[index], "score": score, "seed": seed, "metrics": metrics}
        kept |= {"config": tried.as_dict(), "environment": records.environment()}
        records.write_atomically(path, records.compact(kept))
    CONSOLE.print(f"{item.name}, {kept['choice']}, seed {seed}: {kept['score']:.2f} on validation")
    return kept["score"]


def _outcome(item: experiments.Experiment, seed: int, split: tasks.Split) -> dict:
    gc.collect()
    set_seed(seed)
    return tasks.load(item.task).run(item, seed, split)


if __name__ == "__main__":
    main()
