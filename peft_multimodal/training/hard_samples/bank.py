"""The memory of a data set's pairs in training: which come next, and how much each weighs."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn
from torch.utils.data import DataLoader

from ...data import evaluating, without_loss
from ...rows import streams
from .difficulty import Encode, HardSampling, mine
from .draws import SumTree, distinct
from .keys import SampleIds, default_collator, read_ids, unique_keys
from .record import ARRAYS, PairRecord, parts
from .report import write_report

FILE = "hard_sample_bank.safetensors"
FORMAT = 1


class HardSampleBank(PairRecord):
    """Remembers how hard each pair is: difficulty, base difficulty, visits, last step and a flag; 21 bytes, and 8 of
    its id.

    It lives in the main process of each rank, never in a loader's workers. Pairs are known by their ids: a data set
    may come in another order, but one with other pairs is refused.

    Args:
        ids: Of the pairs, all different: strings or integers.
        id_column: Where rows have their id.
        image_id_column: Where they have their image's, if images stand in several pairs.
        settings: The fields of `HardSampling`: how difficulty is measured, and what follows from it.

    Raises:
        ValueError: an id is there twice, or a setting has a wrong value.

    Examples:
        >>> bank = HardSampleBank.from_model(model, dataset, id_column="id", collator=collator)
        >>> bank.report("report.html", dataset)
    """

    def __init__(
        self, ids: Sequence[Any], id_column: str = "id", image_id_column: str | None = None, **settings: Any
    ) -> None:
        keys = unique_keys(ids)
        if not len(keys):
            raise ValueError("There are no pairs.")
        self._make(np.sort(keys), id_column, image_id_column, HardSampling(**settings))

    def _make(self, keys: np.ndarray, id_column: str, image_id_column: str | None, settings: HardSampling) -> None:
        super().__init__(keys, id_column, image_id_column, settings)
        self.tree: SumTree | None = None  # made when it is needed
        self.dataset: Any = None  # for the report; it isn't saved, and no copy takes it along

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "dataset": None}

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        dataset: Any,
        id_column: str = "id",
        collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        image_id_column: str | None = None,
        batch_size: int = 64,
        progress: bool = True,
        encode: Encode | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> HardSampleBank:
        """The bank of a data set with the difficulties that the unadapted model finds: one pass, adapters disabled.

        The pass goes through the data set in random order, so that the queue holds any pairs at any time; a data set
        that streams is read once, in its order.

        Args:
            model: Dual encoder, bare or in a `PeftModel`; its modes are what they were afterwards.
            collator: Makes a batch of rows, with `input_ids`. By default images and texts go through the processor
                of the model's checkpoint (`ImageTextCollator`), and rows of tensors are stacked. Of several captions
                the first counts (`collator.evaluating()`).
            encode: `(model, batch) -> (image, text)` embeddings of models whose output has no `image_embeds` and
                `text_embeds`.
            settings: The fields of [`HardSampling`].
        """
        how = HardSampling(**settings)
        pairs = None if streams(dataset) else len(unique_keys(read_ids(dataset, id_column)))
        if collator is None:
            first = next(iter(dataset), None)
            if first is None:
                raise ValueError("The data set has no rows.")
            collator = default_collator(model, first)
        order = None if pairs is None else torch.randperm(pairs, generator=torch.Generator().manual_seed(seed)).tolist()
        collate = SampleIds(evaluating(without_loss(collator, model)), id_column, image_id_column)
        loader = DataLoader(dataset, batch_size, sampler=order, collate_fn=collate)
        met, values, queue = mine(model, loader, how, pairs, encode, progress)
        bank = cls.__new__(cls)
        bank._make(np.unique(met), id_column, image_id_column, how)
        if len(bank) != len(met):
            raise ValueError(f"{len(met) - len(bank)} ids occur more than once: ids must tell the pairs apart.")
        rows = bank.rows(met)
        bank.difficulty[rows] = bank.base_difficulty[rows] = values
        bank.queue, bank.dataset = queue, dataset
        bank.start_epoch()
        return bank

    # --- which pairs come next ---

    def update(self, keys: np.ndarray, values: np.ndarray, step: int) -> np.ndarray:
        rows = super().update(keys, values, step)
        if self.tree is not None:
            self.tree.set(rows, self._weights(rows))
        return rows

    def start_epoch(self) -> None:
        super().start_epoch()
        self.tree = None

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().load_state(arrays)
        self.tree = None

    def _weights(self, rows: np.ndarray | slice) -> np.ndarray:
        return (self.emphasis(rows) + np.float32(self.settings.eps)) ** np.float32(self.settings.alpha)

    def sum_tree(self) -> SumTree:
        """The sampling weights q of all pairs."""
        if self.tree is None:
            weights = np.empty(len(self), np.float32)
            for part in parts(len(self)):
                weights[part] = self._weights(part)
            self.tree = SumTree(weights)
        return self.tree

    def probabilities(self, rows: np.ndarray | slice) -> np.ndarray:
        """P of these rows (float64)."""
        tree, eta = self.sum_tree(), self.settings.eta
        return (1 - eta) / len(self) + eta * tree[rows].astype(np.float64) / tree.total

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """int64 (count,): distinct rows, the first of draws by P."""
        tree, size = self.sum_tree(), len(self)
        if not 0 <= count <= size:
            raise ValueError(f"{count} distinct pairs can't be drawn from {size}.")
        rows = np.empty(0, np.int64)
        if count <= size // 8:

            def draws(number: int) -> np.ndarray:
                by_weight = rng.random(number) < self.settings.eta
                drawn = rng.integers(size, size=number)
                drawn[by_weight] = tree.draw(int(by_weight.sum()), rng)
                return drawn

            rows = distinct(draws, count)
        if len(rows) < count:  # most of the pairs, or weights so uneven that the same ones turn up again and again
            race = rng.standard_exponential(size) / self.probabilities(slice(None))
            race[rows] = np.inf
            rows = np.concatenate([rows, np.argsort(race, kind="stable")[: count - len(rows)]])
        return rows

    def loss_weights(self, keys: np.ndarray) -> np.ndarray:
        """w c of a batch of all processes, float32 (B,)."""
        how, rows = self.settings, self.rows(keys)
        x = (self.emphasis(rows) + how.eps) ** how.gamma
        w = np.clip(x / x.mean(), 0.25, 4)
        w = np.where(self.is_suspect(rows), np.minimum(w, 1), w)
        w /= w.mean()
        if how.beta:
            c = (len(self) * self.probabilities(rows)) ** -how.beta
            w = w * c / c.max()
        return w.astype(np.float32)

    # --- files ---

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `hard_sample_bank.safetensors` into a folder, aside and renamed."""
        columns = {"id_column": self.id_column, "image_id_column": self.image_id_column}
        about = {"settings": asdict(self.settings), **columns}
        metadata = {"format": str(FORMAT), "hard_sample_bank": json.dumps(about)}
        return save_arrays(self.state(), Path(folder, FILE), metadata)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> HardSampleBank:
        """Read a bank from the folder of an adapter or of a Trainer checkpoint.

        Raises:
            ValueError: the file is damaged, of a newer format, or its arrays don't belong together.
            FileNotFoundError: there is none.
        """
        arrays, metadata = load_arrays(Path(folder, FILE))
        try:
            if int(metadata["format"]) > FORMAT:
                raise ValueError(f"{folder}: the bank has format {metadata['format']}. Upgrade peft-multimodal.")
            about = json.loads(metadata["hard_sample_bank"])
            known = {f.name for f in fields(HardSampling)}
            settings = HardSampling(**{name: about["settings"][name] for name in known & set(about["settings"])})
            keys = arrays["keys"]
            for name, dtype in {"keys": np.int64, **ARRAYS}.items():
                if arrays[name].shape != keys.shape or arrays[name].dtype != dtype:
                    raise ValueError(f"{name} is {arrays[name].dtype}{arrays[name].shape}")
            if not (np.isfinite(arrays["difficulty"]).all() and (np.diff(keys) > 0).all() and len(keys)):
                raise ValueError("difficulties are not finite, or keys not sorted")
            bank = cls.__new__(cls)
            bank._make(keys, about["id_column"], about["image_id_column"], settings)
            bank.load_state(arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{Path(folder, FILE)} holds no bank that can be used: {error}.") from error
        return bank

    def report(
        self, path: str | os.PathLike, dataset: Any = None, image_column: str = "image", text_column: str = "text",
        pairs: int = 24,
    ) -> Path:  # fmt: skip
        """Write a self-contained HTML page: the histogram over time, the hardest pairs, the suspected mismatches.

        Args:
            dataset: For images and texts; by default the one that the bank was made of or trained with. A bank that
                was loaded shows only keys without it. One that streams is read until the pairs have come.
            pairs: Shown of each kind.
        """
        dataset = self.dataset if dataset is None else dataset
        return write_report(self, Path(path), dataset, image_column, text_column, pairs)


def save_arrays(arrays: Mapping[str, np.ndarray], path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file, written aside and renamed: an interrupted save leaves the old file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, aside, metadata)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)
    return path


def load_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, metadata) of a safetensors file; ValueError where it is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}.")
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}).") from None
