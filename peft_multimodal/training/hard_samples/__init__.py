"""A memory of how hard each pair of a data set is, for training that visits hard pairs more often.

With s_ij = cos(v_i, t_j) / tau over the K latest pairs of a queue (the batch among them), from which every pair with i's
picture or text is taken out, a pair's difficulty in one visit is one of

    "prob"     1 - p_i,                p_i = (softmax_j(s_ij)_i + softmax_j(s_ji)_i) / 2
    "margin"   sigmoid((m_0 - g_i) / T),   g_i = (2 s_ii - max_j s_ij - max_j s_ji) tau / 2
    "loss"     l_i / log(1 + n_i),     l_i = -(log softmax_j(s_ij)_i + log softmax_j(s_ji)_i) / 2,  n_i its negatives

The negatives are as many whatever the batch size, so that visits can be compared. The bank starts from what the
unadapted model finds hard (DAMO's talk on narrow domains) and follows by d_i <- mu d_i + (1 - mu) difficulty. With the
emphasis e_i, d_i itself ("power") or the share of pairs that are easier ("rank"),

    q_i = (e_i + eps)^alpha         what the sampler draws by (see `sampling`)
    w_i = clip(x_i / mean(x), 1/4, 4), of mean 1 in the batch,   x_i = (e_i + eps)^gamma
    c_i = (N P(i))^-beta / max of the batch
    L   = sum_i w_i c_i l_i / B     w and c without gradient

"rank" is the default: 1 - p is near 1 for most pairs of a narrow domain, and powers of it hardly differ.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ...data import ImageTextCollator, evaluating, without_loss
from ...rows import hash_ids, ids_of, naming, row_name, streams
from ..losses import dual_embeddings, text_keys
from ..temperature import logit_scale
from .draws import PART, SumTree, distinct

FILE = "hard_sample_bank.safetensors"
FORMAT = 1
SUSPECT = 1  # bit of a pair's flag: probably no match at all
STEPS = 1024  # of the table that ranks are read off
BINS = 50  # of the report's histograms
WARM = 0.8  # share of the pairs that must have been visited where no model has looked at them before


@dataclass(frozen=True)
class HardSampling:
    """How difficulties are measured, and what they do; the equations stand in the module's docstring.

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
        guard_fall: See there.
        guard_visits: After how many visits at the earliest; with 0 the hardest are suspected from the start, until they
            fall, and shuffled captions are not learned before they are found.
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
        ranges: dict[str, tuple[float, float]] = {
            "momentum": (0, 1),
            "eta": (0, 1),
            "beta": (0, 1),
            "guard_share": (0, 1),
            "margin": (-2, 2),
        }
        ranges |= {"alpha": (0, 100), "gamma": (0, 100), "eps": (1e-6, 1), "margin_width": (1e-6, 100)}
        ranges |= {"guard_fall": (-1, 1), "guard_visits": (0, 1_000_000), "queue_size": (1, 10_000_000)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            kinds = (int,) if name in ("guard_visits", "queue_size") else (int, float)
            if type(value) not in kinds or not low <= value <= high:
                raise ValueError(f"{name} must be a number from {low} to {high}, got {value!r}")


# --- ids -------------------------------------------------------------------------------------------------------------


def unique_keys(ids: Sequence[Any]) -> np.ndarray:
    """`hash_ids` of ids that are all different.

    Raises:
        ValueError: an id occurs twice, or two have one key.
    """
    keys = hash_ids(ids)
    order = np.argsort(keys, kind="stable")
    equal = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if len(equal):
        first, second = (ids[order[equal[0] + i]] for i in (0, 1))
        if first == second:
            raise ValueError(f"The id {first!r} occurs twice ({len(equal)} such): ids must tell the pairs apart.")
        raise ValueError(f"The ids {first!r} and {second!r} have the same 64-bit key: rename one of them.")
    return keys


def read_ids(dataset: Any, column: str) -> list[Any]:
    """The id of each row, in the data set's order."""
    if column in (getattr(dataset, "column_names", None) or ()):
        return list(dataset[column])
    ids = []
    for i in range(len(dataset)):
        row = dataset[i]
        if not isinstance(row, Mapping) or column not in row:
            has = sorted(row) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(f"Row {i} of the data set has no id column {column!r}: {has}.")
        ids.append(row[column])
    return ids


@dataclass
class SampleIds:
    """Wraps a collator: its batches also have `sample_ids`, and `image_ids` where there is a column of them.

    Args:
        collator: Makes a batch of rows.
        id_column: Strings or integers, one for each pair.
        image_id_column: Of pictures that stand in several pairs.
    """

    collator: Callable[[list[Any]], Mapping[str, Any]]
    id_column: str
    image_id_column: str | None = None

    def evaluating(self, every_text: bool = False) -> SampleIds:
        """This around the collator's copy for evaluation."""
        return replace(self, collator=evaluating(self.collator, every_text))

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        columns = {"sample_ids": self.id_column, "image_ids": self.image_id_column}
        keys = {name: ids_of(rows, column) for name, column in columns.items() if column is not None}
        with naming(rows, self.id_column):
            return {**self.collator(rows), **keys}


def split_keys(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A batch without and with its keys: (what the model reads, {"sample", "image", "text"} int64 (B,) each).

    Equal texts have equal text keys. Pictures are told apart by `image_ids`, else by the collator's own `ids`, else by
    the pairs'.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("sample_ids", "image_ids")}
    image = next(batch[name] for name in ("image_ids", "ids", "sample_ids") if name in batch)
    text = text_keys(batch["input_ids"], batch.get("attention_mask"))
    return inputs, {"sample": batch["sample_ids"], "image": image, "text": text}


# --- difficulty ------------------------------------------------------------------------------------------------------


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
        own = (image * text).sum(-1, keepdim=True) * scale
        sides = [
            torch.cat([own, (one @ other.float().T * scale).masked_fill(same, -torch.inf)], dim=1)
            for one, other in ((image, queue["text"]), (text, queue["image"]))
        ]
        if how.difficulty == "margin":
            gaps = torch.stack([own[:, 0] - side[:, 1:].amax(dim=1) for side in sides])
            return torch.sigmoid((how.margin - gaps.mean(0) / scale) / how.margin_width)
        log_p = torch.stack([side.log_softmax(dim=1)[:, 0] for side in sides])
        if how.difficulty == "prob":
            return -torch.expm1(log_p).mean(0)
        negatives = (~same).sum(dim=1)
        return -log_p.mean(0) / torch.log1p(negatives.clamp_min(1))


# --- the bank --------------------------------------------------------------------------------------------------------


class HardSampleBank:
    """Difficulty, base difficulty, visits, last step and a flag of each pair: 21 bytes, and 8 of its id.

    It lives in the main process of each rank, never in a loader's workers. Pairs are known by their ids: a data set
    may come in another order, but with other pairs it is refused.

    Args:
        ids: Of the pairs, all different: strings or integers.
        id_column: Where rows have their id.
        image_id_column: Where they have their picture's, if pictures stand in several pairs.
        settings: The fields of [`HardSampling`].

    Example:
        >>> bank = HardSampleBank.from_model(model, dataset, id_column="id")
        >>> trainer = ContrastiveTrainer(model, args, train_dataset=dataset, hard_samples=bank)
        >>> trainer.train()
        >>> bank.report("report.html")
    """

    def __init__(
        self, ids: Sequence[Any], id_column: str = "id", image_id_column: str | None = None, **settings: Any
    ) -> None:
        keys = unique_keys(ids)
        if not len(keys):
            raise ValueError("There are no pairs.")
        self._make(np.sort(keys), id_column, image_id_column, HardSampling(**settings))

    def _make(self, keys: np.ndarray, id_column: str, image_id_column: str | None, settings: HardSampling) -> None:
        size = len(keys)
        self.settings = settings
        self.id_column, self.image_id_column = id_column, image_id_column
        self.keys = keys  # sorted: row i of every array is the pair of key i
        self.difficulty = np.full(size, 0.5, np.float32)
        self.base_difficulty = np.full(size, np.nan, np.float32)
        self.visits = np.zeros(size, np.int32)
        self.last_step = np.full(size, -1, np.int64)
        self.flag = np.zeros(size, np.uint8)
        self.queue = FeatureQueue(min(settings.queue_size, size))
        self.table = np.full(STEPS, np.nan, np.float32)  # the difficulty of each rank; NaN while all pairs count alike
        self.history: list[tuple[int, np.ndarray]] = []  # (step, counts of difficulties)
        self.since_ranked = 0  # visits
        self.tree: SumTree | None = None
        self.dataset: Any = None  # for the report; it isn't saved, and no copy takes it along

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "dataset": None}

    def __len__(self) -> int:
        return len(self.keys)

    # --- from the open model ---

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
        encode: Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, Tensor]] | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> HardSampleBank:
        """The bank of a data set with the difficulties that the unadapted model finds: one pass, adapters disabled.

        The pass goes through the data set in random order, so that the queue holds any pairs at any time; a data set
        that streams is read once, in its order.

        Args:
            model: Dual encoder, bare or in a `PeftModel`; its modes are what they were afterwards.
            collator: Makes a batch of rows, with `input_ids`. By default pictures and texts go through the processor
                of the model's checkpoint (`ImageTextCollator`), and rows of tensors are stacked. Of several captions
                the first counts (`collator.evaluating()`).
            encode: `(model, batch) -> (image, text)` embeddings of models whose output has no `image_embeds` and
                `text_embeds`.
            settings: The fields of [`HardSampling`].
        """
        how = HardSampling(**settings)
        stream = streams(dataset)
        keys = None if stream else unique_keys(read_ids(dataset, id_column))
        if collator is None:
            first = next(iter(dataset), None)
            if first is None:
                raise ValueError("The data set has no rows.")
            collator = default_collator(model, first)
        order = None if stream else torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        collate = SampleIds(
            evaluating(without_loss(collator, model)), id_column, image_id_column
        )  # the same texts each time
        loader = DataLoader(dataset, batch_size, sampler=order, collate_fn=collate)
        queue = FeatureQueue(how.queue_size if keys is None else min(how.queue_size, len(keys)))
        found_keys, found = [], []
        with as_it_was(model), torch.no_grad():
            passed = _embedded(tqdm(loader, desc="Difficulties", unit="batch", disable=not progress), model, encode)
            for image, text, names in _from_a_full_queue(passed, queue):
                scale = logit_scale(model)
                found_keys.append(names["sample"].cpu().numpy())
                found.append(difficulties(image, text, scale, names, queue, how).cpu().numpy())
        if not found:
            raise ValueError("The data set has no rows.")
        met, values = np.concatenate(found_keys), np.concatenate(found)
        bank = cls.__new__(cls)
        bank._make(np.unique(met), id_column, image_id_column, how)
        if len(bank) != len(met):
            raise ValueError(f"{len(met) - len(bank)} ids occur more than once: ids must tell the pairs apart.")
        rows = bank.rows(met)
        bank.difficulty[rows] = bank.base_difficulty[rows] = values
        queue.shrink()
        bank.queue, bank.dataset = queue, dataset
        bank.start_epoch()
        return bank

    # --- rows ---

    def rows(self, keys: np.ndarray) -> np.ndarray:
        """int64 rows of these keys.

        Raises:
            ValueError: the bank doesn't know one.
        """
        rows = np.searchsorted(self.keys, keys)
        unknown = self.keys[np.minimum(rows, len(self) - 1)] != keys
        if unknown.any():
            raise ValueError(
                f"{int(unknown.sum())} of {len(keys)} pairs are not in the bank, such as that of key "
                f"{int(keys[unknown][0])}: it was made of another data set. Make one: HardSampleBank.from_model(...)."
            )
        return rows

    def positions_in(self, dataset: Any) -> np.ndarray:
        """(N,) the position in `dataset` of each of the bank's rows.

        Raises:
            ValueError: the data set hasn't just the bank's pairs.
        """
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

    def update(self, keys: np.ndarray, values: np.ndarray, step: int) -> None:
        """Take over the difficulties of a step's pairs (of all processes); a pair that occurs twice counts once.

        Values that aren't finite, as of a step that overflowed, are passed over: one would spoil every later draw.
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
        if self.tree is not None:
            self.tree.set(rows, self._weights(rows))

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
        for part in _parts(len(self)):
            self._suspect(part)
        self.tree = None  # made anew when it is next needed

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

    # --- what it does ---

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
        return np.where(self.flag[rows] & SUSPECT, np.minimum(e, middle), e)

    def _weights(self, rows: np.ndarray | slice) -> np.ndarray:
        return (self.emphasis(rows) + np.float32(self.settings.eps)) ** np.float32(self.settings.alpha)

    def _sum_tree(self) -> SumTree:
        if self.tree is None:
            weights = np.empty(len(self), np.float32)
            for part in _parts(len(self)):
                weights[part] = self._weights(part)
            self.tree = SumTree(weights)
        return self.tree

    def probabilities(self, rows: np.ndarray | slice) -> np.ndarray:
        """P of these rows (float64)."""
        tree, eta = self._sum_tree(), self.settings.eta
        return (1 - eta) / len(self) + eta * tree[rows].astype(np.float64) / tree.total

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """int64 (count,): distinct rows, the first of draws by P."""
        tree, size = self._sum_tree(), len(self)
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
        w = np.where(self.flag[rows] & SUSPECT, np.minimum(w, 1), w)
        w /= w.mean()
        if how.beta:
            c = (len(self) * self.probabilities(rows)) ** -how.beta
            w = w * c / c.max()
        return w.astype(np.float32)

    @property
    def suspects(self) -> np.ndarray:
        """Keys of the pairs that are taken for mismatched."""
        return self.keys[(self.flag & SUSPECT) > 0]

    # --- storage ---

    def state(self) -> dict[str, np.ndarray]:
        """Every array, by name."""
        arrays = {
            name: getattr(self, name)
            for name in ("keys", "difficulty", "base_difficulty", "visits", "last_step", "flag", "table")
        }
        arrays |= {f"queue.{name}": part.cpu().numpy() for name, part in self.queue.parts.items()}
        arrays["queue.places"] = np.array([self.queue.size, self.queue.pointer, self.queue.filled], np.int64)
        arrays["since_ranked"] = np.array([self.since_ranked], np.int64)
        arrays["history.steps"] = np.array([step for step, _ in self.history], np.int64)
        arrays["history.counts"] = np.array([counts for _, counts in self.history], np.int64).reshape(-1, BINS)
        return arrays

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over another bank's arrays.

        Raises:
            ValueError: they are of other pairs.
        """
        if not np.array_equal(self.keys, arrays["keys"]):
            raise ValueError(f"The stored bank has other pairs ({len(arrays['keys'])}) than this one ({len(self)}).")
        for name in ("difficulty", "base_difficulty", "visits", "last_step", "flag", "table"):
            getattr(self, name)[:] = arrays[name]
        size, self.queue.pointer, self.queue.filled = (int(n) for n in arrays["queue.places"])
        self.queue.size = size
        self.queue.parts = {
            name: torch.from_numpy(arrays[f"queue.{name}"].copy())
            for name in ("image", "text", "image_keys", "text_keys")
            if f"queue.{name}" in arrays
        }
        steps, counts = arrays["history.steps"].tolist(), arrays["history.counts"]
        self.history = list(zip(steps, counts, strict=True))
        self.since_ranked = int(arrays["since_ranked"][0])
        self.tree = None

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `hard_sample_bank.safetensors` into a folder, aside and renamed."""
        about = {
            "settings": asdict(self.settings),
            "id_column": self.id_column,
            "image_id_column": self.image_id_column,
        }
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
            for name, dtype in _DTYPES.items():
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
            dataset: For pictures and texts; by default the one that the bank was made of or trained with. A bank that
                was loaded shows only keys without it. One that streams is read until the pairs have come.
            pairs: Shown of each kind.
        """
        from .report import write_report

        dataset = self.dataset if dataset is None else dataset
        return write_report(self, Path(path), dataset, image_column, text_column, pairs)


