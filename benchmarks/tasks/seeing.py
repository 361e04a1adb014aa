"""Seeing: the README's lines for GatedXAttn, with SmolLM2-135M and DINOv2-S, on shapes that are drawn here.

The question is "What colour is this?", of one shape on white, in one of six colours; 120 images train, others are asked
about, and an answer is right if what the model writes is the colour's name. As the control the same questions are asked of
another test image, whose shape has another colour: a model that doesn't look is as often right then.

The encoder is frozen, so what it gives for an image is kept and used again; a step's seconds leave it out.

| `task` setting | content |
| --- | --- |
| `train`, `test` | numbers of images |
| `eval_batch_size` | questions at a time |
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BitImageProcessorPil, Dinov2Config, Dinov2Model
from transformers.modeling_outputs import BaseModelOutput

from peft_multimodal import InterleavedProcessor
from peft_multimodal.evaluation import paired_bootstrap

from .. import measure
from .. import report as tables
from ..assets.smollm2 import smollm2
from ..assets.towers import dinov2_small
from ..experiment import Experiment
from ..records import Record
from . import Split

QUESTION = "<image>What colour is this?"
COLOURS = {
    "red": (220, 30, 30),
    "orange": (255, 150, 20),
    "yellow": (250, 220, 20),
    "green": (30, 150, 60),
    "blue": (30, 80, 220),
    "purple": (130, 50, 170),
}
CORNERS = {"circle": 60, "triangle": 3, "square": 4, "hexagon": 6, "star": 10}
SIDE = 224  # pixels

Row = dict[str, Any]


def run(experiment: Experiment, seed: int, split: Split) -> dict[str, Any]:
    """Train on drawn shapes, then ask about others."""
    settings, processor = experiment.settings, load_processor()
    lm = AutoModelForCausalLM.from_pretrained(smollm2())
    cost: dict[str, Any] = {}
    model: Any = lm
    if experiment.peft is not None:
        own = {"vision_encoder": str(dinov2_small()), "media_token_id": processor.media_token_id}
        config = replace(experiment, peft=experiment.peft | own).peft_config().with_vision_encoder(load_eyes())
        model = measure.get_peft_model(lm, config)
        rows = draw("train", settings["train"])
        cost = measure.fit(model, rows, processor.collate, experiment.training, seed)
    asked = draw(split, settings["test"])
    others = {"own": asked, "other": elsewhere(asked)}
    items = {
        shown: [
            int(said == row["answer"].strip())
            for said, row in zip(write(model.eval(), processor, rows, settings["eval_batch_size"]), asked, strict=True)
        ]
        for shown, rows in others.items()
    }
    metrics = {shown: 100 * sum(right) / len(right) for shown, right in items.items()}
    return {"metrics": metrics, "items": items, "cost": cost}


def score(metrics: Mapping[str, float]) -> float:
    """Percent of right answers."""
    return metrics["own"]


def draw(name: str, number: int) -> list[Row]:
    """Rows of a text, its answer and its image, as `InterleavedProcessor.collate` takes them; always the same."""
    rng = random.Random(name)
    rows = []
    for _ in range(number):
        colour, shape = rng.choice(list(COLOURS)), rng.choice(list(CORNERS))
        radius = rng.uniform(0.2, 0.4) * SIDE
        x, y = (rng.uniform(radius, SIDE - radius) for _ in range(2))
        image = Image.new("RGB", (SIDE, SIDE), "white")
        corners = [
            (x + r * math.sin(angle), y - r * math.cos(angle))
            for i in range(CORNERS[shape])
            for angle in [2 * math.pi * i / CORNERS[shape]]
            for r in [radius * (0.45 if shape == "star" and i % 2 else 1.0)]
        ]
        ImageDraw.Draw(image).polygon(corners, fill=COLOURS[colour])
        rows.append({"text": QUESTION, "answer": f" {colour}", "images": [image]})
    return rows


def elsewhere(rows: Sequence[Row]) -> list[Row]:
    """The same questions, each with the next image of another colour."""
    found = []
    for place, row in enumerate(rows):
        following = [*rows[place + 1 :], *rows[:place]]
        found.append({**row, "images": next(r["images"] for r in following if r["answer"] != row["answer"])})
    return found


@torch.no_grad()
def write(model: Any, processor: InterleavedProcessor, rows: Sequence[Row], size: int) -> list[str]:
    """What the model says of each row's image; a language model alone is asked without it."""
    written = []
    sees = hasattr(model, "peft_config")
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        texts = [row["text"] if sees else row["text"].replace(processor.media_token, "") for row in part]
        batch = processor(texts, images=[row["images"] for row in part] if sees else None, padding_side="left")
        ids = model.generate(**batch, max_new_tokens=3, do_sample=False)
        written += processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in written]


def load_processor() -> InterleavedProcessor:
    """As the README loads it; the image processor is that of facebook/dinov2-small."""
    images = BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor = InterleavedProcessor(AutoTokenizer.from_pretrained(smollm2()), images)
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


class Eyes(Dinov2Model):
    """DINOv2 that remembers what it gave for an image."""

    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        assert pixel_values is not None
        kept = vars(self).setdefault("kept", {})
        keys = [hashlib.sha256(pixels.numpy().tobytes()).digest() for pixels in pixel_values]
        for key, pixels in zip(keys, pixel_values, strict=True):
            if key not in kept:
                kept[key] = super().forward(pixel_values=pixels[None]).last_hidden_state[0]
        return BaseModelOutput(last_hidden_state=torch.stack([kept[key] for key in keys]))


@cache
def load_eyes() -> Eyes:
    eyes: Any = Eyes(
        Dinov2Config.from_pretrained(dinov2_small())
    )  # from_pretrained knows old weights by the class's name
    eyes.load_state_dict(AutoModel.from_pretrained(dinov2_small()).state_dict())
    return eyes


# --- the report ------------------------------------------------------------------------------------------------------


def report(records: Sequence[Record], plots: Any) -> str:
    groups = tables.by_experiment(records)
    rows = []
    for runs in groups.values():
        own, other = ([r.metrics[name] for r in runs] for name in ("own", "other"))
        row = [runs[0].label, str(len(runs)), tables.mean_spread(own), tables.mean_spread(other), difference(runs)]
        cost = runs[0].cost
        if cost:
            step = tables.median(r.cost["step_processor_seconds"] for r in runs)
            row += [f"{cost['trainable_parameters']:,}", tables.megabytes(cost["adapter_bytes"]), f"{step:.1f}"]
        rows.append(row + [""] * (8 - len(row)))
    head = ["", "seeds", "own image, %", "another's, %", "difference"]
    head += ["trained parameters", "file, MB", "processor s a step"]
    sizes = records[0].config["task"]
    return (
        f"{sizes['train']} drawn shapes train, {sizes['test']} others are asked about; mean ± standard deviation over seeds, "
        f"the difference with its 95 % interval over test images. Chance is {100 / len(COLOURS):.0f} %.\n\n"
        + tables.markdown(head, rows)
    )


def difference(runs: Sequence[Record]) -> str:
    own, other = (
        [100 * sum(values) / len(runs) for values in zip(*(r.items[name] for r in runs), strict=True)]
        for name in ("own", "other")
    )
    return tables.difference(paired_bootstrap(own, other, list(range(len(own)))))
