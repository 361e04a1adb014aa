"""The frozen towers' outputs of translation pairs, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...languages import MultilingualTower
from .pairs import PairCollator


class KeptOutputs(torch.utils.data.Dataset):
    """The frozen towers' outputs of translation pairs, memory-mapped: a row is {"student", "teacher", "pairs", "ids"}.

    student: (L_s, d_s); teacher: (d_t,), at the level of tokens (L_t, d_t); ids: (L_s,), the target's tokens. The outputs
    lie in the cache of `datasets` under a key of both towers' weights, the texts' tokens and the dtype: whatever changes,
    they are made again. Rows are sorted by the length of the target.
    """

    def __init__(
        self,
        tower: MultilingualTower,
        adapter_name: str,
        pairs: Sequence[dict[str, Any]],
        collator: PairCollator,
        dtype: str = "float32",
        cache_dir: str | Path | None = None,
        batch_size: int = 64,
    ) -> None:
        self.dtype = np.dtype(dtype)
        pairs = sorted(pairs, key=lambda pair: len(pair["target"]))
        batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
        self.ids: list[np.ndarray] = []  # the targets' tokens
        self.widths = dict(zip(("student", "teacher"), tower.widths(adapter_name), strict=True))
        digest = _weights_hash(tower, adapter_name)
        digest.update(f"{dtype} {tower.level}".encode())
        for batch in batches:
            self._read_tokens(collator(batch), digest)

        def outputs() -> Iterator[dict[str, Any]]:
            for rows in tqdm(batches, desc="Frozen outputs", unit="batch", leave=False):
                yield from self._rows_of(rows, frozen_outputs(tower, adapter_name, collator(rows)))

        self.rows = _kept_on_disk(outputs, digest.hexdigest()[:32], None if cache_dir is None else str(cache_dir))

    def _read_tokens(self, tokenised: dict[str, Any], digest: Any) -> None:
        lengths = tokenised["target_attention_mask"].sum(dim=1).tolist()
        ids = tokenised["target_input_ids"].numpy().astype(np.int32)
        self.ids += [row[:length].copy() for row, length in zip(ids, lengths, strict=True)]
        for name, value in tokenised.items():
            tokens = value.numpy().tobytes() if isinstance(value, Tensor) else json.dumps(value).encode()
            digest.update(f"{name} {len(tokens)}".encode() + tokens)

    def _rows_of(self, pairs: Sequence[dict[str, Any]], batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A batch's outputs, row by row without padding."""
        for i, pair in enumerate(pairs):
            teacher = batch["teacher_states"][i]
            yield {
                "student": self._bytes(batch["student_states"][i][batch["student_mask"][i]]),
                "teacher": self._bytes(teacher[batch["teacher_mask"][i]] if teacher.dim() == 2 else teacher),
                "pairs": pair.get("pairs") or [],
            }

    def _bytes(self, x: Tensor) -> bytes:
        return x.float().cpu().numpy().astype(self.dtype).tobytes()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        columns = self.rows[indices]
        return [
            {
                "student": np.frombuffer(student, self.dtype).reshape(-1, self.widths["student"]),
                "teacher": np.frombuffer(teacher, self.dtype).reshape(-1, self.widths["teacher"]),
                "pairs": pairs,
                "ids": self.ids[i],
            }
            for i, student, teacher, pairs in zip(
                indices, columns["student"], columns["teacher"], columns["pairs"], strict=True
            )
        ]

    def mean_teacher(self, rows: int = 512) -> Tensor:
        """The mean of the pooled teacher vectors over an even selection of rows: (d_t,)."""
        step = max(1, len(self) // rows)
        vectors = [row["teacher"][0] for row in self.__getitems__(list(range(0, len(self), step)))]
        return torch.from_numpy(np.stack(vectors).astype(np.float32)).mean(0)


def frozen_outputs(tower: MultilingualTower, adapter_name: str, batch: dict[str, Any]) -> dict[str, Any]:
    """Both frozen towers on tokenised pairs: {student_states, student_mask, teacher_states, teacher_mask, pairs}.

    Shapes: (B, L_s, d_s), (B, L_s); teacher_states (B, L_t, d_t) at the level of tokens, else (B, d_t).
    """
    device = next(tower.host().parameters()).device
    ids, mask = batch["target_input_ids"].to(device), batch["target_attention_mask"].to(device).bool()
    teaching = tower.teach(batch["source_input_ids"].to(device), batch["source_attention_mask"].to(device))
    return {
        "student_states": tower.encode(ids, mask, adapter_name),
        "student_mask": mask,
        "teacher_states": teaching.pooled if teaching.states is None else teaching.states,
        "teacher_mask": batch["source_attention_mask"].to(device).bool(),
        "pairs": batch.get("pairs"),
    }


def _kept_on_disk(outputs: Callable[[], Iterator[dict[str, Any]]], key: str, cache_dir: str | None) -> datasets.Dataset:
    """The rows that `outputs` gives, from the cache of `datasets` if it has them under this key."""
    binary, pairs = datasets.Value("large_binary"), datasets.List(datasets.List(datasets.Value("int32")))
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()  # ours says what is going on
    try:
        return datasets.Dataset.from_generator(
            outputs,
            features=datasets.Features({"student": binary, "teacher": binary, "pairs": pairs}),
            cache_dir=cache_dir,
            fingerprint=key,
            writer_batch_size=256,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ or error) from None  # what a text or a tower had to say
    finally:
        if shown:
            datasets.enable_progress_bars()


def _weights_hash(tower: MultilingualTower, adapter_name: str) -> Any:
    """Of the two frozen towers."""
    digest = hashlib.sha256()
    for name, value in tower.frozen_weights(adapter_name):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest
