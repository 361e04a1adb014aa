"""The collator that is taken where a user passes none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.anatomy import base_model
from ...data import ImageTextCollator
from ...rows import row_name


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
    """A batch of rows of tensors, arrays or lists of numbers; images, texts and single numbers are left out.

    Raises:
        ValueError: rows differ in the shape of one of them.
    """
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
