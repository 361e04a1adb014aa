"""Translation pairs: which of them can be learned from, and batches of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...data import LanguageProcessor


@dataclass
class PairCollator:
    """Rows of `source` and `target` (and aligned tokens, `pairs`), or of `KeptOutputs`, to a batch."""

    processor: LanguageProcessor
    language: str

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if "student" in rows[0]:
            return self._kept(rows)
        batch: dict[str, Any] = {}
        for side, language in (("source", self.processor.base), ("target", self.language)):
            tokens = self.processor.tokenize([row[side] for row in rows], language)
            batch |= {f"{side}_{name}": value for name, value in tokens.items()}
        return batch | {"pairs": [row.get("pairs") or [] for row in rows]}

    def _kept(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        ids = nn.utils.rnn.pad_sequence([torch.from_numpy(row["ids"]).long() for row in rows], batch_first=True)
        batch: dict[str, Any] = {"pairs": [row["pairs"] for row in rows], "target_input_ids": ids}
        for name in ("student", "teacher"):
            states = [torch.tensor(row[name], dtype=torch.float32) for row in rows]
            lengths = torch.tensor([len(of_row) for of_row in states])
            batch[f"{name}_states"] = nn.utils.rnn.pad_sequence(states, batch_first=True)
            batch[f"{name}_mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
        return batch


class FullPairs(torch.utils.data.IterableDataset):
    """The pairs of a stream that have both sides; the others are counted."""

    def __init__(self, pairs: Any, workers: int = 0) -> None:
        self.pairs = pairs
        self.counts = torch.zeros(max(1, workers), dtype=torch.long).share_memory_()  # one for each worker

    @property
    def skipped(self) -> int:
        """Of the latest pass."""
        return int(self.counts.sum())

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.pairs, "set_epoch"):
            self.pairs.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        place = 0 if worker is None else worker.id
        self.counts[place] = 0
        for i, pair in enumerate(self.pairs):
            if not {"source", "target"} <= pair.keys():
                raise ValueError(f"The data needs the columns 'source' and 'target'; row {i} has {sorted(pair)}.")
            if _is_full(pair):
                yield pair
                continue
            if not self.counts[place]:
                warnings.warn(
                    f"Row {i} has an empty side. Such pairs are left out, and counted in `trainer.skipped`.",
                    stacklevel=2,
                )
            self.counts[place] += 1


def full_pairs(data: Any, name: str) -> tuple[list[dict[str, Any]], int]:
    """The pairs of a data set that have both sides, and the count of others; ValueError where nothing can be learned."""
    pairs = [dict(row) for row in data]
    lacking = next((i for i, pair in enumerate(pairs) if not {"source", "target"} <= pair.keys()), None)
    if not pairs or lacking is not None:
        has = "no rows" if lacking is None else f"row {lacking} has {sorted(pairs[lacking])}"
        raise ValueError(f"The {name} data needs the columns 'source' and 'target'; {has}.")
    full = [pair for pair in pairs if _is_full(pair)]
    if skipped := len(pairs) - len(full):
        warnings.warn(f"{skipped} of {len(pairs)} {name} pairs have an empty side and are left out.", stacklevel=6)
    if (len(full) > 1 and len({(p["source"], p["target"]) for p in full}) == 1) or not full:
        raise ValueError(
            f"All {len(pairs)} {name} pairs are {'equal' if full else 'empty'}: there is nothing to learn."
        )
    return full, skipped


def _is_full(pair: dict[str, Any]) -> bool:
    return all(isinstance(pair[side], str) and pair[side].strip() for side in ("source", "target"))
