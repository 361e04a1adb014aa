"""Teach the English CLIP four languages from translation pairs alone: the first job of `make quickstart`, minutes.

A frozen multilingual encoder and one small adapter learn, from the names of the training concepts in Chinese, Japanese,
German and Persian, what the English text tower makes of the English names. No image is used in training. Printed is how
well images of other concepts are found by their names in each language, before and after; the adapter is saved and
loaded again; an image shows the same gallery searched in all four. Everything lands in `runs/quickstart`.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import set_seed

import peft_multimodal
from peft_multimodal.evaluation import retention

from . import experiment as experiments
from .assets import e5_small
from .assets.languages import LANGUAGES
from .tasks import language, retrieval

FOLDER, DOCS = Path("runs/quickstart"), Path("docs/languages.svg")
SEED, THREADS, STEPS, STYLE = 0, 2, 600, "google"
READERS = ("English text tower", "adapter")
Metrics = Mapping[str, float]
CONSOLE = Console()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quickstart_language", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--docs", action="store_true", help=f"write the image to {DOCS} too")
    parser.add_argument("--steps", type=int, default=STEPS, help="train so many steps")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    run(options.steps, options.docs)


def run(steps: int = STEPS, docs: bool = False) -> tuple[Table, list[Path]]:
    """Do the job; its results in short, and the paths of its images."""
    retrieval.english_clip(), retrieval.emoji_images(), e5_small()  # fetched and made once, not counted
    started = time.perf_counter()
    job = experiments.load("language", "cross_lingual_adapter/n1_joint")
    job = replace(
        job,
        training=job.training | {"max_steps": steps, "warmup_steps": steps // 10},
        settings=job.settings | {"kinds": ["label"], "label_weight": 1},
    )
    set_seed(SEED)
    model, _ = language.with_language(job)
    CONSOLE.print(f"Training one adapter for {', '.join(LANGUAGES[name] for name in job.settings['languages'])}")
    language.distil(model, job, SEED, cache=True, folder=language.outputs_folder())
    model.eval()

    processor = language.language_processor()
    english = partial(language.read, retrieval.load_model().eval(), processor, "en")
    after = partial(language.read, model, processor, language.NAME)
    names = job.settings["languages"]
    best, _ = language.evaluate(english, "en", "test")
    found = {name: [language.evaluate(read, name, "test")[0] for read in (english, after)] for name in names}
    CONSOLE.print(table(best, found))
    check_reloaded(model, after)
    images = [FOLDER / "languages.svg", *([DOCS] if docs else [])]
    draw(english, after, names, images)
    CONSOLE.print(f"{time.perf_counter() - started:.0f} s in all")
    return in_short(best, found), images


def table(best: Metrics, found: Mapping[str, Sequence[Metrics]]) -> Table:
    """Mean recall and zero-shot accuracy on unseen concepts: English, then each language before and after."""
    printed = Table(
        "on unseen concepts, %",
        "mean recall",
        "kept",
        "zero-shot, 8 groups",
        title="The English CLIP in four languages",
    )
    printed.add_row("English", f"{best['mean_recall']:.1f}", "", f"{best['zero_shot']:.1f}", end_section=True)
    for name, readings in found.items():
        for reader, metrics, style in zip(READERS, readings, (None, "bold"), strict=True):
            kept = retention(metrics["mean_recall"], best["mean_recall"])
            cells = f"{metrics['mean_recall']:.1f}", f"{kept:.0f}", f"{metrics['zero_shot']:.1f}"
            printed.add_row(f"{LANGUAGES[name]}, {reader}", *cells, style=style)
        printed.add_section()
    return printed


def in_short(best: Metrics, found: Mapping[str, Sequence[Metrics]]) -> Table:
    """A row for each language."""
    printed = Table("", *READERS, title="Images found by their names: mean recall, %")
    printed.add_row("English", f"{best['mean_recall']:.1f}", "")
    for name, readings in found.items():
        printed.add_row(LANGUAGES[name], *(f"{metrics['mean_recall']:.1f}" for metrics in readings))
    return printed


def check_reloaded(model: Any, read: language.Read) -> None:
    """The saved adapter, loaded into a fresh English CLIP, gives the same embeddings."""
    folder = FOLDER / "language-adapter"
    peft_multimodal.save(model, folder)
    loaded = peft_multimodal.load(retrieval.load_model(), folder / language.NAME, adapter_name=language.NAME).eval()
    texts = list(language.labels("zh").values())[:64]
    error = (
        (read(texts) - language.read(loaded, language.language_processor(), language.NAME, texts)).abs().max().item()
    )
    size = (folder / language.NAME / "adapter_model.safetensors").stat().st_size
    CONSOLE.print(f"Saved {size:,} bytes and loaded again: embeddings differ by {error:.1e}")
    if error > 1e-6:
        raise SystemExit(f"The reloaded adapter is not the trained one: {error} > 1e-6.")


def draw(
    before: language.Read,
    after: language.Read,
    names: Sequence[str],
    paths: Sequence[Path],
    each: int = 2,
    top: int = 5,
) -> None:
    """Names of unseen concepts in each language and the nearest images before and after, the right one framed.

    The concepts are drawn at random from those whose image is among the nearest `top` of either. Text stays text in
    the SVG: the reader's own fonts show every script.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot as plt

    gallery = retrieval.select_images("test", STYLE)
    images, _ = language.embedded_images("test", STYLE)
    rows: list[tuple[str, list[Any], int]] = []
    for name in names:
        labels = language.labels(name)
        texts = [labels[concept] for concept in gallery["concept"]]
        nearest = [(read(texts) @ images.T).topk(top).indices.tolist() for read in (before, after)]
        found = [i for i in range(len(texts)) if any(i in order[i] for order in nearest)]
        rows += [
            (f"{texts[i]}\n({gallery[i]['label_en']})", [order[i] for order in nearest], i)
            for i in random.Random(SEED).sample(found, min(each, len(found)))
        ]

    figure, grid = plt.subplots(
        len(rows),
        2 * top + 1,
        figsize=(2 * top + 1, len(rows) + 0.5),
        width_ratios=[1] * top + [0.3] + [1] * top,
        squeeze=False,
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for line, (label, orders, right) in zip(grid, rows, strict=True):
        line[0].text(-0.15, 0.5, label, transform=line[0].transAxes, ha="right", va="center")
        for side, order in enumerate(orders):
            for place, index in enumerate(order):
                axes = line[side * (top + 1) + place]
                axes.imshow(gallery[index]["image"])
                if index == right:
                    axes.set_axis_on()
                    axes.set(xticks=[], yticks=[])
                    axes.spines[:].set(color="tab:green", linewidth=3)
    for side, title in enumerate(("English text tower", "with the adapter")):
        grid[0][side * (top + 1) + top // 2].set_title(f"{title}: nearest {top}")
    figure.subplots_adjust(left=0.25, right=0.99, top=0.93, bottom=0.01, wspace=0.05, hspace=0.08)
    warnings.filterwarnings("ignore", message="Glyph")  # the reader's fonts are used, not matplotlib's
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        CONSOLE.print(f"wrote {path}")
    plt.close(figure)


if __name__ == "__main__":
    main()
