"""Drawing pairs in proportion to weights: a sum tree for weights that change, a race for those that don't.

With q_i the weight of pair i, each draw takes pair i with probability

    P(i) = (1 - eta) / N + eta q_i / sum_j q_j

and the pairs of a batch are the first distinct ones of such draws, so none is in it twice. (Of an exponential race, in
which pair i arrives at time E_i / P(i), E_i ~ Exp(1), the first to arrive are distributed alike.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise

import numpy as np

FANOUT = 64
PART = 1 << 20  # pairs that are worked on at a time, where there are many


class SumTree:
    """Weights of N pairs, to draw from and to change in O(log N) each.

    Every 64 numbers of a level have their sum in the next one. The weights are float32, the sums float64: 4.2 bytes a
    pair (up to 128 pairs more are padding).

    Args:
        weights: (N,), not negative.
    """

    def __init__(self, weights: np.ndarray) -> None:
        self.size = len(weights)
        self.levels = [_padded(weights.astype(np.float32, copy=False))]
        while len(self.levels[-1]) > FANOUT:
            self.levels.append(_padded(_sums(self.levels[-1].reshape(-1, FANOUT))))

    def __len__(self) -> int:
        return self.size

    @property
    def nbytes(self) -> int:
        return sum(level.nbytes for level in self.levels)

    @property
    def total(self) -> float:
        return float(self.levels[-1].sum(dtype=np.float64))

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        return self.levels[0][: self.size][rows]

    def set(self, rows: np.ndarray, weights: np.ndarray) -> None:
        """Change the weights of these rows (each of them once)."""
        self.levels[0][rows] = weights
        blocks = rows
        for lower, upper in pairwise(self.levels):
            blocks = np.unique(blocks // FANOUT)
            upper[blocks] = _sums(lower.reshape(-1, FANOUT)[blocks])  # anew: differences would add up rounding errors

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """int64 (count,): rows, each drawn with probability weight / total, independently."""
        row = np.zeros(count, np.int64)
        left = rng.random(count) * self.total
        for level in reversed(self.levels):
            ends = level.reshape(-1, FANOUT)[row].cumsum(axis=1, dtype=np.float64)
            # Sums that were rounded otherwise may end a little earlier than what is left.
            left = np.minimum(left, np.nextafter(ends[:, -1], 0))
            child = (ends <= left[:, None]).sum(axis=1)  # the first that ends later, so it has a weight
            before = np.where(child > 0, ends[np.arange(count), child - 1], 0)
            left = np.maximum(left - before, 0)
            row = row * FANOUT + child
        return row


def _padded(level: np.ndarray) -> np.ndarray:
    padded = np.zeros(-(-len(level) // FANOUT) * FANOUT, level.dtype)
    padded[: len(level)] = level
    return padded


def _sums(blocks: np.ndarray) -> np.ndarray:
    return blocks.sum(axis=1, dtype=np.float64)


def weighted_order(
    weights: Callable[[slice], np.ndarray], size: int, count: int, rng: np.random.Generator
) -> np.ndarray:
    """The first `count` of `size` pairs to arrive in an exponential race: without replacement, in their order.

    Works in one array of 8 bytes a pair: the bits of a positive float32 are ordered like the number, and the pair's
    index stands below them.

    Args:
        weights: Gives the weights of a slice of the pairs, positive.
        size: N < 2^31.

    Returns:
        int32 (count,).
    """
    if not 0 <= count <= size or size >= 2**31:
        raise ValueError(f"{count} of {size} pairs can't be drawn without replacement (or there are too many).")
    race = np.empty(size, np.uint64)
    for start in range(0, size, PART):
        part = slice(start, min(start + PART, size))
        arrival = (rng.standard_exponential(part.stop - start) / weights(part)).astype(np.float32)
        race[part] = arrival.view(np.uint32)
        race[part] <<= np.uint64(32)
        race[part] |= np.arange(start, part.stop, dtype=np.uint64)
    if count < size:
        race.partition(count)
    race[:count].sort()
    order = race.view(np.int32)
    low = 0 if sys.byteorder == "little" else 1
    for start in range(0, count, PART):  # packed in place: what is read stands behind what is written
        stop = min(start + PART, count)
        order[start:stop] = order[2 * start + low : 2 * stop + low : 2].copy()
    return order[:count]


def distinct(draw: Callable[[int], np.ndarray], count: int, rounds: int = 20) -> np.ndarray:
    """The first `count` distinct rows of independent draws, in their order; fewer if they don't turn up."""
    rows = np.empty(0, np.int64)
    for _ in range(rounds):
        rows = np.concatenate([rows, draw(max(16, 2 * (count - len(rows))))])
        rows = rows[np.sort(np.unique(rows, return_index=True)[1])]
        if len(rows) >= count:
            break
    return rows[:count]
