"""Retrieval with a fusion encoder: BLIP learns a new style of images from some concepts and is tested on others.

It trains on the training concepts' images in the new style, captioned with their English names, with the contrastive
and the matching loss (ITC + ITM) of `ImageTextRetrievalTrainer`. Measured on unseen concepts: recall by the contrastive
embeddings, in the new style and the old ones; recall after the matching head has re-ranked the nearest candidates; and
the matching head's AUC, each image's own name against that of another concept, any one or one of its own subgroup.

The lower vision layers are frozen in every experiment, so their outputs are computed once per image and kept.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import BlipForImageTextRetrieval, BlipProcessor

from peft_multimodal import ImageTextRetrievalTrainer
from peft_multimodal.evaluation import compute_embeddings, rerank_recall
from peft_multimodal.training import retrieval_embeddings

from .. import measure, summary
from .. import report as tables
from ..assets.blip_retrieval import blip_retrieval, match_logits, tokens
from ..experiment import Experiment
from ..records import Record
from . import Split
from .retrieval import DIRECTIONS, KS, as_lists, ranks_of, recalls, select_images

NEGATIVES = ("any", "subgroup")


def run(experiment: Experiment, seed: int, split: Split) -> dict[str, Any]:
    """Adapt to the new style, then rank and match the split's concepts."""
    model, processor = load_blip()
    settings = experiment.settings
    new, old, frozen = (settings[key] for key in ("new_style", "old_styles", "frozen_vision_layers"))
    collator = KeptStatesCollator(processor)
    styles = [new] if split == "validation" else [new, *old]
    test = {style: KeptStates(split, style, frozen) for style in styles}
    train = KeptStates("train", new, frozen) if experiment.trains else None

    skip_lower_layers(model, frozen)
    model = measure.prepare(model, experiment)
    cost: dict[str, Any] = measure.footprint(model)
    if train is not None:
        cost = measure.fit(
            model, train, collator, experiment.training, seed, rates=experiment.rates, trainer=ImageTextRetrievalTrainer
        )
    model.eval()

    embeds = {
        style: compute_embeddings(model, rows, collator, progress=False, encode=retrieval_embeddings)
        for style, rows in test.items()
    }
    ranks = {style: ranks_of(found) for style, found in embeds.items()}
    matcher = Matcher(model, collator, test[new], settings["eval_batch_size"])
    images, texts = (embeds[new][f"{side}_embeds"] for side in ("image", "text"))
    reranked = rerank_recall(images, texts, matcher, ks=KS, candidates=settings["candidates"])
    metrics = {f"new_{name}": value for name, value in recalls(ranks[new]).items()}
    metrics |= {f"reranked_{name}": value for name, value in reranked.items()}
    if split == "test":
        metrics["old_mean_recall"] = sum(recalls(ranks[style])["mean_recall"] for style in old) / len(old)
    own = matcher(torch.arange(len(test[new])), torch.arange(len(test[new])))
    margins: dict[str, list[float]] = {}
    for kind in NEGATIVES:
        other = matcher(torch.arange(len(test[new])), negatives(split, new, kind))
        metrics[f"auc_{kind}"] = auc(own, other)
        margins[kind] = (own - other).tolist()
    items = {
        "concepts": list(select_images(split, new)["concept"]),
        "ranks": {style: as_lists(found) for style, found in ranks.items()},
        "margins": {kind: [round(x, 4) for x in values] for kind, values in margins.items()},
    }
    return {"metrics": metrics, "items": items, "cost": cost}


def score(metrics: Mapping[str, float]) -> float:
    """Mean of the two recalls in the new style: by embeddings alone, and re-ranked."""
    return (metrics["new_mean_recall"] + metrics["reranked_mean_recall"]) / 2


# ---------------------------------------------------------------------------------------------------- model and data


