"""Adapt a CLIP to a new style of images with LoRA and with Aurora: the second job of `make quickstart`, minutes.

The English CLIP has seen emoji in two styles. It trains on a third, 60 steps by `transformers.Trainer` for either
method, and is tested on concepts that neither it nor the base has seen. Printed is what was gained, what was forgotten
and what it cost; the Aurora adapter is saved, loaded again in a fresh process and checked; an image shows some queries
before and after. Everything lands in `runs/quickstart`.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainingArguments, set_seed

import peft_multimodal
from peft_multimodal import ImageTextCollator, parameter_groups
from peft_multimodal.evaluation import compute_embeddings

from . import experiment as experiments
from .measure import StepClock, footprint
from .tasks import retrieval

FOLDER, DOCS = Path("runs/quickstart"), Path("docs/quickstart.png")
METHODS = {"LoRA r=64": "lora/r64", "Aurora R=16": "aurora_mode_approx/r16_per_letter"}
OURS = "Aurora R=16"
SEED, THREADS = 0, 2
CHECKED = 64
"""Images whose embeddings a reloaded adapter has to repeat."""
SAME, DIFFERENT = 1e-6, 1e-3
CONSOLE = Console()


@dataclass
class Adapted:
    """A model's embeddings of the test images in the new style, and what its training took."""

    embeds: dict[str, Tensor]
    metrics: dict[str, float]
    parameters: int = 0
    file_bytes: int = 0
    step_seconds: float | None = None
    """Of the processor: on a busy machine those of the wall clock say little."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quickstart_retrieval", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--docs", action="store_true", help=f"write the image to {DOCS} too")
    parser.add_argument("--steps", type=int, help="train so many steps only, to see that it works")
    parser.add_argument("--reload", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.reload:
        reload(options.reload)
    else:
        run(options.steps, options.docs)


def run(steps: int | None = None, docs: bool = False) -> tuple[Table, list[Path]]:
    """Do the job; its results in short, and the paths of its images."""
    retrieval.english_clip(), retrieval.emoji_images()  # fetched and made once, not counted
    started = time.perf_counter()
    FOLDER.mkdir(parents=True, exist_ok=True)
    methods = {name: experiments.load("retrieval", experiment) for name, experiment in METHODS.items()}
    settings = methods[OURS].settings
    base = retrieval.load_model()
    retrieval.skip_lower_layers(base, settings["frozen_vision_layers"])
    rows = {"frozen base": evaluate(base, settings)}
    rows |= {name: adapt(name, experiment, steps) for name, experiment in methods.items()}
    CONSOLE.print(table(rows))
    check_reloaded()
    images = [FOLDER / "quickstart.png", *([DOCS] if docs else [])]
    draw(rows["frozen base"], rows[OURS], images)
    CONSOLE.print(f"{time.perf_counter() - started:.0f} s in all")
    return in_short(rows), images


def adapt(name: str, experiment: experiments.Experiment, steps: int | None) -> Adapted:
    """Train one adapter on the new style and evaluate it."""
    set_seed(SEED)
    settings = experiment.settings
    model = get_peft_model(retrieval.load_model(), experiment.peft_config())
    # The first layers are frozen for good: what they make of an image is computed once and stands for the image.
    retrieval.skip_lower_layers(model, settings["frozen_vision_layers"])
    clock = StepClock()
    args = TrainingArguments(
        output_dir=str(FOLDER / "trainer"),
        remove_unused_columns=False,  # the collator reads the dataset's own columns
        label_names=[],  # the model computes its loss by return_loss=True
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=SEED,
        **experiment.training | ({} if steps is None else {"max_steps": steps}),
    )
    groups = parameter_groups(model, args.learning_rate, args.weight_decay, **experiment.rates)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=retrieval.KeptStates("train", settings["new_style"], settings["frozen_vision_layers"]),
        data_collator=retrieval.KeptStatesCollator(retrieval.load_processor()),
        callbacks=[clock],
        optimizers=(torch.optim.AdamW(groups), None),
    )
    CONSOLE.print(f"Training {name}")
    trainer.train()
    result, cost = evaluate(model, settings), footprint(model)
    result.parameters, result.file_bytes = cost["trainable_parameters"], cost["adapter_bytes"]
    _, result.step_seconds = clock.medians()
    if name == OURS:
        retrieval.run_lower_layers(model, settings["frozen_vision_layers"])
        peft_multimodal.save(model, FOLDER / "adapter")
        save_file(embed_checked(model), FOLDER / "trained.safetensors")
    return result


def evaluate(model: Any, settings: Mapping[str, Any]) -> Adapted:
    """Recalls of a model without its lower layers, on the test concepts in the new style and the old ones."""
    new, old = settings["new_style"], settings["old_styles"]
    collator = retrieval.KeptStatesCollator(retrieval.load_processor())
    rows = {style: retrieval.KeptStates("test", style, settings["frozen_vision_layers"]) for style in (new, *old)}
    embeds = {style: compute_embeddings(model, found, collator, progress=False) for style, found in rows.items()}
    ranks = {style: retrieval.ranks_of(found) for style, found in embeds.items()}
    return Adapted(embeds[new], retrieval.metrics(ranks, new, old))


def table(rows: Mapping[str, Adapted]) -> Table:
    """A column for each model."""
    printed = Table("on unseen concepts, %", *rows, title="The English CLIP in a new style")
    for side in ("new", "old"):
        for direction, words in (("t2i", "text to image"), ("i2t", "image to text")):
            for k in retrieval.KS:
                key = f"{side}_{direction}_r@{k}"
                cells = (f"{row.metrics[key]:.1f}" for row in rows.values())
                printed.add_row(f"{side} style, {words} R@{k}", *cells)
        means = (f"{row.metrics[f'{side}_mean_recall']:.1f}" for row in rows.values())
        printed.add_row(f"{side} style, mean recall", *means, style="bold", end_section=True)
    printed.add_row("trained parameters", *(f"{row.parameters:,}" for row in rows.values()))
    printed.add_row("adapter file, bytes", *(f"{row.file_bytes:,}" for row in rows.values()))
    reference = rows["LoRA r=64"].step_seconds or 1.0
    seconds = ("" if row.step_seconds is None else f"{row.step_seconds / reference:.2f}" for row in rows.values())
    printed.add_row("processor seconds a step / LoRA's", *seconds)
    return printed


def in_short(rows: Mapping[str, Adapted]) -> Table:
    """A row for each model."""
    printed = Table("", "new style", "old styles", "file, MB", title="A new style of images: mean recall, %")
    for name, row in rows.items():
        recalls = (f"{row.metrics[f'{side}_mean_recall']:.1f}" for side in ("new", "old"))
        size = f"{row.file_bytes / 1e6:.1f}" if row.file_bytes else ""
        printed.add_row(name, *recalls, size, style="bold" if name == OURS else None)
    return printed


# ------------------------------------------------------------------------------------------ the adapter, loaded again


def embed_checked(model: Any) -> dict[str, Tensor]:
    """Embeddings of the images and names by which a reloaded adapter is checked."""
    new = experiments.load("retrieval", METHODS[OURS]).settings["new_style"]
    collator = ImageTextCollator(retrieval.load_processor(), text_column="label_en")
    return compute_embeddings(
        model, retrieval.select_images("test", new).select(range(CHECKED)), collator, progress=False
    )


def reload(adapter: Path) -> None:
    """In a fresh process: embed with the base and with the adapter."""
    base = embed_checked(retrieval.load_model())
    adapted = embed_checked(peft_multimodal.load(retrieval.load_model(), adapter))
    save_file(base, FOLDER / "base.safetensors")
    save_file(adapted, FOLDER / "adapted.safetensors")


def check_reloaded() -> None:
    """The saved adapter gives the trained model's outputs in a fresh process, and not the base's."""
    subprocess.run(
        [sys.executable, "-m", "benchmarks.quickstart_retrieval", "--reload", str(FOLDER / "adapter")], check=True
    )
    trained = load_file(FOLDER / "trained.safetensors")
    error, effect = (
        largest_difference(trained, load_file(FOLDER / f"{which}.safetensors")) for which in ("adapted", "base")
    )
    CONSOLE.print(
        f"Loaded in a fresh process: outputs differ from the trained model's by {error:.1e}, from the base's by {effect:.3f}"
    )
    if not error <= SAME or not effect > DIFFERENT:
        raise SystemExit(
            f"The reloaded adapter is not the trained one: {error} <= {SAME} and {effect} > {DIFFERENT} fails."
        )


def largest_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ----------------------------------------------------------------------------------------------------------- the image


def draw(before: Adapted, after: Adapted, paths: Sequence[Path], queries: int = 6, top: int = 5) -> None:
    """Queries and their nearest images before and after, the right one framed.

    The queries are drawn at random from those whose image is among the nearest `top` before or after.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings = experiments.load("retrieval", METHODS[OURS]).settings
    images = retrieval.select_images("test", settings["new_style"])
    nearest = [
        (found["text_embeds"] @ found["image_embeds"].T).topk(top).indices.tolist()
        for found in (before.embeds, after.embeds)
    ]
    found_by_either = [i for i in range(len(images)) if any(i in order[i] for order in nearest)]
    shown = random.Random(SEED).sample(found_by_either, min(queries, len(found_by_either)))

    figure, grid = plt.subplots(
        len(shown),
        2 * top + 1,
        figsize=(2 * top + 1, len(shown) + 0.5),
        width_ratios=[1] * top + [0.3] + [1] * top,
        squeeze=False,
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for line, query in zip(grid, shown, strict=True):
        line[0].text(
            -0.15, 0.5, images[query]["label_en"], transform=line[0].transAxes, ha="right", va="center", wrap=True
        )
        for side, order in enumerate(nearest):
            for place, index in enumerate(order[query]):
                axes = line[side * (top + 1) + place]
                axes.imshow(images[index]["image"])
                if index == query:
                    axes.set_axis_on()
                    axes.set(xticks=[], yticks=[])
                    axes.spines[:].set(color="tab:green", linewidth=3)
    for side, title in enumerate(("frozen base", OURS)):
        middle = grid[0][side * (top + 1) + top // 2]
        middle.set_title(f"{title}: nearest {top}")
    figure.subplots_adjust(left=0.2, right=0.99, top=0.92, bottom=0.02, wspace=0.05, hspace=0.08)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        CONSOLE.print(f"wrote {path}")
    plt.close(figure)


if __name__ == "__main__":
    main()
