"""The English CLIP: frozen DINOv2-S and MiniLM, joined by projections that are trained here.

No package ships a CLIP, so `english_clip()` assembles one: a `VisionTextDualEncoderModel` with its
`VisionTextDualEncoderProcessor` (84-pixel pictures, English tokenizer) in one folder. Both towers stay as they came,
MiniLM's pooler included; the two projections and the logit scale learn from the training families' pictures in the old
styles, captioned with names and keywords. The new style and every other family are never seen. `assembly.json` beside
the weights holds the settings and the recalls.

The settings were chosen by the old styles' recall on the validation families, means of three seeds.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
from PIL import Image, ImageOps
from rich.progress import track
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoTokenizer,
    BitImageProcessorPil,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from .fetch import CONSOLE, build_once
from .pictures import OLD_STYLES, SIZE, STYLES, emoji_pictures
from .towers import dinov2_small, minilm


@dataclass(frozen=True)
class Settings:
    """How the projections are trained."""

    projection_dim: int = 512
    steps: int = 240
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    temperature: float = 0.1
    """Where the learned temperature starts."""
    dropout: float = 0.1
    """Dropout on the towers' outputs."""
    views: int = 3
    """Shrunken, shifted, sometimes grey views of each picture, beside the picture itself."""
    captions: int = 8
    """Captions sampled from a concept's name and keywords, beside the name itself."""
    caption_share: float = 0.7
    """How often a batch takes a sampled caption rather than the name."""
    seed: int = 0


def english_clip() -> Path:
    """The model's folder: load it with `VisionTextDualEncoderModel` and `VisionTextDualEncoderProcessor`."""
    return build_once("english-clip-1", lambda folder: _build(folder, Settings()))


