"""Losses of image-text retrieval as pure functions: contrastive (ITC), matching (ITM), hard negatives, and their sum.

ITC, for unit embeddings v_i, t_j of B pairs, scale s = 1 / temperature, and N(i) the rows that aren't i's match:

    L = -1/2B Σ_i [log e^{s v_i·t_i} / (e^{s v_i·t_i} + Σ_{j∈N(i)} e^{s v_i·t_j}) + the same with v and t exchanged]

(CLIP, Radford et al. 2021). Models like SigLIP (Zhai et al. 2023) were trained by the sigmoid loss instead, which looks at
each image and text alone, with a bias beta beside the scale:

    L = -1/B Σ_i Σ_{j = i or j∈N(i)} log σ(y_ij (s v_i·t_j + beta)),   y_ij = 1 if i = j, else -1

ITM is the cross-entropy of a two-class head on fused pairs, against negatives sampled in proportion to e^{s v_i·t_j}
(ALBEF, Li et al. 2021; BLIP, Li et al. 2022).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# BLIP's and CLIP's initial temperature; transformers' BLIP retrieval model holds none.
LOGIT_SCALE = 1 / 0.07

CHUNK = 128  # texts, or images, that the sigmoid loss looks at together

Reduction = Literal["mean", "none"]


def similarity_loss(
    logits_per_image: Tensor,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Symmetric InfoNCE of scaled similarities, the module's ITC equation, computed in float32.

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
    same = _same_ids(image_ids, text_ids, size, logits_per_image.device)
    return _reduced(_symmetric(logits_per_image.float(), same), reduction)


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction={reduction!r} is neither "mean" nor "none".')
    return loss.mean() if reduction == "mean" else loss


def _symmetric(logits: Tensor, same: Tensor) -> Tensor:
    """ITC (B,) of float32 logits (B, B), but for the pairs off the diagonal that are the same (B, B)."""
    size = len(logits)
    _warn_of_one(size)
    logits = logits.masked_fill(same & ~torch.eye(size, dtype=torch.bool, device=logits.device), -torch.inf)
    target = torch.arange(size, device=logits.device)
    return (F.cross_entropy(logits, target, reduction="none") + F.cross_entropy(logits.T, target, reduction="none")) / 2


def _warn_of_one(size: int) -> None:
    if size == 1:
        warnings.warn(
            "A batch of one pair has no negatives, so its contrastive loss teaches nothing. Use batches of two pairs or "
            "more; dataloader_drop_last=True leaves out a last batch of one.",
            stacklevel=4,
        )


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
    return similarity_loss(_cosines(image_embeds, text_embeds) * logit_scale, image_ids, text_ids, reduction)


def pair_losses(
    image_embeds: Tensor,
    text_embeds: Tensor,
    all_images: Tensor,
    all_texts: Tensor,
    logit_scale: Tensor | float,
    image_ids: Tensor,
    text_ids: Tensor,
    first: int = 0,
) -> Tensor:
    """Each pair's ITC among the pairs of several processes: the module's equation, `(b,)`.

    Unlike in `similarity_loss`, pictures and texts have ids of their own kind: two pairs are no negatives of each
    other if they share the picture's or the text's.

    Args:
        image_embeds: `(b, d)`, of unit length, of b pairs that stand from `first` on among all of them.
        text_embeds: `(b, d)`.
        all_images: `(B, d)`, with those of this process.
        all_texts: `(B, d)`.
        logit_scale: 1 / temperature.
        image_ids: Integers `(B,)`, of all.
        text_ids: Integers `(B,)`.
    """
    _warn_of_one(len(all_images))
    target = torch.arange(first, first + len(image_embeds), device=image_embeds.device)
    same = (image_ids[target, None] == image_ids) | (text_ids[target, None] == text_ids)
    same[torch.arange(len(target), device=same.device), target] = False
    losses = [
        F.cross_entropy((one @ other.T * logit_scale).masked_fill(same, -torch.inf), target, reduction="none")
        for one, other in ((image_embeds, all_texts), (text_embeds, all_images))
    ]
    return (losses[0] + losses[1]) / 2


def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """The module's sigmoid loss of embeddings, in float32 also under autocast; the (B, B) logits are never held whole.

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
    own = torch.arange(len(image_embeds), device=image_embeds.device)
    with torch.autocast(image_embeds.device.type, enabled=False):
        image, text = (F.normalize(side.float(), dim=-1) for side in (image_embeds, text_embeds))
        images, texts = (own if ids is None else ids.to(own.device) for ids in (image_ids, text_ids))
        loss = sigmoid_pair_losses(image, text, image, text, logit_scale, logit_bias, images, texts)
    return _reduced(loss, reduction)


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
) -> Tensor:
    """Each pair's share of the sigmoid loss among the pairs of several processes, `(b,)`: see `pair_losses`.

    A pair's share is the mean of its image's terms with all texts and of its text's with all images, so their mean over
    all pairs is the module's equation. Logits are made for `chunk_size` columns at a time, and again in backward.
    """
    _warn_of_one(len(all_images))
    own = torch.arange(first, first + len(image_embeds), device=image_embeds.device)

    def of_columns(columns: Tensor, *tensors: Tensor) -> Tensor:
        image, text, images, texts, scale, bias = tensors
        match = own[:, None] == columns
        same = (image_ids[own, None] == image_ids[columns]) | (text_ids[own, None] == text_ids[columns])
        y = match.to(image.dtype) * 2 - 1
        left_out = same & ~match
        terms = [
            F.softplus(-y * (one @ other.T * scale + bias)).masked_fill(left_out, 0).sum(dim=1)
            for one, other in ((image, texts), (text, images))
        ]
        return (terms[0] + terms[1]) / 2

    scale, bias = (torch.as_tensor(x, device=own.device) for x in (logit_scale, logit_bias))
    loss = image_embeds.new_zeros(len(own))
    for start in range(0, len(all_images), chunk_size):
        columns = slice(start, start + chunk_size)
        places = torch.arange(len(all_images), device=own.device)[columns]
        tensors = (image_embeds, text_embeds, all_images[columns], all_texts[columns], scale, bias)
        loss = loss + checkpoint(of_columns, places, *tensors, use_reentrant=False, preserve_rng_state=False)
    return loss


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
    same = _same_ids(ids, ids, len(similarity), similarity.device)
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
        cosines = outputs.get("itm_score")
        if cosines is None or cosines.shape[0] != cosines.shape[1]:
            raise ValueError(
                "The outputs have neither logits_per_image nor the (B, B) itm_score of use_itm_head=False."
            )
        logits = cosines * LOGIT_SCALE
    loss = similarity_loss(logits, labels, labels, reduction="none")
    return loss.mean() if num_items_in_batch is None else loss.sum() / num_items_in_batch


