"""A BLIP for retrieval from pretrained towers: it ranks by cosine (ITC) and by a head on fused pairs (ITM).

No package ships a BLIP, so `blip_retrieval()` assembles one: a `BlipForImageTextRetrieval` with its `BlipProcessor` in
one folder. Its vision tower computes what DINOv2-S does, its text encoder carries MiniLM; neither is trained. The
projections are fitted as the English CLIP's are. The cross-attentions and the matching head start at random and learn
to tell the training families' images in the old styles from hard negatives of the same batch. The new style and the
test families are never seen. `assembly.json` beside the weights holds the settings and the recalls, by cosine (`itc`)
and with the nearest candidates re-ranked by the head (`itm`).

The projections' settings are the English CLIP's but for the number of views; those of the matching head were set by
what a build may cost, and not compared with others.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from transformers import BlipForImageTextRetrieval, BlipProcessor

from peft_multimodal.evaluation import rerank_recall, retrieval_recall
from peft_multimodal.training.losses import LOGIT_SCALE, hard_negative_indices, matching_loss

from .blip_vqa import assemble
from .english_clip import Settings as ProjectionSettings
from .english_clip import canonical_projections, captions_of, report_of, rows_of, views_of
from .fetch import CONSOLE, build_once
from .images import OLD_STYLES, SIZE, STYLES, emoji_images


@dataclass(frozen=True)
class Settings(ProjectionSettings):
    """How the projections are fitted, and how the cross-attentions and the matching head are trained."""

    views: int = 1
    steps: int = 200
    batch_size: int = 24
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    candidates: int = 16
    """How many of the nearest are re-ranked when the model is measured."""


def blip_retrieval() -> Path:
    """The BLIP's folder: load it with `BlipForImageTextRetrieval` and `BlipProcessor`."""
    return build_once("blip-retrieval-1", lambda folder: _build(folder, Settings()))


