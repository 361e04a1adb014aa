"""Embeddings of a whole data set."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..core.anatomy import base_model
from ..core.modes import eval_mode
from ..data import evaluating, without_loss


def compute_embeddings(
    model: nn.Module,
    dataset: Any,
    collator: Callable[[list[Any]], Mapping[str, Any]],
    batch_size: int = 64,
    progress: bool = True,
    encode: Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Unit-length embeddings of a dataset's images and texts, in its order.

    Of rows with several captions each caption is embedded, and the result has the ids that say whose it is: so
    `retrieval_recall(**compute_embeddings(...))` counts any caption of an image. Each module's train or eval mode is
    what it was before, also after an error.

    Args:
        model: Dual encoder with `get_image_features` and `get_text_features`, bare or in a `PeftModel`. Each gets the
            batch's entries that its signature names.
        collator: Makes a batch of rows; `ImageTextCollator` draws no captions here. With no `pixel_values` (no `input_ids`) only texts (images) are embedded.
        encode: `(model, batch) -> (image_embeds, text_embeds)` for models without those two methods, such as
            `training.losses.retrieval_embeddings` for BLIP's retrieval model.

    Returns:
        `{"image_embeds": (rows, d), "text_embeds": (texts, d)}`, float32 on the CPU. Where a row has several captions
        also `image_ids` int64 `(rows,)` and `text_ids` int64 `(texts,)`, the rows' numbers.

    Raises:
        ValueError: The batch has an entry that neither method reads (`return_loss`, `labels`, `ids` apart).
    """
    device = next(model.parameters()).device
    parts: dict[str, list[Tensor]] = {}
    collate = evaluating(without_loss(collator, model), every_text=True)
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate)
    rows_of_texts: list[Tensor] = []
    seen = 0
    with eval_mode(model), torch.no_grad():
        for batch in tqdm(loader, desc="Embedding", unit="batch", disable=not progress):
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            text_rows = batch.pop("text_rows", None)
            if encode is None:
                embeds = _features(model, batch)
            else:
                embeds = dict(zip(("image_embeds", "text_embeds"), encode(model, batch), strict=True))
            for name, rows in embeds.items():
                parts.setdefault(name, []).append(F.normalize(rows.float(), dim=-1).cpu())
            if text_rows is not None:
                rows_of_texts.append(text_rows.cpu() + seen)
                seen += len(embeds["image_embeds"])
    embedded = {name: torch.cat(rows) for name, rows in parts.items()}
    if rows_of_texts and len(text_ids := torch.cat(rows_of_texts)) != seen:  # else row i matches row i
        embedded |= {"image_ids": torch.arange(seen), "text_ids": text_ids}
    return embedded


def _features(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    batch = {name: value for name, value in batch.items() if name not in ("return_loss", "labels", "ids")}
    embeds: dict[str, Tensor] = {}
    read: set[str] = set()
    for side, key in (("image", "pixel_values"), ("text", "input_ids")):
        method = getattr(model, f"get_{side}_features", None)
        if method is None:
            raise TypeError(f"{type(model).__name__} has no get_{side}_features: pass encode=.")
        plain = getattr(type(base_model(model)), f"get_{side}_features", method)  # an adapter may stand before it
        named = {*inspect.signature(method).parameters, *inspect.signature(plain).parameters}
        inputs = {name: value for name, value in batch.items() if name in named}
        read |= inputs.keys()
        if key in batch:
            output = method(**inputs)  # an output object since transformers 5, a tensor before
            embeds[f"{side}_embeds"] = output if isinstance(output, Tensor) else output.pooler_output
    if unread := sorted(batch.keys() - read):
        raise ValueError(f"{unread}: neither get_image_features nor get_text_features reads this.")
    return embeds
