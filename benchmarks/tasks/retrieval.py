"""Retrieval: the English CLIP learns a new style of images from some concepts and is tested on others.

The model has seen the old styles only. It trains on the training concepts' images in the new style, captioned with
their English names, by `transformers.Trainer` and the model's own contrastive loss. Measured are text-to-image and
image-to-text recall on unseen concepts in the new style, and in the old ones (forgetting).

The lower vision layers are frozen in every experiment, so their outputs are computed once per image and kept: exact,
and less work a step. An adapter that was trained so fits the whole model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Hashable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset
from transformers import VisionTextDualEncoderModel, VisionTextDualEncoderProcessor

from peft_multimodal.evaluation import compute_embeddings, embedding_ranks, retention

from .. import measure, summary
from .. import report as tables
from ..assets import emoji_images, english_clip
from ..assets.images import LARGEST_FAMILY, NEW_STYLE, SPLIT_SEED
from ..experiment import Experiment
from ..records import Record
from . import Split

KS = (1, 5, 10)
FOLDS = 6
DIRECTIONS = ("t2i", "i2t")
ALONE = "projections/alone"
PROJECTIONS = re.compile(r"\b(visual|text)_projection\b")


def run(experiment: Experiment, seed: int, split: Split) -> dict[str, Any]:
    """Adapt to the new style, then recall on the split's concepts in every style.

    A choice is judged on the validation concepts and a sixth of the training families, another one for each seed, which
    its training then leaves out: 180 concepts alone decide too little.
    """
    model = load_model()
    new, old, frozen = (experiment.settings[key] for key in ("new_style", "old_styles", "frozen_vision_layers"))
    collator = KeptStatesCollator(load_processor())
    test: dict[str, Any] = {
        style: KeptStates(split, style, frozen) for style in ([new] if split == "validation" else [new, *old])
    }
    concepts = list(select_images(split, new)["concept"])
    train: Any = KeptStates("train", new, frozen) if experiment.trains else None
    if split == "validation":
        held_out, rest = fold(seed)
        test = {
            style: ConcatDataset([rows, Subset(KeptStates("train", style, frozen), held_out)])
            for style, rows in test.items()
        }
        train = train and Subset(train, rest)
        concepts += [select_images("train", new)["concept"][index] for index in held_out]

    skip_lower_layers(model, frozen)
    model = measure.prepare(model, experiment)
    cost: dict[str, Any] = measure.footprint(model)
    if train is not None:
        cost = measure.fit(model, train, collator, experiment.training, seed, rates=experiment.rates)
    towers = (p.numel() for name, p in model.named_parameters() if p.requires_grad and not PROJECTIONS.search(name))
    cost["tower_parameters"] = sum(towers)
    ranks = {style: ranks_of(compute_embeddings(model, rows, collator, progress=False)) for style, rows in test.items()}
    return {
        "metrics": metrics(ranks, new, old),
        "items": {
            "base": english_clip().name,
            "concepts": concepts,
            "ranks": {style: as_lists(found) for style, found in ranks.items()},
        },
        "cost": cost,
    }


def score(metrics: Mapping[str, float]) -> float:
    """Mean recall in the new style."""
    return metrics["new_mean_recall"]


# ---------------------------------------------------------------------------------------------------- model and data


def load_model() -> Any:
    """The English CLIP."""
    return VisionTextDualEncoderModel.from_pretrained(english_clip())


def load_processor() -> Any:
    """Its processor."""
    return VisionTextDualEncoderProcessor.from_pretrained(english_clip())


def load_clip() -> tuple[Any, Any]:
    """Both."""
    return load_model(), load_processor()


def select_images(split: str, style: str) -> datasets.Dataset:
    """The images of one split in one style, a row a concept, always in the same order."""
    return _images().filter(lambda s, t: s == split and t == style, input_columns=["split", "style"])


def fold(seed: int) -> tuple[list[int], list[int]]:
    """Rows of the training split that a choice with this seed is judged on, whole families, and those that it trains on."""
    families = list(select_images("train", NEW_STYLE)["family"])
    dealt = sorted({family for family in families if families.count(family) <= LARGEST_FAMILY})
    random.Random(SPLIT_SEED).shuffle(dealt)
    held_out = set(dealt[seed % FOLDS :: FOLDS])
    rows = range(len(families))
    return [i for i in rows if families[i] in held_out], [i for i in rows if families[i] not in held_out]


@lru_cache(maxsize=1)
def _images() -> datasets.Dataset:
    datasets.disable_progress_bars()
    return emoji_images()


class KeptStates(torch.utils.data.Dataset):
    """A split's images in one style as the outputs of the first frozen vision layers, with their names."""

    def __init__(self, split: str, style: str, layers: int):
        self.states = kept_states(split, style, layers)
        self.names = list(select_images(split, style)["label_en"])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"states": self.states[index], "label_en": self.names[index]}


