"""The sigmoid loss of pairs (SigLIP), whose logits are never held whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .contrastive import Reduction, reduced, warn_of_one

CHUNK = 128  # texts, or images, that are looked at together


def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """The sigmoid loss of embeddings, in float32 also under autocast; the (B, B) logits are never held whole.

    Args:
        image_embeds: `(B, d)`, of any length: cosines are taken.
        text_embeds: `(B, d)`, row i the match of image i.
        logit_scale: The factor itself; SigLIP's parameter is its logarithm: pass `logit_scale.exp()`.
        logit_bias: beta.
        image_ids: Integers `(B,)`: pairs of equal image ids are no negatives of each other. By default all differ.
        text_ids: Integers `(B,)`, likewise.
        reduction: `"none"` gives `(B,)`, the mean of a pair's row and column sums; `"mean"` their mean.

    Raises:
        ValueError: The two sides have different shapes, an id vector isn't `(B,)`, or the reduction is unknown.
    """
    if image_embeds.shape != text_embeds.shape:
        shapes = f"{tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}"
        raise ValueError(f"Rows must be pairs: the embeddings have shapes {shapes}.")
    for ids in (image_ids, text_ids):
        if ids is not None and ids.shape != (len(image_embeds),):
            raise ValueError(f"Ids have shape {tuple(ids.shape)}, not ({len(image_embeds)},).")
    local = torch.arange(len(image_embeds), device=image_embeds.device)
    with torch.autocast(image_embeds.device.type, enabled=False):
        image, text = (F.normalize(side.float(), dim=-1) for side in (image_embeds, text_embeds))
        images, texts = (local if ids is None else ids.to(local.device) for ids in (image_ids, text_ids))
        loss = sigmoid_pair_losses(image, text, image, text, logit_scale, logit_bias, images, texts)
    return reduced(loss, reduction)


def sigmoid_pair_losses(
    image_embeds: Tensor,
    text_embeds: Tensor,
    all_images: Tensor,
    all_texts: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    image_ids: Tensor,
    text_ids: Tensor,
    first: int = 0,
    chunk_size: int = CHUNK,
    multi_positive: bool = False,
) -> Tensor:
    """Each pair's share of the sigmoid loss among the pairs of several processes, `(b,)`: see `pair_losses`.

    A pair's share is the mean of its image's terms with all texts and of its text's with all images, so their mean over
    all pairs is the equation of `losses`. With `multi_positive` pairs that share an image or a text have y = 1. Logits are made for `chunk_size` columns at a time, and again in backward.
    """
    warn_of_one(len(all_images))
    local = torch.arange(first, first + len(image_embeds), device=image_embeds.device)

    def of_columns(columns: Tensor, *tensors: Tensor) -> Tensor:
        image, text, images, texts, scale, bias = tensors
        match = local[:, None] == columns
        same = (image_ids[local, None] == image_ids[columns]) | (text_ids[local, None] == text_ids[columns])
        y = (same if multi_positive else match).to(image.dtype) * 2 - 1
        left_out = torch.zeros_like(same) if multi_positive else same & ~match
        terms = [
            F.softplus(-y * (one @ other.T * scale + bias)).masked_fill(left_out, 0).sum(dim=1)
            for one, other in ((image, texts), (text, images))
        ]
        return (terms[0] + terms[1]) / 2

    scale, bias = (torch.as_tensor(x, device=local.device) for x in (logit_scale, logit_bias))
    loss = image_embeds.new_zeros(len(local))
    for start in range(0, len(all_images), chunk_size):
        columns = slice(start, start + chunk_size)
        places = torch.arange(len(all_images), device=local.device)[columns]
        tensors = (image_embeds, text_embeds, all_images[columns], all_texts[columns], scale, bias)
        loss = loss + checkpoint(of_columns, places, *tensors, use_reentrant=False, preserve_rng_state=False)
    return loss
