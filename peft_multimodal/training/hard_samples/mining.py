"""The pass of the unadapted model over a data set, from which a bank's difficulties start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ...core.modes import unadapted
from ..losses import dual_embeddings
from ..temperature import logit_scale
from .difficulty import FeatureQueue, difficulties
from .keys import split_keys
from .settings import HardSampling

Encode = Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, Tensor]]


def mine(
    model: nn.Module, loader: DataLoader, how: HardSampling, pairs: int | None, encode: Encode | None, progress: bool
) -> tuple[np.ndarray, np.ndarray, FeatureQueue]:
    """(keys, difficulties, the latest pairs' embeddings) of a data set, in the order of a loader whose batches have ids.

    Args:
        pairs: How many there are; None of a data set that streams.
    """
    queue = FeatureQueue(how.queue_size if pairs is None else min(how.queue_size, pairs))
    keys, values = [], []
    with unadapted(model), torch.no_grad():
        batches = tqdm(loader, desc="Difficulties", unit="batch", disable=not progress)
        for image, text, names in _from_a_full_queue(_embedded(batches, model, encode or dual_embeddings), queue):
            keys.append(names["sample"].cpu().numpy())
            values.append(difficulties(image, text, logit_scale(model), names, queue, how).cpu().numpy())
    if not keys:
        raise ValueError("The data set has no rows.")
    queue.shrink()
    return np.concatenate(keys), np.concatenate(values), queue


def _embedded(
    loader: Iterable[Mapping[str, Any]], model: nn.Module, encode: Encode
) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    device = next(model.parameters()).device
    for batch in loader:
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        inputs, keys = split_keys(batch)
        image, text = encode(model, inputs)
        yield F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1), keys


def _from_a_full_queue(embedded: Iterator[tuple], queue: FeatureQueue) -> Iterator[tuple]:
    """Every batch after it has been pushed, but none before the queue is full (or the data set ends)."""
    waiting = []
    for image, text, keys in embedded:
        queue.push(image, text, keys)
        waiting.append((image, text, keys))
        if queue.filled == queue.size:
            yield from waiting
            waiting = []
    yield from waiting
