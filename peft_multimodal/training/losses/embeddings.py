"""What losses are computed of: embeddings of a dual encoder, and keys of equal texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def dual_embeddings(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """`image_embeds` and `text_embeds` of a dual encoder's own forward, `(B, d)` each; TypeError where it gives none.

    It goes through the wrapper that training has put around the model, so hooks of DDP and FSDP run.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("return_loss", "labels", "ids")}
    outputs = model(**inputs)
    image_embeds, text_embeds = (getattr(outputs, f"{side}_embeds", None) for side in ("image", "text"))
    if image_embeds is None or text_embeds is None:
        raise TypeError(
            f"{type(outputs).__name__} has no image_embeds and text_embeds: pass encode=, such as retrieval_embeddings "
            "for BLIP's retrieval model."
        )
    return image_embeds, text_embeds


def text_keys(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """int64 (B,) keys of tokenised texts (B, L): equal texts have equal keys, however they are padded."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
    place = mask.cumsum(dim=1) * mask  # from 1; of padding 0
    # Odd factors of 64 bits, and products that wrap around: a sum that depends on each token and its place.
    mixed = (input_ids.long() + 1) * -7046029254386353131 ^ (place.long() * -4417276706812531889)
    mixed = (mixed ^ (mixed >> 29)) * 0x2545F4914F6CDD1D
    return ((mixed ^ (mixed >> 32)) * mask.long()).sum(dim=1)
