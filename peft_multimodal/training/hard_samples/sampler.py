"""The order in which a bank's pairs are trained on, by the difficulties that it has at the moment."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from .bank import HardSampleBank
from .draws import PART, weighted_order


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
        """Go on where another sampler stood; ValueError where its batches or chunks were of another size."""
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
