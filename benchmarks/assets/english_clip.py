"""The English CLIP: frozen DINOv2-S and MiniLM, joined by projections that are fitted here.

No package ships a CLIP, so `english_clip()` assembles one: a `VisionTextDualEncoderModel` with its
`VisionTextDualEncoderProcessor` (84-pixel images, English tokenizer) in one folder. Both towers stay as they came,
MiniLM's pooler included. The two projections are a shrunken canonical correlation analysis of the towers' outputs on
the training families' images in the old styles, captioned with names and keywords; with a thousand concepts it finds
unseen ones better than contrastive training of the same projections, it takes a second, and it has no learning rate.
The logit scale is the one that suits the validation families best. The new style and the test families are never seen.
`assembly.json` beside the weights holds the settings and the recalls.

The settings were chosen by the old styles' recall on the validation families.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image, ImageOps
from rich.progress import track
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoTokenizer,
    BitImageProcessorPil,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from peft_multimodal.evaluation import retrieval_recall

from .fetch import CONSOLE, build_once
from .images import OLD_STYLES, SIZE, STYLES, emoji_images
from .towers import dinov2_small, minilm

Recalls = dict[str, dict[str, dict[str, float]]]
"""By split, style and name."""


@dataclass(frozen=True)
class Settings:
    """How the projections are fitted."""

    projection_dim: int = 256
    image_shrinkage: float = 0.1
    """Ridge of the images' covariance, in units of its mean eigenvalue."""
    text_shrinkage: float = 1.0
    """The same for the texts."""
    views: int = 3
    """Shrunken, shifted, sometimes grey views of each image, beside the image itself."""
    captions: int = 8
    """Captions sampled from a concept's name and keywords, beside the name itself."""
    name_weight: int = 4
    """How many captions the name counts for."""
    seed: int = 0


def english_clip() -> Path:
    """The English CLIP's folder: load it with `VisionTextDualEncoderModel` and `VisionTextDualEncoderProcessor`."""
    return build_once("english-clip-2", lambda folder: _build(folder, Settings()))


