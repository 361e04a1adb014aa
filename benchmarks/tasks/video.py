"""Video: the English CLIP learns short animations from some concepts and is tested on others.

An image tower sees an animation as one image: evenly spaced frames tiled in reading order, each a whole number of
patches wide, so that a frame's place in time is its place in the image, which the position embeddings tell. It trains
on the training concepts' animations, captioned with their English names, by the model's own contrastive loss.

Order is controlled for: every model also meets the test animations with their frames shuffled, and with the first frame
in every place; `task.order` "shuffled" trains on shuffled frames. `order` is the share of animations whose name is
nearer to the frames in order than shuffled, of which a model that reads no order gets half.

The lower vision layers are frozen in every experiment, so their outputs are computed once per animation and kept.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from peft_multimodal.evaluation import PairedDifference, compute_embeddings, paired_bootstrap

from .. import measure, summary
from .. import report as tables
from ..assets.animated_emoji import animated_emoji
from ..experiment import Experiment
from ..records import Record
from . import Split
from .retrieval import DIRECTIONS, KS, KeptStatesCollator, as_lists, load_clip, ranks_of, recalls, skip_lower_layers

Order = Literal["ordered", "shuffled", "still"]
ORDERS: tuple[Order, ...] = ("ordered", "shuffled", "still")


def run(experiment: Experiment, seed: int, split: Split) -> dict[str, Any]:
    """Adapt to animations, then recall on the split's concepts with frames in order, shuffled, and still."""
    model, processor = load_clip()
    frozen, frames, side = (experiment.settings[key] for key in ("frozen_vision_layers", "frames", "frame_pixels"))
    collator = KeptStatesCollator(processor)
    test = {order: KeptAnimations(split, order, 0, frozen, frames, side) for order in ORDERS}
    train = None
    if experiment.trains:
        train = KeptAnimations("train", experiment.settings["order"], seed, frozen, frames, side)

    skip_lower_layers(model, frozen)
    model = measure.prepare(model, experiment)
    cost: dict[str, Any] = measure.footprint(model)
    if train is not None:
        cost = measure.fit(model, train, collator, experiment.training, seed, rates=experiment.rates)
    embeds = {order: compute_embeddings(model, rows, collator, progress=False) for order, rows in test.items()}
    ranks = {order: ranks_of(found) for order, found in embeds.items()}
    metrics = {f"{order}_{name}": value for order, found in ranks.items() for name, value in recalls(found).items()}
    nearness = {order: (found["image_embeds"] * found["text_embeds"]).sum(dim=1) for order, found in embeds.items()}
    metrics["order"] = 100 * (nearness["ordered"] > nearness["shuffled"]).double().mean().item()
    items = {
        "concepts": list(select_animations(split)["concept"]),
        "ranks": {order: as_lists(found) for order, found in ranks.items()},
    }
    return {"metrics": metrics, "items": items, "cost": cost}


def score(metrics: Mapping[str, float]) -> float:
    """Mean recall with the frames in order."""
    return metrics["ordered_mean_recall"]


# --------------------------------------------------------------------------------------------------------------- data


@cache
def select_animations(split: str) -> datasets.Dataset:
    """The split's animations, a row a concept, always in the same order."""
    datasets.disable_progress_bars()
    return animated_emoji().filter(lambda s: s == split, input_columns="split")


class KeptAnimations(torch.utils.data.Dataset):
    """A split's animations as the outputs of the first frozen vision layers, with their names."""

    def __init__(self, split: str, order: Order, seed: int, layers: int, frames: int, side: int):
        self.states = kept_states(split, order, seed if order == "shuffled" else 0, layers, frames, side)
        self.names = list(select_animations(split)["label_en"])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"states": self.states[index], "label_en": self.names[index]}


