"""What is known of each pair: its difficulty now and at first, its visits, and whether it is taken for mismatched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from .difficulty import FeatureQueue, HardSampling
from .draws import PART
from .keys import read_ids, unique_keys

SUSPECT = 1  # bit of a pair's flag: probably no match at all
STEPS = 1024  # of the table that ranks are read off
BINS = 50  # of the report's histograms
WARM = 0.8  # share of the pairs that must have been visited where no model has looked at them before
ARRAYS: dict[str, type] = {
    "difficulty": np.float32,
    "base_difficulty": np.float32,
    "visits": np.int32,
    "last_step": np.int64,
    "flag": np.uint8,
}
"""One entry a pair, and of what type."""


class PairRecord:
    """Arrays of one entry a pair, in the order of the pairs' keys.

    Args:
        keys: int64 (N,), sorted and all different.
    """

    def __init__(self, keys: np.ndarray, id_column: str, image_id_column: str | None, settings: HardSampling) -> None:
        size = len(keys)
        self.settings = settings
        self.id_column, self.image_id_column = id_column, image_id_column
        self.keys = keys
        self.difficulty = np.full(size, 0.5, np.float32)
        self.base_difficulty = np.full(size, np.nan, np.float32)
        self.visits = np.zeros(size, np.int32)
        self.last_step = np.full(size, -1, np.int64)
        self.flag = np.zeros(size, np.uint8)
        self.queue = FeatureQueue(min(settings.queue_size, size))
        self.table = np.full(STEPS, np.nan, np.float32)  # the difficulty of each rank; NaN while all pairs count alike
        self.history: list[tuple[int, np.ndarray]] = []  # (step, counts of difficulties)
        self.since_ranked = 0  # visits

    def __len__(self) -> int:
        return len(self.keys)

    # --- rows ---

    def rows(self, keys: np.ndarray) -> np.ndarray:
        """int64 rows of these keys; ValueError where the bank doesn't know one."""
        rows = np.searchsorted(self.keys, keys)
        unknown = self.keys[np.minimum(rows, len(self) - 1)] != keys
        if unknown.any():
            raise ValueError(
                f"{int(unknown.sum())} of {len(keys)} pairs are not in the bank, such as that of key "
                f"{int(keys[unknown][0])}: it was made of another data set. Make one: HardSampleBank.from_model(...)."
            )
        return rows

    def positions_in(self, dataset: Any) -> np.ndarray:
        """(N,) the position in `dataset` of each of the bank's rows; ValueError where it hasn't just the bank's pairs."""
        rows = self.rows(unique_keys(read_ids(dataset, self.id_column)))
        if len(rows) != len(self):
            raise ValueError(
                f"The bank has {len(self)} pairs, the data set {len(rows)} of them. Make a bank of it: "
                "HardSampleBank.from_model(...)."
            )
        positions = np.empty(len(self), np.int32 if len(self) < 2**31 else np.int64)
        positions[rows] = np.arange(len(self))
        return positions

    # --- what a visit tells ---

    def update(self, keys: np.ndarray, values: np.ndarray, step: int) -> np.ndarray:
        """Take over the difficulties of a step's pairs (of all processes); a pair that occurs twice counts once.

        Values that aren't finite, as of a step that overflowed, are passed over: one would spoil every later draw.
        Returns the rows that have changed.
        """
        rows, first = np.unique(self.rows(keys), return_index=True)
        values = values[first].astype(np.float32)
        rows, values = rows[np.isfinite(values)], values[np.isfinite(values)]
        new = (self.visits[rows] == 0) & np.isnan(self.base_difficulty[rows])
        mu = np.where(new, 0, self.settings.momentum).astype(np.float32)
        self.difficulty[rows] = mu * self.difficulty[rows] + (1 - mu) * values
        self.visits[rows] += 1
        self.last_step[rows] = step
        self.since_ranked += len(rows)
        self._suspect(rows)
        return rows

    def start_epoch(self) -> None:
        """Rank the difficulties anew, look for mismatched pairs, and note the histogram for the report.

        Without base difficulties all pairs count alike until four in five have been visited.
        """
        self.since_ranked = 0
        self._note_history(int(self.last_step.max()))
        if np.isnan(self.base_difficulty).any() and (self.visits > 0).mean() < WARM:
            return
        stride = max(1, len(self) // 1_000_000)
        self.table = np.quantile(self.difficulty[::stride], (np.arange(STEPS) + 0.5) / STEPS).astype(np.float32)
        for part in parts(len(self)):
            self._suspect(part)

    def _suspect(self, rows: np.ndarray | slice) -> None:
        """Flag those of these rows that stay among the hardest, and clear the others."""
        how = self.settings
        stays = self.base_difficulty[rows] - self.difficulty[rows] <= how.guard_fall  # not where there is no base
        hardest = self._rank(self.difficulty[rows]) >= 1 - how.guard_share
        suspect = hardest & stays & (self.visits[rows] >= how.guard_visits) & (how.guard_share > 0)
        self.flag[rows] = np.where(suspect, self.flag[rows] | SUSPECT, self.flag[rows] & ~np.uint8(SUSPECT))

    def _note_history(self, step: int) -> None:
        self.history = [entry for entry in self.history if entry[0] != step]
        # "loss" has no upper end: what is harder than chance stands in the last bin.
        self.history.append((step, np.histogram(np.minimum(self.difficulty, 1), BINS, (0, 1))[0]))

    # --- how hard a pair is among the others ---

    def _rank(self, difficulty: np.ndarray) -> np.ndarray:
        """The share of pairs that are easier, counting those that are as hard by half."""
        values, below, count = np.unique(self.table, return_index=True, return_counts=True)
        place = np.searchsorted(values, difficulty)
        nearest = np.minimum(place, len(values) - 1)
        equal = np.where(values[nearest] == difficulty, count[nearest], 0)
        return ((np.append(below, STEPS)[place] + equal / 2) / STEPS).astype(np.float32)

    def emphasis(self, rows: np.ndarray | slice) -> np.ndarray:
        """e of these rows, in [0, 1] (float32)."""
        if np.isnan(self.table[0]):
            return np.full_like(self.difficulty[rows], 0.5)
        if self.settings.emphasis == "rank":
            e, middle = self._rank(self.difficulty[rows]), np.float32(0.5)
        else:
            e, middle = self.difficulty[rows], self.table[STEPS // 2]
        return np.where(self.is_suspect(rows), np.minimum(e, middle), e)

    def is_suspect(self, rows: np.ndarray | slice) -> np.ndarray:
        return (self.flag[rows] & SUSPECT) > 0

    @property
    def suspects(self) -> np.ndarray:
        """Keys of the pairs that are taken for mismatched."""
        return self.keys[self.is_suspect(slice(None))]

    # --- storage ---

    def state(self) -> dict[str, np.ndarray]:
        """Every array, by name."""
        arrays = {name: getattr(self, name) for name in ("keys", *ARRAYS, "table")}
        arrays |= {f"queue.{name}": rows.cpu().numpy() for name, rows in self.queue.parts.items()}
        arrays["queue.places"] = np.array([self.queue.size, self.queue.pointer, self.queue.filled], np.int64)
        arrays["since_ranked"] = np.array([self.since_ranked], np.int64)
        arrays["history.steps"] = np.array([step for step, _ in self.history], np.int64)
        arrays["history.counts"] = np.array([counts for _, counts in self.history], np.int64).reshape(-1, BINS)
        return arrays

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over another bank's arrays; ValueError where they are of other pairs."""
        if not np.array_equal(self.keys, arrays["keys"]):
            raise ValueError(f"The stored bank has other pairs ({len(arrays['keys'])}) than this one ({len(self)}).")
        for name in (*ARRAYS, "table"):
            getattr(self, name)[:] = arrays[name]
        self.queue.size, self.queue.pointer, self.queue.filled = (int(n) for n in arrays["queue.places"])
        self.queue.parts = {
            name: torch.from_numpy(arrays[f"queue.{name}"].copy())
            for name in ("image", "text", "image_keys", "text_keys")
            if f"queue.{name}" in arrays
        }
        steps, counts = arrays["history.steps"].tolist(), arrays["history.counts"]
        self.history = list(zip(steps, counts, strict=True))
        self.since_ranked = int(arrays["since_ranked"][0])


def parts(size: int) -> Iterator[slice]:
    """Rows that are worked on at a time."""
    for start in range(0, size, PART):
        yield slice(start, min(start + PART, size))
