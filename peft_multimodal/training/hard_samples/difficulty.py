"""How hard a pair is among the latest pairs that training has seen, and how hard the unadapted model finds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
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
from .keys import split_keys

Encode = Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class HardSampling:
    """How difficulties are measured, and what they do; the equations stand in `hard_samples`.

    Args:
        difficulty: "prob", "margin" or "loss".
        momentum: mu; a pair without a base difficulty takes its first visit's.
        emphasis: e, "rank" or "power".
        alpha: Exponent of the sampling weights; 0 draws all pairs alike.
        eta: Share of the draws that goes by weight; the others are uniform, so that each pair is visited again.
        eps: Added to e.
        gamma: Exponent of the loss weights; 0 weighs all pairs alike.
        beta: Importance correction, 0 (none) to 1 (in expectation the loss of uniform sampling).
        queue_size: K; of a data set that is smaller, its size.
        margin, margin_width: m_0 and T of "margin", cosines.
        guard_share: Pairs among this share of the hardest, whose difficulty hasn't fallen by `guard_fall` from its base,
            are taken for mismatched: their e counts as the median's, and w is at most 1. 0 switches the guard off.
        guard_fall: How far the difficulty of such a pair has to fall before it is trusted.
        guard_visits: Minimum number of visits before a pair can be suspected. With 0 the hardest are suspected from the
            start, until they fall, and shuffled captions are not learned before they are found.
    """

    difficulty: str = "prob"
    momentum: float = 0.9
    emphasis: str = "rank"
    alpha: float = 2.0
    eta: float = 0.8
    eps: float = 0.01
    gamma: float = 0.5
    beta: float = 0.0
    queue_size: int = 4096
    margin: float = 0.1
    margin_width: float = 0.05
    guard_share: float = 0.05
    guard_fall: float = 0.05
    guard_visits: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("difficulty", ("prob", "margin", "loss")), ("emphasis", ("rank", "power"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}")
        ranges: dict[str, tuple[float, float]] = dict.fromkeys(("momentum", "eta", "beta", "guard_share"), (0, 1))
        ranges |= {
            "alpha": (0, 100),
            "gamma": (0, 100),
            "eps": (1e-6, 1),
            "margin_width": (1e-6, 100),
            "margin": (-2, 2),
        }
        ranges |= {"guard_fall": (-1, 1), "guard_visits": (0, 1_000_000), "queue_size": (1, 10_000_000)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            kinds = (int,) if name in ("guard_visits", "queue_size") else (int, float)
            if type(value) not in kinds or not low <= value <= high:
                raise ValueError(f"{name} must be a number from {low} to {high}, got {value!r}")


class FeatureQueue:
    """The K latest pairs' unit embeddings, in half precision, and their keys: the negatives of every difficulty."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pointer = self.filled = 0
        self.parts: dict[str, Tensor] = {}

    @torch.no_grad()
    def push(self, image: Tensor, text: Tensor, keys: Mapping[str, Tensor]) -> None:
        """Put B pairs in; the oldest fall out."""
        new = {"image": image.half(), "text": text.half(), "image_keys": keys["image"], "text_keys": keys["text"]}
        if not self.parts:
            self.parts = {name: value.new_zeros(self.size, *value.shape[1:]) for name, value in new.items()}
        count = min(len(image), self.size)
        places = (torch.arange(count, device=image.device) + self.pointer) % self.size
        for name, value in new.items():
            self.parts[name] = self.parts[name].to(value.device)
            self.parts[name][places] = value[-count:]
        self.pointer = (self.pointer + count) % self.size
        self.filled = min(self.size, self.filled + count)

    def shrink(self) -> None:
        """Hold no more than there is, where a data set turned out to be smaller than the queue."""
        if self.filled < self.size:
            self.parts = {name: part[: self.filled].clone() for name, part in self.parts.items()}
            self.size, self.pointer = self.filled, 0

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name][: self.filled]


@torch.no_grad()
def difficulties(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    keys: Mapping[str, Tensor],
    queue: FeatureQueue,
    how: HardSampling,
) -> Tensor:
    """The module docstring's difficulty of B pairs, float32 (B,).

    Args:
        image: Unit embeddings (B, d).
        text: (B, d), row i the match of image i.
        scale: 1 / tau.
        keys: "image" and "text", int64 (B,): who shares one with a pair is no negative of it.
        queue: Into which these pairs have been pushed.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text = image.float(), text.float()
        same = keys["image"][:, None] == queue["image_keys"]
        same |= keys["text"][:, None] == queue["text_keys"]
        match = (image * text).sum(-1, keepdim=True) * scale
        sides = [
            torch.cat([match, (one @ other.float().T * scale).masked_fill(same, -torch.inf)], dim=1)
            for one, other in ((image, queue["text"]), (text, queue["image"]))
        ]
        if how.difficulty == "margin":
            gaps = torch.stack([match[:, 0] - side[:, 1:].amax(dim=1) for side in sides])
            return torch.sigmoid((how.margin - gaps.mean(0) / scale) / how.margin_width)
        log_p = torch.stack([side.log_softmax(dim=1)[:, 0] for side in sides])
        if how.difficulty == "prob":
            return -torch.expm1(log_p).mean(0)
        negatives = (~same).sum(dim=1)
        return -log_p.mean(0) / torch.log1p(negatives.clamp_min(1))


# --- the difficulties that a bank starts from -------------------------------------------------------------------------


def mine(
    model: nn.Module, loader: DataLoader, how: HardSampling, pairs: int | None, encode: Encode | None, progress: bool
) -> tuple[np.ndarray, np.ndarray, FeatureQueue]:
    """(keys, difficulties, the latest pairs' embeddings) of a data set, in the order of a loader whose batches have ids.

    `pairs` says how many there are; None of a data set that streams.
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