_DTYPES = {
    "keys": np.int64,
    "difficulty": np.float32,
    "base_difficulty": np.float32,
    "visits": np.int32,
    "last_step": np.int64,
    "flag": np.uint8,
}


def _parts(size: int) -> Iterator[slice]:
    for start in range(0, size, PART):
        yield slice(start, min(start + PART, size))


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
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}).") from None


# --- the pass of the open model --------------------------------------------------------------------------------------


@contextmanager
def as_it_was(model: Any) -> Iterator[None]:
    """Within it the model is the unadapted one, in eval mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                yield
        else:
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _embedded(loader: Iterable[Mapping[str, Any]], model: Any, encode: Any) -> Iterator[tuple[Tensor, Tensor, dict]]:
    device = next(model.parameters()).device
    for batch in loader:
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        inputs, keys = split_keys(batch)
        image, text = (encode or dual_embeddings)(model, inputs)
        yield F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1), keys


def _from_a_full_queue(passed: Iterator[tuple], queue: FeatureQueue) -> Iterator[tuple]:
    """Every batch after it has been pushed, but none before the queue is full (or the data set ends)."""
    waiting = []
    for image, text, keys in passed:
        queue.push(image, text, keys)
        waiting.append((image, text, keys))
        if queue.filled == queue.size:
            yield from waiting
            waiting = []
    yield from waiting


def default_collator(model: Any, row: Any) -> Callable[[list[Any]], Mapping[str, Any]]:
    """Stacks rows that are tensors already; else runs the processor that the model's checkpoint has."""
    from transformers import AutoProcessor

    if "input_ids" in row and "pixel_values" in row:
        return stack_rows
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = getattr(base.config, "name_or_path", "")
    if not name:
        raise ValueError("The model doesn't come from a checkpoint with a processor: pass a collator.")
    return ImageTextCollator(AutoProcessor.from_pretrained(name), model=model, return_loss=False)


def stack_rows(rows: list[Any]) -> dict[str, Tensor]:
    """A batch of rows of tensors, arrays or lists of numbers; images, texts and single numbers are left out.

    Raises:
        ValueError: rows differ in the shape of one of them.
    """
    batch = {}
    for name in [name for name, value in rows[0].items() if _is_array(value)]:
        tensors = [torch.as_tensor(row[name]) for row in rows]
        odd = next((i for i, tensor in enumerate(tensors) if tensor.shape != tensors[0].shape), None)
        if odd is not None:
            raise ValueError(
                f"Rows can't be stacked: {name!r} has shape {tuple(tensors[0].shape)} in {row_name(rows[0], 0)} of a batch and "
                f"{tuple(tensors[odd].shape)} in {row_name(rows[odd], odd)}. Pass a collator that pads them, such as "
                "collator=lambda rows: tokenizer.pad(rows, return_tensors='pt') (data_collator= of a trainer)."
            )
        batch[name] = torch.stack(tensors)
    return batch


def _is_array(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and value.dtype.kind in "biuf"
    return isinstance(value, Tensor) and value.ndim > 0