def load_blip() -> tuple[Any, Any]:
    """The retrieval model and its processor."""
    folder = blip_retrieval()
    return BlipForImageTextRetrieval.from_pretrained(folder), BlipProcessor.from_pretrained(folder)


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
        self.processor = processor

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**self.texts(rows), "pixel_values": torch.stack([row["states"] for row in rows])}

    def texts(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return tokens(self.processor, [row["label_en"] for row in rows])


@cache
@torch.inference_mode()
def kept_states(split: str, style: str, layers: int, batch_size: int = 64) -> Tensor:
    """Outputs `(images, tokens, width)` of the frozen model's first vision layers, kept while the process lives."""
    model, processor = load_blip()
    vision = model.eval().vision_model
    images, states = list(select_images(split, style)["image"]), []
    for start in track(range(0, len(images), batch_size), f"Lower layers, {split} {style}", transient=True):
        batch = processor.image_processor(images[start : start + batch_size], return_tensors="pt")
        found = vision.embeddings(batch["pixel_values"])
        for layer in vision.encoder.layers[:layers]:
            found = layer(found)
        states.append(found)
    return torch.cat(states).clone()


def skip_lower_layers(model: nn.Module, layers: int) -> None:
    """Let the vision tower begin behind its first `layers`: what it gets as `pixel_values` are their outputs."""
    vision: Any = model.vision_model
    for module in (vision.embeddings, *vision.encoder.layers[:layers]):
        module.forward = _pass_on


def _pass_on(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return states


@cache
def negatives(split: str, style: str, kind: str) -> Tensor:
    """For each concept another one, the same in every run: any, or of its subgroup (its group where it is alone)."""
    rows, rng = select_images(split, style), random.Random(0)
    columns = [list(rows["subgroup"]), list(rows["group"])] if kind == "subgroup" else []
    chosen = []
    for index in range(len(rows)):
        others = ([i for i, value in enumerate(column) if value == column[index] and i != index] for column in columns)
        chosen.append(rng.choice(next(filter(None, others), [i for i in range(len(rows)) if i != index])))
    return torch.tensor(chosen)


# -------------------------------------------------------------------------------------------------------- evaluation


class Matcher:
    """The matching head's log-odds of images and names, given by their rows; every image is encoded once."""

    def __init__(self, model: Any, collator: KeptStatesCollator, rows: KeptStates, batch_size: int):
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.collator, self.rows, self.batch_size = collator, rows, batch_size
        with torch.inference_mode():
            self.states = torch.cat(
                [self.base.vision_model(pixel_values=part).last_hidden_state for part in rows.states.split(batch_size)]
            )

    @torch.inference_mode()
    def __call__(self, images: Tensor, texts: Tensor) -> Tensor:
        odds = []
        for image, text in zip(images.split(self.batch_size), texts.split(self.batch_size), strict=True):
            batch = self.collator.texts([self.rows[i] for i in text.tolist()])
            logits = match_logits(self.base, self.states[image], batch)
            odds.append(logits[:, 1] - logits[:, 0])
        return torch.cat(odds)


def auc(positive: Tensor, negative: Tensor) -> float:
    """Share in percent of the pairs of a positive and a negative in which the positive scores higher; ties count half."""
    difference = positive.double()[:, None] - negative.double()[None]
    return 100 * ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


# ------------------------------------------------------------------------------------------------------------ report


def concept_recalls(record: Record) -> tuple[list[float], list[Hashable]]:
    """Each concept's share in the new style's mean recall, in percent, and the concepts."""
    ranks = np.array([record.items["ranks"][record.config["task"]["new_style"]][d] for d in DIRECTIONS])
    return (100 * np.mean([ranks <= k for k in KS], axis=(0, 1))).tolist(), record.items["concepts"]


def report(records: Sequence[Record], plots: Path) -> str:
    """Recalls and AUC, cost, and what the paired bootstrap says."""
    groups = tables.by_experiment(records)
    columns = {
        "new_t2i_r@1": "text to image R@1",
        "new_i2t_r@1": "image to text R@1",
        "new_mean_recall": "mean recall",
        "reranked_t2i_r@1": "re-ranked text to image R@1",
        "reranked_i2t_r@1": "re-ranked image to text R@1",
        "reranked_mean_recall": "re-ranked mean recall",
        "auc_any": "ITM AUC",
        "auc_subgroup": "ITM AUC in the subgroup",
        "old_mean_recall": "old styles, mean recall",
    }
    first = records[0]
    return (
        f"{len(first.items['concepts'])} unseen concepts in the new style; percent, mean ± standard deviation over "
        f"seeds. The matching head re-ranks each query's nearest {first.config['task']['candidates']}; mean recall is "
        "the mean of six.\n\n"
        + summary.quality(groups, columns)
        + "\nWhat it costs. Every trained row trains and keeps the two projections and the matching head besides.\n\n"
        + summary.costs(groups)
        + "\nDifference in mean recall (embeddings alone) with its 95 % interval, paired bootstrap over test concepts.\n\n"
        + summary.differences(groups, {"mean recall": concept_recalls})
    )