class KeptStatesCollator:
    """Rows of `KeptStates` to a batch; the states stand where a model after `skip_lower_layers` expects them."""

    def __init__(self, processor: Any):
        self.tokenizer = processor.tokenizer

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        texts = self.tokenizer([row["label_en"] for row in rows], padding=True, truncation=True, return_tensors="pt")
        return {**texts, "pixel_values": torch.stack([row["states"] for row in rows]), "return_loss": True}


@cache
def kept_states(split: str, style: str, layers: int) -> Tensor:
    """`lower_outputs` of a split's images in one style, kept while the process lives."""
    return lower_outputs(list(select_images(split, style)["image"]), layers, f"{split} {style}")


@torch.inference_mode()
def lower_outputs(images: Sequence[Any], layers: int, title: str, batch_size: int = 64) -> Tensor:
    """Outputs `(images, tokens, width)` of the frozen model's first vision layers."""
    model, processor = load_model(), load_processor()
    encoder = model.eval().vision_model.encoder
    seen: list[Tensor] = []
    del encoder.layer[layers:]
    encoder.register_forward_hook(lambda module, inputs, output: seen.append(output[0].clone()))
    for start in track(range(0, len(images), batch_size), f"Lower layers, {title}", transient=True):
        model.vision_model(**processor.image_processor(list(images[start : start + batch_size]), return_tensors="pt"))
    return torch.cat(seen)


def skip_lower_layers(model: nn.Module, layers: int) -> None:
    """Let the vision tower begin behind its first `layers`: what it gets as `pixel_values` are their outputs.

    The modules stay where they are, so that an adapter trained so fits the whole model.
    """
    vision: Any = model.vision_model
    for module in (vision.embeddings, *vision.encoder.layer[:layers]):
        module.forward = _pass_on


def run_lower_layers(model: nn.Module, layers: int) -> None:
    """Undo `skip_lower_layers`: the model takes images again."""
    vision: Any = model.vision_model
    for module in (vision.embeddings, *vision.encoder.layer[:layers]):
        del module.forward


