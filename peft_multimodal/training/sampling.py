"""Drawing pairs in proportion to weights: a sum tree for weights that change, a race for those that don't.

With q_i the weight of pair i, each draw takes pair i with probability

    P(i) = (1 - eta) / N + eta q_i / sum_j q_j

and the pairs of a batch are the first distinct ones of such draws, so none is in it twice. (Of an exponential race, in
which pair i arrives at time E_i / P(i), E_i ~ Exp(1), the first to arrive are distributed alike.)
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Sampler

if TYPE_CHECKING:
    from .hard_samples import HardSampleBank

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


class HardSampleSampler(Sampler[int]):
    """Positions of a data set's rows, the hard ones more often, by the difficulties that the bank has at the moment.

    An epoch has as many draws as the data set has rows. They are drawn a chunk of batches at a time; in the order of a
    chunk, each batch has no pair twice. Every process draws the same, so they may share the batches out.

    Args:
        bank: Of this data set.
        positions: (N,) position in the data set of each of the bank's rows.
        batch_size: Rows of a step over all processes.
        chunk_size: Draws between two looks at the difficulties; rounded to whole batches, and to one batch where a
            chunk would be more than a sixteenth of the data set. None draws an epoch's order at its start: half of
            the pairs, without replacement.
        seed: With the epoch and the chunk's number it gives the random numbers; `set_epoch` tells the epoch.
    """

    def __init__(
        self, bank: HardSampleBank, positions: np.ndarray, batch_size: int, chunk_size: int | None = 1024, seed: int = 0
    ) -> None:
        self.bank = bank
        self.positions = positions
        self.batch_size = min(batch_size, len(bank))
        self.batches = 0 if chunk_size is None else max(1, min(chunk_size, len(bank) // 16) // self.batch_size)
        self.seed = seed
        self.epoch = 0
        self._resuming = False
        self._reset()

    def _reset(self) -> None:
        self.chunks = 0  # drawn in this epoch
        self.done = 0  # draws of this epoch that have been trained on
        self.first = 0  # place in the epoch of the first draw that is kept
        self.kept: deque[np.ndarray] = deque()  # chunks that have been drawn and not wholly trained on

    def __len__(self) -> int:
        return len(self.bank) if self.batches else -(-len(self.bank) // 2)

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self._resuming = False
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self._resuming:
            self._resuming = False
        else:
            self._reset()
            self.bank.start_epoch()
        place = self.first
        for _ in range(place):
            yield 0  # was trained on before the restart: whoever resumes skips it
        for chunk in list(self.kept):
            yield from _numbers(chunk)
            place += len(chunk)
        while place < len(self):
            chunk = self._draw()[: len(self) - place]
            self.kept.append(chunk)
            yield from _numbers(chunk)
            place += len(chunk)

    def _draw(self) -> np.ndarray:
        rng = np.random.default_rng([self.seed, self.epoch, self.chunks])
        self.chunks += 1
        if not self.batches:
            order = weighted_order(self.bank.probabilities, len(self.bank), len(self), rng)
            rng.shuffle(order)  # in the order of the race the hard pairs would come first
            return self.positions[order]
        return self.positions[np.concatenate([self.bank.draw(self.batch_size, rng) for _ in range(self.batches)])]

    def trained(self, count: int) -> None:
        """Tell that the next `count` draws have been trained on, of all processes together."""
        self.done += count
        while self.kept and self.first + len(self.kept[0]) <= self.done:
            self.first += len(self.kept.popleft())

    def state(self) -> dict[str, np.ndarray]:
        """What another sampler needs to go on from here, whatever was drawn in advance."""
        numbers = (self.epoch, self.chunks, self.done, self.first)
        kept = np.concatenate([np.empty(0, np.int64), *self.kept]).astype(np.int64)
        lengths = np.array([len(chunk) for chunk in self.kept], np.int64)
        shape = np.array([self.batch_size, self.batches], np.int64)
        return {"numbers": np.array(numbers, np.int64), "kept": kept, "lengths": lengths, "shape": shape}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where another sampler stood.

        Raises:
            ValueError: its batches or chunks were of another size: the draws that are left couldn't be told.
        """
        shape = [self.batch_size, self.batches]
        if "shape" in state and state["shape"].tolist() != shape:
            size, batches = state["shape"].tolist()
            raise ValueError(
                f"The sampler was saved with {size} rows a step and {batches} batches a chunk, and has {self.batch_size} and "
                f"{self.batches} now: it can't go on there. Keep the batch size, the number of processes and chunk_size."
            )
        self.epoch, self.chunks, self.done, self.first = (int(n) for n in state["numbers"])
        ends = np.cumsum(state["lengths"])
        self.kept = deque(np.split(state["kept"], ends)[:-1])  # the last part is what stands behind them: nothing
        self._resuming = True


def _numbers(chunk: np.ndarray) -> Iterator[int]:
    """Python's integers, which take ten times the memory, a part at a time."""
    for start in range(0, len(chunk), PART // 16):
        yield from chunk[start : start + PART // 16].tolist()