def dual_embeddings(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """`image_embeds` and `text_embeds` of a dual encoder's own forward, `(B, d)` each.

    It goes through the wrapper that training has put around the model, so hooks of DDP and FSDP run.

    Raises:
        TypeError: The output has none.
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


def retrieval_embeddings(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """ITC embeddings `(image, text)`, `(B, d)` each and of unit length, of a BLIP-style retrieval model.

    It has no `get_image_features`: this is the `encode` of `peft_multimodal.evaluation.compute_embeddings` for it.
    """
    _, image_embeds, text_embeds = _encode(_base(model), batch)
    return image_embeds, text_embeds


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
        similarity = _cosines(image_embeds, text_embeds) * logit_scale
        captions = text_keys(batch["input_ids"], batch.get("attention_mask"))
        same = _same_ids(ids, ids, size, similarity.device) | (captions[:, None] == captions)
        itc = _symmetric(similarity, same).mean()

        own = torch.arange(size, device=similarity.device)
        rows, texts, images = _hard_negatives(similarity, same, generator)
        image_index, text_index = torch.cat([own, rows, images]), torch.cat([own, texts, rows])
        logits = _match_logits(base, image_states[image_index], batch, text_index)
        itm = matching_loss(logits, torch.arange(len(logits), device=logits.device) < size)
    embeds = {"image_embeds": image_embeds.detach(), "text_embeds": text_embeds.detach()}
    return {"loss": itc + itm, "itc_loss": itc.detach(), "itm_loss": itm.detach(), **embeds}


def text_keys(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """int64 (B,) keys of tokenised texts (B, L): equal texts have equal keys, however they are padded."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
    place = mask.cumsum(dim=1) * mask  # from 1; of padding 0
    # Odd factors of 64 bits, and products that wrap around: a sum that depends on each token and its place.
    mixed = (input_ids.long() + 1) * -7046029254386353131 ^ (place.long() * -4417276706812531889)
    mixed = (mixed ^ (mixed >> 29)) * 0x2545F4914F6CDD1D
    return ((mixed ^ (mixed >> 32)) * mask.long()).sum(dim=1)


def _same_ids(image_ids: Tensor | None, text_ids: Tensor | None, size: int, device: torch.device) -> Tensor:
    """(B, B) bool: image i and text j have the same id; all False without ids."""
    image_ids, text_ids = (text_ids if image_ids is None else image_ids), (image_ids if text_ids is None else text_ids)
    if image_ids is None or text_ids is None:
        return torch.zeros(size, size, dtype=torch.bool, device=device)
    if image_ids.shape != (size,) or text_ids.shape != (size,):
        raise ValueError(f"Ids have shapes {tuple(image_ids.shape)} and {tuple(text_ids.shape)}, not ({size},).")
    return image_ids.to(device)[:, None] == text_ids.to(device)


def _cosines(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    with torch.autocast(image_embeds.device.type, enabled=False):
        return F.normalize(image_embeds.float(), dim=-1) @ F.normalize(text_embeds.float(), dim=-1).T


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
