"""Images by their numbers: what the English CLIP's frozen vision tower makes of them is computed once and kept.

A model whose vision tower was replaced by `look_up` or `look_up_lower` takes as `pixel_values` what `as_pixels` gives, and
reads the kept outputs in their place. That is exact as long as nothing trains in the layers that are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import VisionTextDualEncoderModel, VisionTextDualEncoderProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .assets import english_clip
from .assets.categories import CLASSES, categories
from .assets.fetch import build_once
from .assets.images import SIZE

LOWER = 9
"""Vision layers of twelve whose output is kept for `look_up_lower`."""


@dataclass(frozen=True)
class KeptImages:
    """One of the two sets of `categories`; row i of every field is image i."""

    data: str
    states: Tensor
    """The vision tower's last states (n, S, d_v), the class token first."""
    lower: Tensor
    """The states after `LOWER` layers."""
    embeds: Tensor
    """v (n, e), of norm 1."""
    labels: Tensor
    styles: Sequence[str]
    concepts: Sequence[str]
    splits: Sequence[str]

    @property
    def names(self) -> list[str]:
        """The classes."""
        return list(CLASSES[self.data])

    def rows(self, split: str, styles: Sequence[str] | None = None) -> Tensor:
        """The numbers of the split's images, in these styles where they are given."""
        both = zip(self.splits, self.styles, strict=True)
        return torch.tensor([i for i, (s, t) in enumerate(both) if s == split and (styles is None or t in styles)])


@cache
def kept_images(data: str) -> KeptImages:
    """The images of `categories(data)`; what the tower makes of them is kept in the cache folder."""
    folder = build_once(f"few-shot-outputs/{data}-{english_clip().name}", lambda folder: _build(data, folder))
    table = categories(data)
    kept = load_file(folder / "outputs.safetensors")
    return KeptImages(
        data=data,
        labels=torch.tensor(table["label"]),
        styles=list(table["style"]),
        concepts=list(table["concept"]),
        splits=list(table["split"]),
        **kept,
    )


@torch.inference_mode()
def _build(data: str, folder: Path, batch_size: int = 32) -> None:
    model = VisionTextDualEncoderModel.from_pretrained(english_clip()).eval()
    processor = VisionTextDualEncoderProcessor.from_pretrained(english_clip())
    images, lower, states = list(categories(data)["image"]), [], []
    vision: Any = model.vision_model
    vision.encoder.layer[LOWER].register_forward_pre_hook(lambda module, inputs: lower.append(inputs[0].clone()))
    for start in track(range(0, len(images), batch_size), f"Looking at {data}", transient=True):
        batch = processor.image_processor(images=images[start : start + batch_size], return_tensors="pt")
        states.append(vision(**batch).last_hidden_state)
    last = torch.cat(states)
    embeds = F.normalize(model.visual_projection(last[:, 0]), dim=-1)
    save_file({"states": last, "lower": torch.cat(lower), "embeds": embeds}, folder / "outputs.safetensors")


def as_pixels(rows: Tensor) -> Tensor:
    """Stands for images (B, 3, SIZE, SIZE): every pixel is the image's number."""
    return rows.float().view(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE)


def numbers(pixel_values: Tensor) -> Tensor:
    """The numbers (B) again."""
    return pixel_values[:, 0, 0, 0].long()


def look_up(model: Any, images: KeptImages, patches_of: Tensor | None = None) -> Any:
    """The model with kept outputs for its vision tower.

    Args:
        patches_of: (n), image i has the patches of image `patches_of[i]`; its embedding stays its own.
    """
    states = images.states

    def forward(pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        rows = numbers(pixel_values)
        looked_at = rows if patches_of is None else patches_of[rows]
        return BaseModelOutputWithPooling(last_hidden_state=states[looked_at], pooler_output=states[rows, 0])

    model.vision_model.forward = forward
    return model


def look_up_lower(model: Any, images: KeptImages, layers: int = LOWER) -> Any:
    """The model with kept states for the lower `layers` layers of its vision tower."""
    vision = model.vision_model
    vision.embeddings.forward = lambda pixel_values, **kwargs: images.lower[numbers(pixel_values)]
    for layer in vision.encoder.layer[:layers]:
        layer.forward = lambda states, *args, **kwargs: states
    return model
