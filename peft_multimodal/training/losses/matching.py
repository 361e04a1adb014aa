"""ITC and ITM with in-batch hard negatives, of models made like `BlipForImageTextRetrieval`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contrastive import LOGIT_SCALE, cosines, same_ids, symmetric
from .embeddings import text_keys


def retrieval_loss(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    logit_scale: Tensor | float = LOGIT_SCALE,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """ITC + ITM with in-batch hard negatives, for a model made like `BlipForImageTextRetrieval`.

    The towers run once; only the fusion pass sees 3 B pairs: the B matches, each image with a hard negative text and
    each text with a hard negative image. Pairs that share their caption, or their id, are no negatives of each other; of
    a row without negatives (one row, or all the same) ITM sees the match alone.
    Negatives come from this process's batch only. Momentum distillation and queues of ALBEF and BLIP are left out.

    Args:
        model: Bare or in a `PeftModel`; has vision_model, text_encoder, vision_proj, text_proj and itm_head. Under DDP
            or FSDP use `ImageTextRetrievalTrainer`, which stays inside the wrapper's forward.
        batch: pixel_values `(B, 3, H, W)`, input_ids and attention_mask `(B, L)`, row i a matching pair; optionally
            integer ids `(B,)`: rows of equal id match each other.
        logit_scale: 1 / temperature of ITC and of the sampling.
        generator: Of the negatives, on the model's device.

    Returns:
        `{"loss", "itc_loss", "itm_loss"}`, scalars, the first the sum of the others; and the unit embeddings
        `{"image_embeds", "text_embeds"}`, `(B, d)` each, without gradient.
    """
    with _adapters_active(model):
        base = _base(model)
        image_states, image_embeds, text_embeds = _encode(base, batch)
        ids, size = batch.get("ids"), len(image_embeds)
        similarity = cosines(image_embeds, text_embeds) * logit_scale
        captions = text_keys(batch["input_ids"], batch.get("attention_mask"))
        same = same_ids(ids, ids, size, similarity.device) | (captions[:, None] == captions)
        itc = symmetric(similarity, same).mean()

        pairs = torch.arange(size, device=similarity.device)
        rows, texts, images = _hard_negatives(similarity, same, generator)
        image_index, text_index = torch.cat([pairs, rows, images]), torch.cat([pairs, texts, rows])
        logits = _match_logits(base, image_states[image_index], batch, text_index)
        itm = matching_loss(logits, torch.arange(len(logits), device=logits.device) < size)
    embeds = {"image_embeds": image_embeds.detach(), "text_embeds": text_embeds.detach()}
    return {"loss": itc + itm, "itc_loss": itc.detach(), "itm_loss": itm.detach(), **embeds}


def retrieval_embeddings(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """ITC embeddings `(image, text)`, `(B, d)` each and of unit length, of a BLIP-style retrieval model.

    It has no `get_image_features`: this is the `encode` of `peft_multimodal.evaluation.compute_embeddings` for it.
    """
    _, image_embeds, text_embeds = _encode(_base(model), batch)
    return image_embeds, text_embeds


def matching_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of an image-text matching head, in float32.

    Args:
        logits: `(n, 2)`; class 1 is "match", as in BLIP.
        labels: `(n,)`, 1 for a match, 0 for a negative.
    """
    return F.cross_entropy(logits.float(), labels.long())


@torch.no_grad()
def hard_negative_indices(
    similarity: Tensor, ids: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """One negative of each row in both directions, the likelier the more similar.

    Text j is drawn for image i with probability softmax_j(similarity[i, j]) over the texts of other ids; likewise by
    columns.

    Args:
        similarity: Scaled similarities (images, texts), `(B, B)`.
        ids: Integers `(B,)`; rows of equal id match each other. By default every row has its own.
        generator: On the device of `similarity`.

    Returns:
        `(texts, images)`: int64 `(B,)` each, `texts[i]` a negative of image i and `images[i]` one of text i.

    Raises:
        ValueError: A row has no negative, as every row has its id.
    """
    same = same_ids(ids, ids, len(similarity), similarity.device)
    rows, texts, images = _hard_negatives(similarity, same, generator)
    if len(rows) < len(similarity):
        lacking = sorted({*range(len(similarity))} - {*rows.tolist()})
        raise ValueError(
            f"Rows {lacking} have no negative: all {len(similarity)} rows share one id. Use a larger batch of more ids, "
            "or drop a last batch of one row (dataloader_drop_last=True)."
        )
    return texts, images


def _hard_negatives(
    similarity: Tensor, same: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, texts, images), int64 (n,) each: the rows that have a negative, and a text and an image of another one.

    same: symmetric (B, B); what is the same as a row, like the row itself, is no negative of it.
    """
    same = same | torch.eye(len(same), dtype=torch.bool, device=same.device)
    rows = (~same).any(dim=1).nonzero()[:, 0]
    logits = similarity.float().masked_fill(same, -torch.inf)
    texts, images = (
        torch.multinomial(side[rows].softmax(dim=1), 1, generator=generator)[:, 0] if len(rows) else rows
        for side in (logits, logits.T)
    )
    return rows, texts, images


def _base(model: Any) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    parts = ("vision_model", "text_encoder", "vision_proj", "text_proj", "itm_head")
    if missing := [part for part in parts if not hasattr(base, part)]:
        raise TypeError(f"{type(base).__name__} is not made like BlipForImageTextRetrieval: it has no {missing}.")
    return base


def _adapters_active(model: nn.Module) -> Any:
    """What `PeftModel.forward` enters: adapters that look at a call do so here too."""
    enter = getattr(model, "_enable_peft_forward_hooks", None)
    return nullcontext() if enter is None else enter()


def _encode(base: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Image states (B, n, d_v) and the two sides' unit embeddings (B, d), as BLIP's forward with use_itm_head=False."""
    image_states = base.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state
    text = base.text_encoder(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"))
    image_embeds = F.normalize(base.vision_proj(image_states[:, 0]), dim=-1)
    return image_states, image_embeds, F.normalize(base.text_proj(text.last_hidden_state[:, 0]), dim=-1)


def _match_logits(base: Any, image_states: Tensor, batch: Mapping[str, Tensor], text_index: Tensor) -> Tensor:
    """(n, 2) ITM logits of images (n, ...) with the batch's texts text_index (n,), as BLIP's forward."""
    mask = batch.get("attention_mask")
    fused = base.text_encoder(
        input_ids=batch["input_ids"][text_index],
        attention_mask=None if mask is None else mask[text_index],
        encoder_hidden_states=image_states,
        encoder_attention_mask=torch.ones(image_states.shape[:2], dtype=torch.long, device=image_states.device),
    )
    return base.itm_head(fused.last_hidden_state[:, 0])