def _build(folder: Path, settings: Settings) -> None:
    started = time.perf_counter()
    images = emoji_images()
    rng = random.Random(settings.seed)
    torch.manual_seed(settings.seed)
    model, processor = assemble_retrieval()

    train = [rows_of(images, "train", style) for style in OLD_STYLES]
    captions = captions_of(train[0], settings, rng)
    views = views_of(train, settings, rng)
    states = torch.stack([image_states(model, processor, view) for view in track(views, "Encoding", console=CONSOLE)])
    model.vision_proj.weight.data, model.text_proj.weight.data = canonical_projections(
        states[:, :, 0], torch.stack([text_states(model, processor, texts) for texts in captions]), settings
    )
    torch.nn.init.zeros_(model.vision_proj.bias)
    torch.nn.init.zeros_(model.text_proj.bias)
    train_matching(model, processor, states, captions, settings)

    model.requires_grad_(True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    recalls: dict[str, Any] = {"itc": {}, "itm": {}}
    for split in ("validation", "test"):
        rows = {style: rows_of(images, split, style) for style in STYLES}
        found = {style: evaluate(model, processor, rows[style], settings.candidates) for style in STYLES}
        for kind in recalls:
            recalls[kind][split] = {style: found[style][kind] for style in STYLES}
    report = {kind: report_of(settings, recalls[kind], started) for kind in recalls}
    merged = report["itm"] | {"recall": {kind: report[kind]["recall"] for kind in recalls}}
    (folder / "assembly.json").write_text(json.dumps(merged, indent=2) + "\n", "utf-8")
    means = {
        f"{kind}, {split}": {style: round(row["mean_recall"], 1) for style, row in styles.items()}
        for kind, splits in recalls.items()
        for split, styles in splits.items()
    }
    CONSOLE.print(f"BLIP for retrieval assembled in {merged['build_seconds']:.0f} s; mean recall in per cent:", means)


def assemble_retrieval() -> tuple[BlipForImageTextRetrieval, BlipProcessor]:
    """The model before training, in eval mode, and its processor: the towers of the question answerer."""
    answerer, processor = assemble(SIZE)
    model = BlipForImageTextRetrieval(answerer.config)
    model.vision_model, model.text_encoder = answerer.vision_model, answerer.text_encoder
    return model.eval(), processor


@torch.no_grad()
def image_states(model: BlipForImageTextRetrieval, processor: BlipProcessor, images: Sequence[Image.Image]) -> Tensor:
    """The vision tower's states `(images, patches + 1, width)`."""
    states = []
    for start in range(0, len(images), 64):
        batch = processor.image_processor(list(images[start : start + 64]), return_tensors="pt")
        states.append(model.vision_model(**batch).last_hidden_state)
    return torch.cat(states)


@torch.no_grad()
def text_states(model: BlipForImageTextRetrieval, processor: BlipProcessor, texts: Sequence[str]) -> Tensor:
    """The text encoder's states `(texts, width)` at the first token, without an image."""
    parts = (tokens(processor, texts[start : start + 64]) for start in range(0, len(texts), 64))
    return torch.cat([model.text_encoder(**part).last_hidden_state[:, 0] for part in parts])


def tokens(processor: BlipProcessor, texts: Sequence[str]) -> dict[str, Tensor]:
    """The text encoder's input_ids and attention_mask `(texts, longest)`."""
    found = processor.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def match_logits(model: BlipForImageTextRetrieval, states: Tensor, texts: dict[str, Tensor]) -> Tensor:
    """The matching head's logits `(pairs, 2)` of image states and texts, row by row."""
    present = torch.ones(states.shape[:2], dtype=torch.long)
    fused = model.text_encoder(**texts, encoder_hidden_states=states, encoder_attention_mask=present)
    return model.itm_head(fused.last_hidden_state[:, 0])


def train_matching(
    model: BlipForImageTextRetrieval,
    processor: BlipProcessor,
    states: Tensor,
    captions: Sequence[Sequence[str]],
    settings: Settings,
) -> None:
    """ITM: every pair of a batch, and for each image and text a hard negative drawn by their cosines.

    Args:
        model: Only its cross-attentions, their norms and its matching head are trained.
        processor: For the tokenizer.
        states: `(views, concepts, patches + 1, width)`, the vision tower's outputs for every view in every style.
        captions: Of the same concepts, `settings.name_weight` times the names and then sampled ones.
        settings: How long and how fast.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    model.requires_grad_(False)
    trained = [
        parameter
        for name, parameter in model.named_parameters()
        if ".crossattention." in name or name.startswith("itm_head.")
    ]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    size, own = settings.batch_size, torch.arange(settings.batch_size)
    for _ in track(range(settings.steps), "Training the matching head", console=CONSOLE, transient=True):
        concepts = torch.randperm(states.shape[1], generator=generator)[:size]
        chosen = torch.randint(len(captions), (size,), generator=generator).tolist()
        texts = [captions[row][concept] for row, concept in zip(chosen, concepts.tolist(), strict=True)]
        seen = states[torch.randint(len(states), (size,), generator=generator), concepts]
        images = F.normalize(model.vision_proj(seen[:, 0]), dim=-1)
        words = F.normalize(model.text_proj(text_states(model, processor, texts)), dim=-1)
        hard_texts, hard_images = hard_negative_indices(LOGIT_SCALE * images @ words.T, generator=generator)
        of_images, of_texts = torch.cat([own, own, hard_images]), torch.cat([own, hard_texts, own])
        encoded = {name: value[of_texts] for name, value in tokens(processor, texts).items()}
        loss = matching_loss(match_logits(model, seen[of_images], encoded), torch.arange(len(of_texts)) < size)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def evaluate(
    model: BlipForImageTextRetrieval, processor: BlipProcessor, rows: datasets.Dataset, candidates: int
) -> dict[str, dict[str, float]]:
    """Recalls of the rows' English names against their images, by `itc` alone and re-ranked by `itm`."""
    states, names = image_states(model, processor, list(rows["image"])), list(rows["label_en"])
    images, texts = model.vision_proj(states[:, 0]), model.text_proj(text_states(model, processor, names))
    encoded = tokens(processor, names)

    def score(of_images: Tensor, of_texts: Tensor) -> Tensor:
        pairs = {name: value[of_texts] for name, value in encoded.items()}
        return match_logits(model, states[of_images], pairs)[:, 1]

    return {
        "itc": retrieval_recall(images, texts),
        "itm": rerank_recall(images, texts, score, candidates=candidates),
    }