@cache
@torch.inference_mode()
def kept_states(
    split: str, order: Order, seed: int, layers: int, frames: int, side: int, batch_size: int = 64
) -> Tensor:
    """Outputs `(animations, tokens, width)` of the frozen model's first vision layers, kept while the process lives."""
    model, processor = load_clip()
    encoder = model.eval().vision_model.encoder
    seen: list[Tensor] = []
    encoder.layer[layers].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    del encoder.layer[layers + 1 :]
    rng = random.Random(seed)
    rows = select_animations(split)
    for start in track(range(0, len(rows), batch_size), f"Lower layers, {split} {order}", transient=True):
        chosen = rows.select(range(start, min(start + batch_size, len(rows))))["frames"]
        images = [tiled(arranged(evenly(found, frames), order, rng), side) for found in chosen]
        batch = processor.image_processor(images, do_resize=False, do_center_crop=False, return_tensors="pt")
        model.vision_model(**batch)
    return torch.cat(seen)


def evenly(frames: Sequence[Image.Image], number: int) -> list[Image.Image]:
    """`number` of the frames, evenly spaced from the first on: an animation's end is its beginning again."""
    return [frames[index * len(frames) // number] for index in range(number)]


def arranged(frames: Sequence[Image.Image], order: Order, rng: random.Random) -> list[Image.Image]:
    """The frames in order, in another order drawn from `rng`, or the first in every place."""
    if order == "still":
        return [frames[0]] * len(frames)
    places = list(range(len(frames)))
    while order == "shuffled" and places == sorted(places):
        rng.shuffle(places)
    return [frames[place] for place in places]


def tiled(frames: Sequence[Image.Image], side: int) -> Image.Image:
    """The frames in reading order, `side` pixels each, in a square grid."""
    columns = math.isqrt(len(frames))
    if columns * columns != len(frames):
        raise ValueError(f"{len(frames)} frames don't fill a square grid.")
    image = Image.new("RGB", (columns * side, columns * side))
    for index, frame in enumerate(frames):
        corner = index % columns * side, index // columns * side
        image.paste(frame.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), corner)
    return image


# ------------------------------------------------------------------------------------------------------------ report


def concept_recalls(record: Record, order: Order) -> tuple[list[float], list[Hashable]]:
    """Each concept's share in the mean recall, in percent, and the concepts."""
    ranks = np.array([record.items["ranks"][order][d] for d in DIRECTIONS])
    return (100 * np.mean([ranks <= k for k in KS], axis=(0, 1))).tolist(), record.items["concepts"]


def order_effect(runs: Sequence[Record]) -> PairedDifference:
    """Mean recall with the frames in order minus that with shuffled frames, each concept's mean over seeds."""
    ordered, shuffled = (
        np.mean([concept_recalls(record, order)[0] for record in runs], axis=0) for order in ORDERS[:2]
    )
    return paired_bootstrap(ordered, shuffled, runs[0].items["concepts"])


def report(records: Sequence[Record], plots: Path) -> str:
    """Recalls with the controls, cost, and what the paired bootstrap says."""
    groups = tables.by_experiment(records)
    columns = {f"ordered_t2i_r@{k}": f"text to video R@{k}" for k in KS}
    columns |= {
        "ordered_mean_recall": "mean recall",
        "shuffled_mean_recall": "frames shuffled",
        "still_mean_recall": "first frame alone",
        "order": "order",
    }
    rows = [[runs[0].label, tables.difference(order_effect(runs))] for runs in groups.values()]
    settings = records[0].config["task"]
    return (
        f"{len(records[0].items['concepts'])} unseen concepts, {settings['frames']} frames of "
        f"{settings['frame_pixels']} pixels; percent, mean ± standard deviation over seeds. Mean recall is the mean of "
        "R@1, R@5 and R@10 in both directions; shuffled and first frame alone are the same models' mean recall on such "
        "test animations. Order: the share of animations whose name is nearer to the frames in order than shuffled "
        "(50 if order is not read).\n\n"
        + summary.quality(groups, columns)
        + "\nMean recall in order minus shuffled at test, with its 95 % interval (paired bootstrap over concepts).\n\n"
        + tables.markdown(["", "ordered − shuffled"], rows)
        + "\nWhat it costs. Every trained row trains and keeps the two projections besides.\n\n"
        + summary.costs(groups)
        + "\nDifference in mean recall with its 95 % interval, paired bootstrap over test concepts.\n\n"
        + summary.differences(groups, {"in order": lambda record: concept_recalls(record, "ordered")})
    )
