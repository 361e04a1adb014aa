"""Pairs known by their ids: keys of data sets, of rows and of batches; and the collator where a user passes none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.anatomy import base_model
from ...data import ImageTextCollator, evaluating
from ...rows import hash_ids, ids_of, naming, row_name
from ..losses import text_keys


def unique_keys(ids: Sequence[Any]) -> np.ndarray:
    """`hash_ids` of ids; ValueError where one occurs twice, or two have one key."""
    keys = hash_ids(ids)
    order = np.argsort(keys, kind="stable")
    equal = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if len(equal):
        first, second = (ids[order[equal[0] + i]] for i in (0, 1))
        if first == second:
            raise ValueError(f"The id {first!r} occurs twice ({len(equal)} such): ids must tell the pairs apart.")
        raise ValueError(f"The ids {first!r} and {second!r} have the same 64-bit key: rename one of them.")
    return keys


def read_ids(dataset: Any, column: str) -> list[Any]:
    """The id of each row, in the data set's order."""
    if column in (getattr(dataset, "column_names", None) or ()):
        return list(dataset[column])
    ids = []
    for i in range(len(dataset)):
        row = dataset[i]
        if not isinstance(row, Mapping) or column not in row:
            has = sorted(row) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(f"Row {i} of the data set has no id column {column!r}: {has}.")
        ids.append(row[column])
    return ids


@dataclass
class SampleIds:
    """Wraps a collator: its batches also have `sample_ids`, and `image_ids` where there is a column of them.

    Args:
        collator: Makes a batch of rows.
        id_column: Strings or integers, one for each pair.
        image_id_column: Of images that stand in several pairs.
    """

    collator: Callable[[list[Any]], Mapping[str, Any]]
    id_column: str
    image_id_column: str | None = None

    def evaluating(self, every_text: bool = False) -> SampleIds:
        """This around the collator's copy for evaluation."""
        return replace(self, collator=evaluating(self.collator, every_text))

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        columns = {"sample_ids": self.id_column, "image_ids": self.image_id_column}
        keys = {name: ids_of(rows, column) for name, column in columns.items() if column is not None}
        with naming(rows, self.id_column):
            return {**self.collator(rows), **keys}


def split_keys(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A batch without and with its keys: (what the model reads, {"sample", "image", "text"} int64 (B,) each).

    Equal texts have equal text keys. Images are told apart by `image_ids`, else by the collator's own `ids`, else by
    the pairs'.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("sample_ids", "image_ids")}
    image = next(batch[name] for name in ("image_ids", "ids", "sample_ids") if name in batch)
    text = text_keys(batch["input_ids"], batch.get("attention_mask"))
    return inputs, {"sample": batch["sample_ids"], "image": image, "text": text}


# --- the collator that is taken where a user passes none --------------------------------------------------------------


def default_collator(model: Any, row: Any) -> Callable[[list[Any]], Mapping[str, Any]]:
    """Stacks rows that are tensors already; else runs the processor that the model's checkpoint has."""
    from transformers import AutoProcessor

    if "input_ids" in row and "pixel_values" in row:
        return stack_rows
    config: Any = base_model(model).config
    name = getattr(config, "name_or_path", "")
    if not name:
        raise ValueError("The model doesn't come from a checkpoint with a processor: pass a collator.")
    return ImageTextCollator(AutoProcessor.from_pretrained(name), model=model, return_loss=False)


def stack_rows(rows: list[Any]) -> dict[str, Tensor]:
    """A batch of rows of tensors, arrays or lists of numbers, alike in shape; images, texts and numbers are left out."""
    batch = {}
    for name in [name for name, value in rows[0].items() if _is_array(value)]:
        tensors = [torch.as_tensor(row[name]) for row in rows]
        odd = next((i for i, tensor in enumerate(tensors) if tensor.shape != tensors[0].shape), None)
        if odd is not None:
            raise ValueError(
                f"Rows can't be stacked: {name!r} has shape {tuple(tensors[0].shape)} in {row_name(rows[0], 0)} of a batch and "
                f"{tuple(tensors[odd].shape)} in {row_name(rows[odd], odd)}. Pass a collator that pads them, such as "
                "collator=lambda rows: tokenizer.pad(rows, return_tensors='pt') (data_collator= of a trainer)."
            )
        batch[name] = torch.stack(tensors)
    return batch


def _is_array(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and value.dtype.kind in "biuf"
    return isinstance(value, Tensor) and value.ndim > 0