def _build(folder: Path, settings: Settings) -> None:
    started = time.perf_counter()
    pictures = emoji_pictures()
    rng = random.Random(settings.seed)
    torch.manual_seed(settings.seed)
    processor = VisionTextDualEncoderProcessor(image_processor(), AutoTokenizer.from_pretrained(minilm()))
    model = VisionTextDualEncoderModel.from_vision_text_pretrained(
        str(dinov2_small()),
        str(minilm()),
        projection_dim=settings.projection_dim,
        logit_scale_init_value=float(-torch.tensor(settings.temperature).log()),
    )
    for projection in (model.visual_projection, model.text_projection):
        torch.nn.init.kaiming_uniform_(projection.weight, a=5**0.5)
    model.eval().requires_grad_(False)

    train = pictures.filter(lambda split, style: split == "train" and style in OLD_STYLES, input_columns=["split", "style"])
    seen = list(train["image"])
    views = [seen] + [[augmented(picture, rng) for picture in seen] for _ in range(settings.views)]
    image_outputs = torch.stack([encode_pictures(model, processor, view, "training pictures") for view in views])
    image_outputs = image_outputs.unflatten(1, (-1, len(OLD_STYLES)))  # view, concept, style, width: rows go by concept
    names = train.select(range(0, len(train), len(OLD_STYLES)))
    captions = [list(names["label_en"])]
    for _ in range(settings.captions):
        captions.append([caption(label, tags, rng) for label, tags in zip(names["label_en"], names["tags_en"], strict=True)])
    text_outputs = torch.stack([encode_texts(model, processor, texts) for texts in captions])  # caption, concept, width
    train_projections(model, image_outputs.transpose(1, 2).flatten(0, 1), text_outputs, settings)

    model.requires_grad_(True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    recalls = {split: evaluate(model, processor, pictures, split) for split in ("validation", "test")}
    seconds = round(time.perf_counter() - started, 1)
    report = {"settings": asdict(settings), "recall": recalls, "build_seconds": seconds}
    (folder / "assembly.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    CONSOLE.print(f"English CLIP assembled in {seconds:.0f} s; mean recall in per cent:", recall_means(recalls))


def image_processor() -> BitImageProcessorPil:
    """DINOv2's preprocessing at the pictures' own size."""
    return BitImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def augmented(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The picture at 70-100 % of its size somewhere on white, in three of ten cases without colour."""
    side = round(SIZE * rng.uniform(0.7, 1.0))
    ground = Image.new("RGB", (SIZE, SIZE), "white")
    corner = rng.randint(0, SIZE - side), rng.randint(0, SIZE - side)
    ground.paste(picture.resize((side, side), Image.Resampling.BICUBIC), corner)
    return ImageOps.grayscale(ground).convert("RGB") if rng.random() < 0.3 else ground


def caption(label: str, tags: Sequence[str], rng: random.Random) -> str:
    """One to three of the keywords, after the name in six of ten cases."""
    words = rng.sample(list(tags), min(len(tags), rng.randint(1, 3)))
    return ", ".join([label, *words] if rng.random() < 0.6 or not words else words)


@torch.inference_mode()
def encode_pictures(
    model: VisionTextDualEncoderModel,
    processor: VisionTextDualEncoderProcessor,
    pictures: Sequence[Image.Image],
    what: str,
) -> torch.Tensor:
    """The vision tower's pooled outputs, before the projection: `(pictures, width)`."""
    outputs = []
    for start in track(range(0, len(pictures), 64), f"Encoding {what}", console=CONSOLE, transient=True):
        batch = processor.image_processor(images=list(pictures[start : start + 64]), return_tensors="pt")
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


def train_projections(
    model: VisionTextDualEncoderModel, images: torch.Tensor, texts: torch.Tensor, settings: Settings
) -> None:
    """Symmetric InfoNCE over the projections and the logit scale.

    Args:
        images: `(views, concepts, width)`, the vision tower's outputs for every view in every style.
        texts: `(captions, concepts, width)`, the text tower's outputs; the first caption is the name.
        settings: How long and how fast.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    projections = [model.visual_projection.weight, model.text_projection.weight]
    trained = [*projections, model.logit_scale]
    for parameter in trained:
        parameter.requires_grad_(True)
    groups = [
        {"params": projections, "weight_decay": settings.weight_decay},
        {"params": [model.logit_scale], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    order = torch.empty(0, dtype=torch.long)
    size, target = settings.batch_size, torch.arange(settings.batch_size)
    for _ in range(settings.steps):
        if len(order) < size:
            order = torch.randperm(images.shape[1], generator=generator)
        concepts, order = order[:size], order[size:]
        view = torch.randint(len(images), (size,), generator=generator)
        sampled = torch.randint(1, len(texts), (size,), generator=generator)
        named = torch.rand(size, generator=generator) >= settings.caption_share
        image = F.dropout(images[view, concepts], settings.dropout)
        text = F.dropout(texts[sampled.masked_fill(named, 0), concepts], settings.dropout)
        image = F.normalize(model.visual_projection(image), dim=-1)
        text = F.normalize(model.text_projection(text), dim=-1)
        logits = model.logit_scale.exp() * text @ image.T
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def evaluate(
    model: VisionTextDualEncoderModel,
    processor: VisionTextDualEncoderProcessor,
    pictures: datasets.Dataset,
    split: str,
) -> dict[str, dict[str, float]]:
    """Recalls of the split's English names against its pictures, for each style by itself."""
    recalls = {}
    for style in STYLES:
        rows = pictures.filter(lambda s, t, style=style: s == split and t == style, input_columns=["split", "style"])
        images = model.visual_projection(encode_pictures(model, processor, list(rows["image"]), f"{split} pictures"))
        texts = model.text_projection(encode_texts(model, processor, list(rows["label_en"])))
        recalls[style] = recall(F.normalize(texts, dim=-1) @ F.normalize(images, dim=-1).T)
    return recalls


def recall(text_by_image: torch.Tensor) -> dict[str, float]:
    """R@1, R@5, R@10 in per cent in both directions and their mean, the pairs being on the diagonal."""
    result = {}
    for direction, scores in (("text_to_image", text_by_image), ("image_to_text", text_by_image.T)):
        rank = (scores > scores.diagonal()[:, None]).sum(dim=1)
        result |= {f"{direction}_R@{k}": 100 * (rank < k).float().mean().item() for k in (1, 5, 10)}
    return {name: round(value, 2) for name, value in {**result, "mean": sum(result.values()) / len(result)}.items()}


def recall_means(recalls: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The mean recall alone, for each split and style."""
    return {split: {style: row["mean"] for style, row in styles.items()} for split, styles in recalls.items()}
