"""InfoNCE of pairs (ITC), each pair's or their mean."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# BLIP's and CLIP's initial temperature; transformers' BLIP retrieval model holds none.
LOGIT_SCALE = 1 / 0.07

Reduction = Literal["mean", "none"]


def similarity_loss(
    logits_per_image: Tensor,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Symmetric InfoNCE of scaled similarities, the ITC equation of `losses`, computed in float32.

    Args:
        logits_per_image: `(B, B)`; row i is image i, column j text j, pair i is on the diagonal.
        image_ids: Integers `(B,)`. Off the diagonal, an image and a text of equal id are no negatives of each other:
            they are masked out of both sums (they aren't made targets). One of the two sides stands for both.
        text_ids: Integers `(B,)`.
        reduction: `"none"` gives `(B,)`, the mean of a pair's two directions; `"mean"` their mean.

    Raises:
        ValueError: The matrix isn't square, an id vector isn't `(B,)`, or the reduction is unknown.
    """
    size = len(logits_per_image)
    if logits_per_image.shape != (size, size):
        raise ValueError(f"Rows must be pairs: the similarities have shape {tuple(logits_per_image.shape)}.")
    same = same_ids(image_ids, text_ids, size, logits_per_image.device)
    return reduced(symmetric(logits_per_image.float(), same), reduction)


def contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """`similarity_loss` of embeddings, in float32 also under autocast.

    Args:
        image_embeds: `(B, d)`, of any length: cosines are taken.
        text_embeds: `(B, d)`, row i the match of image i.
        logit_scale: The factor itself, 1 / temperature; CLIP's parameter is its logarithm: pass `logit_scale.exp()`.
    """
    return similarity_loss(cosines(image_embeds, text_embeds) * logit_scale, image_ids, text_ids, reduction)


def pair_losses(
    image_embeds: Tensor,
    text_embeds: Tensor,
    all_images: Tensor,
    all_texts: Tensor,
    logit_scale: Tensor | float,
    image_ids: Tensor,
    text_ids: Tensor,
    first: int = 0,
    multi_positive: bool = False,
) -> Tensor:
    """Each pair's ITC among the pairs of several processes: the equation of `losses`, `(b,)`.

    Unlike in `similarity_loss`, images and texts have ids of their own kind: two pairs are no negatives of each
    other if they share the image's or the text's.

    Args:
        image_embeds: `(b, d)`, of unit length, of b pairs that stand from `first` on among all of them.
        text_embeds: `(b, d)`.
        all_images: `(B, d)`, with those of this process.
        all_texts: `(B, d)`.
        logit_scale: 1 / temperature.
        image_ids: Integers `(B,)`, of all.
        text_ids: Integers `(B,)`.
        multi_positive: Such pairs are each other's matches: of P matches each is a target of weight 1 / P (UniCL, Yang et al.
            2022), so an image learns from all of its captions in the batch.
    """
    warn_of_one(len(all_images))
    target = torch.arange(first, first + len(image_embeds), device=image_embeds.device)
    same = (image_ids[target, None] == image_ids) | (text_ids[target, None] == text_ids)
    if multi_positive:
        weights = same / same.sum(dim=1, keepdim=True)
        logits = [one @ other.T * logit_scale for one, other in ((image_embeds, all_texts), (text_embeds, all_images))]
        return sum(F.cross_entropy(side, weights.to(side), reduction="none") for side in logits) / 2  # type: ignore[return-value]
    same[torch.arange(len(target), device=same.device), target] = False
    losses = [
        F.cross_entropy((one @ other.T * logit_scale).masked_fill(same, -torch.inf), target, reduction="none")
        for one, other in ((image_embeds, all_texts), (text_embeds, all_images))
    ]
    return (losses[0] + losses[1]) / 2


def contrastive_loss_func(
    outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """ITC for `Trainer(compute_loss_func=contrastive_loss_func)` with integer ids as labels.

    The labels only say which rows match each other. `ImageTextCollator(..., id_column=..., id_name="labels")` makes
    them; `TrainingArguments(label_names=["labels"], remove_unused_columns=False)` is needed for an eval_loss. For ITM,
    which needs a second pass through the model, use `ImageTextRetrievalTrainer`. For models of the sigmoid loss (SigLIP) use
    the loss that their own forward gives with `return_loss=True`, or `ContrastiveTrainer`.

    Args:
        outputs: Of a dual encoder, with the scaled `logits_per_image`; or of BLIP's retrieval model called with
            `use_itm_head=False`, whose `itm_score` are the cosines and get the factor 1 / 0.07.
        labels: Ids `(B,)`; None means that all differ.
        num_items_in_batch: Rows of all accumulated batches, by which the sum is then divided.
    """
    logits = outputs.get("logits_per_image")
    if logits is None:
        scores = outputs.get("itm_score")
        if scores is None or scores.shape[0] != scores.shape[1]:
            raise ValueError(
                "The outputs have neither logits_per_image nor the (B, B) itm_score of use_itm_head=False."
            )
        logits = scores * LOGIT_SCALE
    loss = similarity_loss(logits, labels, labels, reduction="none")
    return loss.mean() if num_items_in_batch is None else loss.sum() / num_items_in_batch


def symmetric(logits: Tensor, same: Tensor) -> Tensor:
    """ITC (B,) of float32 logits (B, B), but for the pairs off the diagonal that are the same (B, B)."""
    size = len(logits)
    warn_of_one(size)
    logits = logits.masked_fill(same & ~torch.eye(size, dtype=torch.bool, device=logits.device), -torch.inf)
    target = torch.arange(size, device=logits.device)
    return (F.cross_entropy(logits, target, reduction="none") + F.cross_entropy(logits.T, target, reduction="none")) / 2


def reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction={reduction!r} is neither "mean" nor "none".')
    return loss.mean() if reduction == "mean" else loss


def warn_of_one(size: int) -> None:
    if size == 1:
        warnings.warn(
            "A batch of one pair has no negatives, so its contrastive loss teaches nothing. Use batches of two pairs or "
            "more; dataloader_drop_last=True leaves out a last batch of one.",
            stacklevel=4,
        )


def same_ids(image_ids: Tensor | None, text_ids: Tensor | None, size: int, device: torch.device) -> Tensor:
    """(B, B) bool: image i and text j have the same id; all False without ids."""
    image_ids, text_ids = (text_ids if image_ids is None else image_ids), (image_ids if text_ids is None else text_ids)
    if image_ids is None or text_ids is None:
        return torch.zeros(size, size, dtype=torch.bool, device=device)
    if image_ids.shape != (size,) or text_ids.shape != (size,):
        raise ValueError(f"Ids have shapes {tuple(image_ids.shape)} and {tuple(text_ids.shape)}, not ({size},).")
    return image_ids.to(device)[:, None] == text_ids.to(device)


def cosines(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    with torch.autocast(image_embeds.device.type, enabled=False):
        return F.normalize(image_embeds.float(), dim=-1) @ F.normalize(text_embeds.float(), dim=-1).T
