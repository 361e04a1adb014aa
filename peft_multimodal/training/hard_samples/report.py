"""The page that shows what a bank remembers: one HTML file with its images in it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...images import read_image
from ...rows import hash_ids, streams
from .record import PairRecord

THUMBNAIL = 160  # pixels

_STYLE = """
body { font-family: system-ui, sans-serif; margin: 2em auto; max-width: 70em; color: #222; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(12em, 1fr)); gap: 1em; }
figure { margin: 0; padding: .6em; border: 1px solid #ddd; overflow-wrap: anywhere; }
figure img, .histogram { max-width: 100%; }
figcaption { font-size: .85em; }
small { color: #666; }
"""


def write_report(bank: PairRecord, path: Path, dataset: Any, image_column: str, text_column: str, pairs: int) -> Path:
    """See `HardSampleBank.report`."""
    hardest = np.argsort(-bank.difficulty, kind="stable")[:pairs]
    suspects = np.flatnonzero(np.isin(bank.keys, bank.suspects))
    suspects = suspects[np.argsort(-bank.difficulty[suspects], kind="stable")]

    samples = _rows_of(bank, dataset, np.concatenate([hardest, suspects[:pairs]]))

    def figures(rows: np.ndarray) -> str:
        return "".join(_figure(bank, row, samples.get(int(row), {}), image_column, text_column) for row in rows[:pairs])

    visited = int((bank.visits > 0).sum())
    gone = np.nan_to_num(bank.base_difficulty - bank.difficulty)
    body = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Hard samples</title><style>{_STYLE}</style></head><body>
<h1>Hard samples</h1>
<p>{len(bank):,} pairs, {visited:,} of them visited ({int(bank.visits.sum()):,} visits). Mean difficulty
{bank.difficulty.mean():.3f} by "{html.escape(bank.settings.difficulty)}", which has fallen by {gone.mean():.3f} from the
open model's.</p>
<h2>Difficulties over time</h2>
<img class="histogram" alt="Histogram of difficulties over time" src="data:image/png;base64,{_histogram(bank)}">
<h2>The hardest pairs</h2>
<div class="pairs">{figures(hardest)}</div>
<h2>Suspected mismatches</h2>
<p>{len(suspects):,} pairs stay among the hardest and don't get easier.</p>
<div class="pairs">{figures(suspects)}</div>
</body></html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(body, encoding="utf-8")
    return path


def _rows_of(bank: PairRecord, dataset: Any, rows: np.ndarray) -> dict[int, Mapping[str, Any]]:
    """The data set's rows of some of the bank's; empty without a data set."""
    if dataset is None:
        return {}
    if not streams(dataset):
        positions = bank.positions_in(dataset)
        return {int(row): dataset[int(positions[row])] for row in rows}
    wanted = {int(bank.keys[row]): int(row) for row in rows}
    samples: dict[int, Mapping[str, Any]] = {}
    for sample in dataset:
        if (row := wanted.pop(int(hash_ids([sample[bank.id_column]])[0]), None)) is not None:
            samples[row] = sample
        if not wanted:
            return samples
    raise ValueError(
        f"The data set doesn't have {len(wanted)} of the bank's pairs that are to be shown: it is another."
    )


def _figure(bank: PairRecord, row: int, sample: Mapping[str, Any], image: str, text: str) -> str:
    name = sample.get(bank.id_column, int(bank.keys[row]))
    words = sample.get(text, "")
    words = words[0] if isinstance(words, (list, tuple)) and words else words
    return (
        f"<figure>{_thumbnail(sample.get(image))}<figcaption>{html.escape(str(words))}<br><small>{html.escape(str(name))}: "
        f"{bank.difficulty[row]:.3f}, at first {bank.base_difficulty[row]:.3f}, {bank.visits[row]} visits</small>"
        "</figcaption></figure>"
    )


def _thumbnail(value: Any) -> str:
    try:
        image = read_image(value)
    except (TypeError, ValueError):  # the report shows the pair without it
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _histogram(bank: PairRecord) -> str:
    """A PNG in base64: one line each time that difficulties were ranked."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The report needs matplotlib: pip install matplotlib") from error

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots()
    middle = [entry for entry in bank.history if entry[1].sum()]
    shown = [middle[i] for i in np.unique(np.linspace(0, len(middle) - 1, 8).astype(int))] if middle else []
    for i, (step, counts) in enumerate(shown):
        edges = np.linspace(0, 1, len(counts) + 1)
        axes.stairs(counts, edges, color=str(0.75 * (1 - (i + 1) / len(shown))), label=f"step {max(step, 0)}")
    axes.set_xlabel("difficulty" if bank.settings.difficulty != "loss" else "difficulty; 1 and more in the last bar")
    axes.set_ylabel("pairs")
    if shown:
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
