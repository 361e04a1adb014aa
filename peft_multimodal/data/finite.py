"""Batches without NaN and infinite values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..rows import Row, naming
from .switches import changed, evaluating, without_loss


class FiniteBatches:
    """A collator that refuses NaN and infinite values and names their samples, before a step is spoilt by them.

    Training stops with the error, and the last checkpoint is as it was. The package's trainers put it around any
    collator; the stock `Trainer` needs it.

    Args:
        collator: Any.
        id_column: Column by which samples are named; a row without one is named by its place in the batch.

    Examples:
        >>> from transformers import Trainer, TrainingArguments
        >>> args = TrainingArguments("out", remove_unused_columns=False, label_names=[])
        >>> Trainer(model, args, data_collator=FiniteBatches(collator, "id"), train_dataset=dataset).train()
    """

    def __init__(self, collator: Any, id_column: str = "id") -> None:
        self.collator, self.id_column = collator, id_column

    def evaluating(self, every_text: bool = False) -> FiniteBatches:
        """This around the collator's copy for evaluation."""
        return changed(self, collator=evaluating(self.collator, every_text))

    def without_loss(self, model: Any = None) -> FiniteBatches:
        """This around the collator's copy for callers that compute the loss."""
        return changed(self, collator=without_loss(self.collator, model))

    def __call__(self, rows: Sequence[Row]) -> Any:
        """The collator's batch.

        Raises:
            ValueError: a tensor or array in it, masks aside, holds NaN or infinite values.
        """
        names = [row.get(self.id_column) if isinstance(row, Mapping) else None for row in rows]  # a collator may pop
        with naming(rows, self.id_column):
            batch = self.collator(rows)
        for field, value in _floats(batch):
            if not bool(value.isfinite().all()):
                raise ValueError(
                    f"{field!r} holds NaN or infinite values{_whose(value, names)}. Repair or leave them out."
                )
        return batch


def _floats(value: Any, field: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors and arrays of a batch, however deep, but for masks; each with its place ("frames.0")."""
    if isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            if "mask" not in str(key):
                yield from _floats(inner, f"{field}.{key}" if field else str(key))
    elif isinstance(value, Tensor) and value.is_floating_point():
        yield field or "the batch", value
    elif isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating):
        yield field or "the batch", torch.from_numpy(value.astype(np.float64))


def _whose(value: Tensor, names: list[Any]) -> str:
    if value.ndim == 0 or len(value) != len(names):
        return f", in a batch of the samples {names}"
    bad = [i for i, row in enumerate(value) if not bool(row.isfinite().all())]
    named = [f"{names[i]!r}" if names[i] is not None else f"row {i} of the batch" for i in bad]
    return f" in {len(named)} of {len(names)} samples: " + ", ".join(named[:10]) + (", ..." if len(named) > 10 else "")