def _pass_on(states: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    given = kwargs.get("pixel_values") if states is None else states
    assert given is not None
    return given


# -------------------------------------------------------------------------------------------------------- evaluation


def ranks_of(embeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each query's rank of its match over the whole set, row i matching row i: `{"t2i": (n,), "i2t": (n,)}`."""
    images, texts = embeds["image_embeds"], embeds["text_embeds"]
    return {"t2i": embedding_ranks(texts, images), "i2t": embedding_ranks(images, texts)}


def recalls(ranks: Mapping[str, Tensor]) -> dict[str, float]:
    """`{"t2i_r@1", ..., "i2t_r@10", "mean_recall"}` in percent."""
    found = {f"{d}_r@{k}": 100 * (ranks[d] <= k).double().mean().item() for d in DIRECTIONS for k in KS}
    return found | {"mean_recall": sum(found.values()) / len(found)}


def metrics(ranks: Mapping[str, Mapping[str, Tensor]], new: str, old: Sequence[str]) -> dict[str, float]:
    """The new style's recalls, and the means of the old styles' as far as they were measured."""
    by_style = {style: recalls(found) for style, found in ranks.items()}
    flat = {f"new_{name}": value for name, value in by_style[new].items()}
    if all(style in by_style for style in old):
        for name in by_style[new]:
            flat[f"old_{name}"] = sum(by_style[style][name] for style in old) / len(old)
        flat |= {f"{style}_{name}": value for style in old for name, value in by_style[style].items()}
    return flat


def as_lists(ranks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {direction: found.tolist() for direction, found in ranks.items()}


# ------------------------------------------------------------------------------------------------------------ report


def concept_recalls(record: Record, styles: Sequence[str]) -> tuple[list[float], list[Hashable]]:
    """Each concept's share in the mean recall over `styles`, in percent, and the concepts."""
    ranks = torch.tensor([record.items["ranks"][style][d] for style in styles for d in DIRECTIONS])
    hits = torch.stack([(ranks <= k).double() for k in KS])
    return (100 * hits.mean(dim=(0, 1))).tolist(), record.items["concepts"]


def report(records: Sequence[Record], plots: Path) -> str:
    """Quality, then cost, then what the paired bootstrap says; two plots."""
    groups = tables.by_experiment(records)
    settings = records[0].config["task"]
    new, old = [settings["new_style"]], settings["old_styles"]
    words = {"t2i": "text to image", "i2t": "image to text"}
    columns = {f"new_{d}_r@{k}": f"{words[d]} R@{k}" for d in DIRECTIONS for k in KS}
    columns |= {"new_mean_recall": "mean recall", "old_mean_recall": "old styles, mean recall"}
    draw(groups, plots)
    return (
        f"Unseen concepts, {len(records[0].items['concepts'])} in each style, new style unless said; percent. Mean "
        "recall is the mean of the six recalls, and the old styles' that of both.\n\n"
        + summary.quality(groups, columns)
        + "\nWhat it costs. Adapter parameters leave out the two projections, which every trained row trains and keeps; a "
        "step's time is the processor's.\n\n"
        + costs(groups)
        + "\nDifference in mean recall with its 95 % interval, paired bootstrap over test concepts (each concept's mean "
        "over seeds).\n\n"
        + summary.differences(
            groups, {"new": lambda r: concept_recalls(r, new), "old": lambda r: concept_recalls(r, old)}
        )
        + "\n![Mean recall in the new style against parameters](results/retrieval_parameters.png)\n"
        "![New style against what is left of the old ones](results/retrieval_forgetting.png)\n"
    )


def costs(groups: Mapping[str, Sequence[Record]]) -> str:
    """Parameters with and without the projections, the file, processor time and memory, the learning rate taken."""
    reference = None
    if summary.PEER in groups:
        reference = tables.median(r.cost["step_processor_seconds"] for r in groups[summary.PEER])
    rows = []
    for runs in groups.values():
        cost = runs[0].cost
        row = [runs[0].label, *map(tables.count, (adapter_parameters(runs[0]), tables.parameters(runs[0])))]
        row.append(tables.megabytes(cost["adapter_bytes"]))
        if "step_processor_seconds" in cost:
            step = tables.median(r.cost["step_processor_seconds"] for r in runs)
            row += [
                f"{step / reference:.2f}" if reference else "",
                tables.megabytes(tables.median(r.cost["peak_extra_bytes"] for r in runs)),
                f"{runs[0].config['training']['learning_rate']:g}",
            ]
        rows.append(row + [""] * (7 - len(row)))
    heads = [
        "adapter parameters",
        "trained parameters",
        "file, MB",
        "step / LoRA r=64",
        "peak extra, MB",
        "learning rate",
    ]
    return tables.markdown(["", *heads], rows)


def adapter_parameters(record: Record) -> int:
    """Trained parameters without those of the projections."""
    return record.cost["tower_parameters"]


def draw(groups: Mapping[str, Sequence[Record]], plots: Path) -> None:
    """Mean recall against parameters, and the new style against what is left of the old ones."""
    own = {name: name.startswith(tables.OWN) for name in groups}
    new = {name: [r.metrics["new_mean_recall"] for r in runs] for name, runs in groups.items()}
    old = {name: [r.metrics["old_mean_recall"] for r in runs] for name, runs in groups.items()}
    label = {name: runs[0].label for name, runs in groups.items()}
    sized = {name: [adapter_parameters(r) for r in runs] for name, runs in groups.items()}
    tables.plot_points(
        [tables.Point(label[n], sized[n], new[n], own[n]) for n in groups if min(sized[n]) > 0],
        plots / "retrieval_parameters.png",
        "adapter parameters",
        "mean recall in the new style, %",
        log=True,
        level=("projections alone", sum(new[ALONE]) / len(new[ALONE])) if ALONE in groups else None,
    )
    if summary.BASE in groups:
        before = sum(old[summary.BASE]) / len(old[summary.BASE])
        kept = {name: [retention(value, before) for value in values] for name, values in old.items()}
        tables.plot_points(
            [tables.Point(label[n], kept[n], new[n], own[n]) for n in groups],
            plots / "retrieval_forgetting.png",
            "old styles: mean recall kept, % of the frozen base's",
            "mean recall in the new style, %",
        )