def _build(folder: Path, settings: Settings) -> None:
    started = time.perf_counter()
    emoji = emoji_images()
    rng = random.Random(settings.seed)
    processor = VisionTextDualEncoderProcessor(image_processor(), AutoTokenizer.from_pretrained(minilm()))
    vision_model, text_model = AutoModel.from_pretrained(dinov2_small()), AutoModel.from_pretrained(minilm())
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision_model.config, text_model.config, projection_dim=settings.projection_dim
    )
    model = VisionTextDualEncoderModel(config, vision_model, text_model).eval()

    train = [rows_of(emoji, "train", style) for style in OLD_STYLES]
    captions = captions_of(train[0], settings, rng)
    views = views_of(train, settings, rng)
    model.visual_projection.weight.data, model.text_projection.weight.data = canonical_projections(
        torch.stack([encode_images(model, processor, view) for view in track(views, "Encoding", console=CONSOLE)]),
        torch.stack([encode_texts(model, processor, texts) for texts in captions]),
        settings,
    )
    galleries = [embed(model, processor, rows_of(emoji, "validation", style)) for style in OLD_STYLES]
    model.logit_scale.data.fill_(best_logit_scale([texts @ images.T for images, texts in galleries]))

    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    recalls = {split: evaluate(model, processor, emoji, split) for split in ("validation", "test")}
    report = report_of(settings, recalls, started)
    (folder / "assembly.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    means = {split: {style: row["mean_recall"] for style, row in styles.items()} for split, styles in recalls.items()}
    CONSOLE.print(f"English CLIP assembled in {report['build_seconds']:.0f} s; mean recall in per cent:", means)


def rows_of(images: datasets.Dataset, split: str, style: str) -> datasets.Dataset:
    """The rows of one split in one style; the concepts come in the same order for every style."""
    wanted = zip(images["split"], images["style"], strict=True)
    return images.select([row for row, is_in in enumerate(wanted) if is_in == (split, style)])


def image_processor() -> BitImageProcessorPil:
    """DINOv2's preprocessing at the images' own size."""
    return BitImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def captions_of(rows: datasets.Dataset, settings: Settings, rng: random.Random) -> list[list[str]]:
    """The rows' names, as often as `settings.name_weight` says, and their sampled captions."""
    names, tags = rows["label_en"], rows["tags_en"]
    sampled = [[caption(*pair, rng) for pair in zip(names, tags, strict=True)] for _ in range(settings.captions)]
    return [list(names)] * settings.name_weight + sampled


def views_of(styles: Sequence[datasets.Dataset], settings: Settings, rng: random.Random) -> list[list[Image.Image]]:
    """Every style's images as they are, and `settings.views` augmented views of each."""
    views = [list(rows["image"]) for rows in styles]
    return views + [[augmented(image, rng) for image in view] for view in views for _ in range(settings.views)]


def augmented(image: Image.Image, rng: random.Random) -> Image.Image:
    """The image at 70-100 % of its size somewhere on white, in three of ten cases without colour."""
    side = round(SIZE * rng.uniform(0.7, 1.0))
    ground = Image.new("RGB", (SIZE, SIZE), "white")
    corner = rng.randint(0, SIZE - side), rng.randint(0, SIZE - side)
    ground.paste(image.resize((side, side), Image.Resampling.BICUBIC), corner)
    return ImageOps.grayscale(ground).convert("RGB") if rng.random() < 0.3 else ground


def caption(label: str, tags: Sequence[str], rng: random.Random) -> str:
    """One to three of the keywords, after the name in six of ten cases."""
    words = rng.sample(list(tags), min(len(tags), rng.randint(1, 3)))
    return ", ".join([label, *words] if rng.random() < 0.6 or not words else words)


@torch.inference_mode()
def encode_images(
    model: VisionTextDualEncoderModel, processor: VisionTextDualEncoderProcessor, images: Sequence[Image.Image]
) -> torch.Tensor:
    """The vision tower's pooled outputs, before the projection: `(images, width)`."""
    outputs = []
    for start in range(0, len(images), 64):
        batch = processor.image_processor(images=list(images[start : start + 64]), return_tensors="pt")
        outputs.append(model.vision_model(**batch).pooler_output)
    return torch.cat(outputs)


@torch.inference_mode()
def encode_texts(
    model: VisionTextDualEncoderModel, processor: VisionTextDualEncoderProcessor, texts: Sequence[str]
) -> torch.Tensor:
    """The text tower's pooled outputs, before the projection: `(texts, width)`."""
    outputs = []
    for start in range(0, len(texts), 64):
        batch = processor.tokenizer(list(texts[start : start + 64]), padding=True, truncation=True, return_tensors="pt")
        outputs.append(model.text_model(**batch).pooler_output)
    return torch.cat(outputs)


def canonical_projections(
    images: torch.Tensor, texts: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The projections `(dim, width)` of both towers whose outputs correlate most, weighted by how much they do.

    With V and T the outputs of both towers, their ridged covariances and `V'T` between them,
    `Cvv^-1/2 Cvt Ctt^-1/2 = A S B'` gives `S A' Cvv^-1/2` and `S B' Ctt^-1/2`. The projections have no bias, so that
    instead of subtracting the means they leave out the means' directions.

    Args:
        images: `(views, concepts, width)`, every view of a concept's image.
        texts: `(captions, concepts, width)`, every caption of the same concepts.
        settings: The dimension and the ridges.
    """

    def whitener(outputs: torch.Tensor, ridge: float) -> torch.Tensor:
        mean = F.normalize(outputs.mean(dim=(0, 1)), dim=0)
        without_mean = torch.eye(len(mean), dtype=outputs.dtype) - torch.outer(mean, mean)
        flat = outputs.flatten(0, 1) @ without_mean
        values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
        scale = (values.clamp_min(0) + ridge * values.mean()).rsqrt()
        return (vectors * scale) @ vectors.T @ without_mean

    images, texts = images.double(), texts.double()
    whiten_image = whitener(images, settings.image_shrinkage)
    whiten_text = whitener(texts, settings.text_shrinkage)
    between = images.mean(dim=0).T @ texts.mean(dim=0) / images.shape[1]
    left, correlations, right = torch.linalg.svd(whiten_image @ between @ whiten_text.T)
    kept = slice(settings.projection_dim)
    strength = correlations[kept, None]
    weights = strength * (left[:, kept].T @ whiten_image), strength * (right[kept] @ whiten_text)
    # Only directions count; the size is that of a fresh nn.Linear, which optimizers' step sizes are made for.
    visual, text = (weight / weight.std() / (3 * weight.shape[1]) ** 0.5 for weight in weights)
    return visual.float().contiguous(), text.float().contiguous()


@torch.inference_mode()
def embed(
    model: VisionTextDualEncoderModel, processor: VisionTextDualEncoderProcessor, rows: datasets.Dataset
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' images and their English names, projected and of unit length: `(rows, dim)` each."""
    images = model.visual_projection(encode_images(model, processor, list(rows["image"])))
    texts = model.text_projection(encode_texts(model, processor, list(rows["label_en"])))
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


def best_logit_scale(similarities: Sequence[torch.Tensor]) -> float:
    """The logarithm of the scale, to half a unit, that has the least contrastive loss on these galleries."""

    def loss(scale: float) -> float:
        losses = [
            F.cross_entropy(scale * scores, torch.arange(len(scores)))
            for gallery in similarities
            for scores in (gallery, gallery.T)
        ]
        return torch.stack(losses).mean().item()

    return math.log(min((half / 2 for half in range(2, 201)), key=loss))


def evaluate(
    model: VisionTextDualEncoderModel, processor: VisionTextDualEncoderProcessor, images: datasets.Dataset, split: str
) -> dict[str, dict[str, float]]:
    """Recalls of the split's English names against its images, for each style by itself."""
    return {style: retrieval_recall(*embed(model, processor, rows_of(images, split, style))) for style in STYLES}


def report_of(settings: Any, recalls: Recalls, started: float) -> dict[str, Any]:
    """What `assembly.json` says."""
    rounded = {
        split: {style: {name: round(value, 2) for name, value in row.items()} for style, row in styles.items()}
        for split, styles in recalls.items()
    }
    return {"settings": asdict(settings), "recall": rounded, "build_seconds": round(time.perf_counter() - started, 1)}
