"""Distillation of the English text tower into another language's adapter, from translation pairs alone.

For the adapter's y and the frozen tower's e of the translation, both before the model's text projection W, with
z = norm(W y) and z' = norm(W e):

    L_mse = ||y - e||^2 / d_t                                          keeps norm and offset, needs no large batch
    L_cos = 1 - z . z'
    L_con = (CE(z Z'^T / tau) + CE(z' Z^T / tau)) / 2                  in the batch, tau = 0.05
    L_tok = alignment of the token states, where a fusion encoder reads them

Neither tower is trained, so their outputs are computed once and kept on disk; an epoch then costs the adapter alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...core.anatomy import base_model, describe
from ...core.registry import METHODS
from ...data import LanguageProcessor
from ...languages import MultilingualTower, multilingual_tower
from ..trainer import AdapterTrainer, call_inside

# --- losses ----------------------------------------------------------------------------------------------------------


@dataclass
class DistillationLoss:
    """Weights of the terms; 0 switches one off.

    Args:
        mse, cosine, contrastive: Of the pooled outputs.
        tokens: Of the token states; None is 1 where the adapter has level="tokens", and 0 elsewhere.
        functional: Of what the fusion encoder makes of both, beside the same pictures.
        temperature: tau of the contrastive term.
    """

    mse: float = 1.0
    cosine: float = 1.0
    contrastive: float = 0.1
    tokens: float | None = None
    functional: float = 0.0
    temperature: float = 0.05

    def __post_init__(self) -> None:
        weights = (self.mse, self.cosine, self.contrastive, self.tokens or 0.0, self.functional)
        if not all(isinstance(w, (int, float)) and 0 <= w < math.inf for w in weights) or not any(weights):
            raise ValueError(f"The losses' weights must be numbers >= 0, one of them > 0: {self}.")
        if not (isinstance(self.temperature, (int, float)) and 0 < self.temperature < math.inf):
            raise ValueError(f"temperature must be > 0, got {self.temperature!r}.")

    def pooled(self, y: Tensor, e: Tensor, projection: nn.Module | None) -> Tensor:
        """The module docstring's L_mse, L_cos and L_con, weighted, of y and e (B, d_t), in float32."""
        with _float32(y):
            return self._pooled(y.float(), e.float(), projection)

    def _pooled(self, y: Tensor, e: Tensor, projection: nn.Module | None) -> Tensor:
        loss = self.mse * F.mse_loss(y, e)
        if self.cosine or self.contrastive:
            z, target = (_unit(x, projection) for x in (y, e))
            loss = loss + self.cosine * (1 - (z * target).sum(-1)).mean()
            if self.contrastive:
                loss = loss + self.contrastive * in_batch_contrast(z, target, self.temperature)
        return loss


def _unit(x: Tensor, projection: nn.Module | None) -> Tensor:
    if projection is not None:
        x = projection(x.to(next(projection.parameters()).dtype)).float()
    return F.normalize(x, dim=-1)


def in_batch_contrast(z: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Symmetric cross-entropy of unit vectors (B, d) with their targets; equal targets are no negatives of each other."""
    logits = z @ target.t() / temperature
    same = (target @ target.t()) > 1 - 1e-6
    same.fill_diagonal_(False)
    labels = torch.arange(len(z), device=z.device)
    rows = F.cross_entropy(logits.masked_fill(same, float("-inf")), labels)
    columns = F.cross_entropy(logits.t().masked_fill(same, float("-inf")), labels)
    return 0.5 * (rows + columns)


def soft_alignment_loss(Y: Tensor, E: Tensor, mask: Tensor, target_mask: Tensor) -> Tensor:
    """Token states of two languages matched without an aligner, in both directions.

    With S_ji = E_j . Y_i / sqrt(d), every teacher token is to be a mixture of student tokens (coverage, the softmax
    over i), and every student token one of teacher tokens (precision; the softmax over j without gradient, lest the
    student escapes by moving its weights). Coverage alone lets student tokens that nobody looks at drift.

    Args:
        Y: (B, L_s, d) of the student, mask (B, L_s).
        E: (B, L_t, d) of the teacher, target_mask (B, L_t).
    """
    with _float32(Y):
        return _soft_alignment(Y.float(), E.float(), mask, target_mask)


def _soft_alignment(Y: Tensor, E: Tensor, mask: Tensor, target_mask: Tensor) -> Tensor:
    scores = E @ Y.transpose(1, 2) / Y.shape[-1] ** 0.5  # B x L_t x L_s
    over_student = scores.masked_fill(~mask[:, None, :], float("-inf")).softmax(dim=-1)
    over_teacher = scores.detach().masked_fill(~target_mask[:, :, None], float("-inf")).softmax(dim=1)
    coverage = (E - over_student @ Y).square().mean(-1)
    precision = (Y - over_teacher.transpose(1, 2) @ E).square().mean(-1)
    return _masked_mean(coverage, target_mask) + _masked_mean(precision, mask)


def hard_alignment_loss(
    Y: Tensor, E: Tensor, pairs: Sequence[Sequence[Sequence[int]]], mask: Tensor, target_mask: Tensor
) -> Tensor:
    """Mean square distance of aligned tokens; both first ones always match.

    Args:
        pairs: `pairs[b]` holds (student token, teacher token).
        Y, E, mask, target_mask: As for `soft_alignment_loss`.
    """
    places = []
    lengths = zip(pairs, mask.sum(1).tolist(), target_mask.sum(1).tolist(), strict=True)
    for b, (found, students, teachers) in enumerate(lengths):
        for student, teacher in {(0, 0), *((int(s), int(t)) for s, t in found)}:
            if not (0 <= student < students and 0 <= teacher < teachers):
                raise ValueError(
                    f"Pair ({student}, {teacher}) of row {b} is outside its {students} and {teachers} tokens."
                )
            places.append((b, student, teacher))
    rows, i, j = (list(part) for part in zip(*places, strict=True))
    return F.mse_loss(Y[rows, i].float(), E[rows, j].float())


def alignment_loss(Y: Tensor, E: Tensor, pairs: Sequence[Any], mask: Tensor, target_mask: Tensor) -> Tensor:
    """Hard for the rows whose tokens are aligned, soft for the others; each row weighs the same."""
    hard = [i for i, found in enumerate(pairs) if found]
    soft = [i for i, found in enumerate(pairs) if not found]
    loss = Y.new_zeros((), dtype=torch.float32)
    if hard:
        aligned = hard_alignment_loss(Y[hard], E[hard], [pairs[i] for i in hard], mask[hard], target_mask[hard])
        loss = loss + len(hard) / len(pairs) * aligned
    if soft:
        loss = loss + len(soft) / len(pairs) * soft_alignment_loss(Y[soft], E[soft], mask[soft], target_mask[soft])
    return loss


def functional_loss(
    model: nn.Module, Y: Tensor, E: Tensor, mask: Tensor, target_mask: Tensor, pixels: Tensor
) -> Tensor:
    """What the frozen fusion encoder makes of the two texts beside the same pictures: free of length and order.

    The states that are compared are those before the text's: the picture's, and a class token's.

    Args:
        model: The whole model, with a [`CrossLingualAdapterModel`] at level="tokens".
        pixels: (B, 3, H, W); random ones do.
    """
    part, found = _tower(model), describe(model)
    dtype = next(p.dtype for p in part.host().parameters() if p.is_floating_point())
    stack: Any = base_model(model).get_submodule(next(t.path for t in found.towers if t.name == "fusion"))
    training = [module for module in base_model(model).modules() if module.training]
    outputs = []
    try:
        base_model(model).eval()  # the frozen encoders have no dropout, as when the text tower teaches
        for states, text_mask in ((Y, mask), (E, target_mask)):
            kept: list[Tensor] = []
            handle = stack[-1].register_forward_hook(
                lambda m, a, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out)
            )
            try:
                with part.standing_in(states.to(dtype)):
                    tokens = {"input_ids": text_mask.long(), "attention_mask": text_mask.long()}
                    model(**tokens, pixel_values=pixels.to(dtype))
            finally:
                handle.remove()
            outputs.append(kept[-1][:, : kept[-1].shape[1] - states.shape[1]])
    finally:
        for module in training:
            module.training = True
    return F.mse_loss(outputs[0].float(), outputs[1].detach().float())


def _float32(x: Tensor) -> Any:
    """Mixed precision switched off, for sums and products that need their digits."""
    return torch.autocast(x.device.type, enabled=False)


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


# --- outputs that are kept -------------------------------------------------------------------------------------------


class KeptOutputs(torch.utils.data.Dataset):
    """The frozen towers' outputs of translation pairs, memory-mapped: a row is {"student", "teacher", "pairs", "ids"}.

    student: (L_s, d_s); teacher: (d_t,), at the level of tokens (L_t, d_t); ids: (L_s,), the target's tokens. The outputs
    lie in the cache of `datasets` under a key of both towers' weights, the texts' tokens and the dtype: whatever changes,
    they are made again. Rows are sorted by the length of the target.
    """

    def __init__(
        self,
        part: MultilingualTower,
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
        digest = _weights_hash(part, adapter_name)
        digest.update(f"{dtype} {part.level}".encode())
        for batch in batches:
            tokenised = collator(batch)
            lengths = tokenised["target_attention_mask"].sum(dim=1).tolist()
            ids = tokenised["target_input_ids"].numpy().astype(np.int32)
            self.ids += [row[:length].copy() for row, length in zip(ids, lengths, strict=True)]
            for name, value in tokenised.items():
                tokens = value.numpy().tobytes() if isinstance(value, Tensor) else json.dumps(value).encode()
                digest.update(f"{name} {len(tokens)}".encode() + tokens)

        def outputs() -> Iterator[dict[str, Any]]:
            for rows in tqdm(batches, desc="Frozen outputs", unit="batch", leave=False):
                batch = frozen_outputs(part, adapter_name, collator(rows))
                for i, pair in enumerate(rows):
                    student = batch["student_states"][i][batch["student_mask"][i]]
                    teacher = batch["teacher_states"][i]
                    if part.level == "tokens":
                        teacher = teacher[batch["teacher_mask"][i]]
                    yield {
                        "student": self._bytes(student),
                        "teacher": self._bytes(teacher),
                        "pairs": pair.get("pairs") or [],
                    }

        binary = datasets.Value("large_binary")
        features = datasets.Features(
            {"student": binary, "teacher": binary, "pairs": datasets.List(datasets.List(datasets.Value("int32")))}
        )
        shown = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bars()  # ours says what is going on
        try:
            self.rows = datasets.Dataset.from_generator(
                outputs,
                features=features,
                cache_dir=None if cache_dir is None else str(cache_dir),
                fingerprint=digest.hexdigest()[:32],
                writer_batch_size=256,
            )
        except datasets.exceptions.DatasetGenerationError as error:
            raise (error.__cause__ or error) from None  # what a text or a tower had to say
        finally:
            if shown:
                datasets.enable_progress_bars()
        self.widths = dict(zip(("student", "teacher"), part.widths(adapter_name), strict=True))

    def _bytes(self, x: Tensor) -> bytes:
        return x.float().cpu().numpy().astype(self.dtype).tobytes()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        found = self.rows[indices]
        return [
            {
                "student": np.frombuffer(student, self.dtype).reshape(-1, self.widths["student"]),
                "teacher": np.frombuffer(teacher, self.dtype).reshape(-1, self.widths["teacher"]),
                "pairs": pairs,
                "ids": self.ids[i],
            }
            for i, student, teacher, pairs in zip(
                indices, found["student"], found["teacher"], found["pairs"], strict=True
            )
        ]

    def mean_teacher(self, rows: int = 512) -> Tensor:
        """The mean of the pooled teacher vectors over an even selection of rows: (d_t,)."""
        step = max(1, len(self) // rows)
        vectors = [row["teacher"][0] for row in self.__getitems__(list(range(0, len(self), step)))]
        return torch.from_numpy(np.stack(vectors).astype(np.float32)).mean(0)


def frozen_outputs(part: MultilingualTower, adapter_name: str, batch: dict[str, Any]) -> dict[str, Any]:
    """Both frozen towers on tokenised pairs: {student_states, student_mask, teacher_states, teacher_mask, pairs}.

    Shapes: (B, L_s, d_s), (B, L_s); teacher_states (B, L_t, d_t) at the level of tokens, else (B, d_t).
    """
    device = next(part.host().parameters()).device
    ids, mask = batch["target_input_ids"].to(device), batch["target_attention_mask"].to(device).bool()
    teaching = part.teach(batch["source_input_ids"].to(device), batch["source_attention_mask"].to(device))
    return {
        "student_states": part.encode(ids, mask, adapter_name),
        "student_mask": mask,
        "teacher_states": teaching.pooled if teaching.states is None else teaching.states,
        "teacher_mask": batch["source_attention_mask"].to(device).bool(),
        "pairs": batch.get("pairs"),
    }


def _weights_hash(part: MultilingualTower, adapter_name: str) -> Any:
    """Of the two frozen towers."""
    digest = hashlib.sha256()
    for name, value in part.frozen_weights(adapter_name):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest


# --- training --------------------------------------------------------------------------------------------------------


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
            lengths = [len(row[name]) for row in rows]
            states = np.zeros((len(rows), max(lengths), rows[0][name].shape[-1]), np.float32)
            for i, row in enumerate(rows):
                states[i, : lengths[i]] = row[name]
            batch[f"{name}_states"] = torch.from_numpy(states)
            batch[f"{name}_mask"] = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return batch


class CrossLingualTrainer(AdapterTrainer):
    """`transformers.Trainer` that distils the model's text tower into its active adapter's language.

    The data set has the columns `source` (the tower's language) and `target` (the adapter's); at level="tokens" also
    `pairs`, lists of aligned (target token, source token), where an aligner has made them. No picture is needed, and
    no vision tower: the model may be the text side alone. Pairs with an empty side are left out and counted.

        >>> trainer = CrossLingualTrainer(model, args, train_dataset=pairs, processing_class=processor)
        >>> trainer.train()

    Args:
        processing_class: A `LanguageProcessor` with the tower's language first, and the adapter's.
        loss: Weights of the losses.
        language: Of the processor's tokenizers, the target's; by default the active adapter's name.
        cache: Compute the frozen towers' outputs once and keep them on disk. False for data that doesn't fit, or that
            streams: both towers then run in every step.
        cache_dtype: "float32", or "float16" for half the space.
        cache_dir: Default: the cache of `datasets`.

    `evaluate()` gives eval_loss; `compute_metrics` gets y as predictions and e as labels, (pairs, d_t) each, with
    `cache=True` in the order of the targets' lengths.
    """

    processing_class: Any

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        processing_class: LanguageProcessor,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        loss: DistillationLoss | None = None,
        language: str | None = None,
        cache: bool = True,
        cache_dtype: str = "float32",
        cache_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        if cache_dtype not in ("float32", "float16"):
            raise ValueError(f"cache_dtype must be 'float32' or 'float16', got {cache_dtype!r}.")
        if not isinstance(processing_class, LanguageProcessor):
            raise TypeError("processing_class must be a LanguageProcessor: LanguageProcessor(en=..., zh=...).")
        self._processor, self._language, self._asked = processing_class, language, loss or DistillationLoss()
        self._keep: dict[str, Any] | None = {"dtype": cache_dtype, "cache_dir": cache_dir} if cache else None
        self._counts: dict[str, int | FullPairs] = {}
        self._data: tuple[Any, Any] | None = None
        super().__init__(model, args, eval_dataset=eval_dataset, processing_class=processing_class, **kwargs)
        self.can_return_loss = True
        self._data = train_dataset, eval_dataset
        self._prepare(self.model)
        self._check_batches()

    def _adopt(self, model: Any) -> None:
        part = _tower(model)
        active = part.active_adapters
        if len(active) != 1:
            raise ValueError(f"One adapter is trained at a time; active are {active}. Call model.set_adapter(name).")
        self.adapter_name = active[0]
        self.distillation_loss = self._asked
        if self._asked.tokens is None:
            self.distillation_loss = replace(self._asked, tokens=float(part.level == "tokens"))
        if part.level != "tokens" and (self.distillation_loss.tokens or self.distillation_loss.functional):
            raise ValueError(
                "The losses tokens= and functional= need an adapter with level='tokens': a fusion encoder reads its states."
            )
        if self.distillation_loss.functional and not any(t.name == "fusion" for t in describe(model).towers):
            raise ValueError(
                "The loss functional= needs the fusion encoder: train in the whole model, not its text side."
            )
        language = self._language or self.adapter_name
        others = self._processor.languages[1:]
        if self._language is None and language not in self._processor.languages and (others or language == "default"):
            others = others or ["zh"]
            raise ValueError(
                f"The adapter is called {language!r}, and the processor has the languages {self._processor.languages}. Call "
                f"the adapter as its language, get_peft_model(model, config, adapter_name={others[0]!r}), or pass "
                f"language={others[0]!r}."
            )
        self._processor.tokenizer(language)  # an unknown one is an error here
        fitted = self._processor.fitted(model, {language: self.adapter_name})
        self._collator = PairCollator(fitted, language)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        if self._data is not None:  # train() makes a model of its own
            if self.place_model_on_device:
                self._move_model_to_device(model, self.args.device)
            self._prepare(model)
            self._start(model)
        return model

    def _prepare(self, model: Any) -> None:
        """Make the data ready for this model: its frozen towers' outputs are found again if they are the same."""
        assert self._data is not None
        self.train_dataset, self.eval_dataset = (
            self._prepared(data, name, _tower(model), self._keep)
            for data, name in zip(self._data, ("train", "eval"), strict=True)
        )
        self.data_collator.collator = self._collator
        self.processing_class = self._collator.processor  # saved with the checkpoints

    @property
    def skipped(self) -> dict[str, int]:
        """Pairs with an empty side that were left out, by data set; of one that streams, in its latest pass."""
        return {name: count if isinstance(count, int) else count.skipped for name, count in self._counts.items()}

    def _needs_negatives(self) -> bool:
        loss = self.distillation_loss
        return bool(loss.contrastive) and not (loss.mse or loss.cosine or loss.tokens or loss.functional)

    def _check_batches(self) -> None:
        super()._check_batches()
        if self.train_dataset is not None and self.distillation_loss.contrastive and self._train_batch_size == 1:
            self._say(
                "A batch of one pair has no negatives: the term contrastive= teaches nothing. Set "
                "per_device_train_batch_size to 2 or more, or contrastive=0."
            )

    def _prepared(self, data: Any, name: str, part: MultilingualTower, keep: dict[str, Any] | None = None) -> Any:
        if isinstance(data, dict):
            return {key: self._prepared(rows, f"{name}_{key}", part, keep) for key, rows in data.items()}
        if data is None:
            return None
        if not hasattr(data, "__len__"):
            if keep is not None:
                raise ValueError("A data set that streams has no end to compute beforehand: set cache=False.")
            self._counts[name] = FullPairs(data, self.args.dataloader_num_workers)
            return self._counts[name]
        pairs = [dict(row) for row in data]
        lacking = next((i for i, pair in enumerate(pairs) if not {"source", "target"} <= pair.keys()), None)
        if not pairs or lacking is not None:
            has = "no rows" if lacking is None else f"row {lacking} has {sorted(pairs[lacking])}"
            raise ValueError(f"The {name} data needs the columns 'source' and 'target'; {has}.")
        full = [pair for pair in pairs if _is_full(pair)]
        self._counts[name] = skipped = len(pairs) - len(full)
        if skipped:
            warnings.warn(f"{skipped} of {len(pairs)} {name} pairs have an empty side and are left out.", stacklevel=5)
        if (len(full) > 1 and len({(p["source"], p["target"]) for p in full}) == 1) or not full:
            raise ValueError(
                f"All {len(pairs)} {name} pairs are {'equal' if full else 'empty'}: there is nothing to learn."
            )
        return full if keep is None else KeptOutputs(part, self.adapter_name, full, self._collator, **keep)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        ready = eval_dataset is None or eval_dataset is self.eval_dataset
        if not ready and not isinstance(
            eval_dataset, (str, KeptOutputs, FullPairs)
        ):  # another one, given to evaluate()
            eval_dataset = self._prepared(eval_dataset, "eval", _tower(self.model))
        return super().get_eval_dataloader(eval_dataset)

    def _make_ready(self, checkpoint: Path | None) -> None:
        super()._make_ready(checkpoint)
        if self.model_init is None:
            self._start(self.model)

    def _start(self, model: Any) -> None:
        part = _tower(model)
        if part.is_untrained(self.adapter_name):
            part.start_at(self._mean_teacher(part), self.adapter_name)

    def _mean_teacher(self, part: MultilingualTower) -> Tensor:
        if isinstance(self.train_dataset, KeptOutputs):
            return self.train_dataset.mean_teacher()
        if not isinstance(self.train_dataset, list):
            stream: Any = self.train_dataset
            rows = list(itertools.islice(stream, 256))
        else:
            rows = self.train_dataset[:: max(1, len(self.train_dataset) // 256)]
        processor: Any = self.processing_class
        tokens = processor.tokenize([row["source"] for row in rows], processor.base)
        device = next(part.host().parameters()).device
        return part.teach(**{name: value.to(device) for name, value in tokens.items()}).pooled.mean(0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        with self.accelerator.autocast():
            outputs = call_inside(model, module, lambda batch: self._distil(module, batch), inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _distil(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        part, weights = _tower(model), self.distillation_loss
        if "student_states" not in batch:
            batch = frozen_outputs(part, self.adapter_name, batch)
        Y, y = part.project(batch["student_states"], batch["student_mask"], self.adapter_name)
        E, mask, target_mask = batch["teacher_states"], batch["student_mask"], batch["teacher_mask"]
        e = E[:, 0] if E.dim() == 3 else E
        loss = weights.pooled(y, e, text_projection(model))
        if weights.tokens:
            assert Y is not None
            loss = loss + weights.tokens * alignment_loss(Y, E, batch["pairs"], mask, target_mask)
        if weights.functional:
            assert Y is not None
            # A generator of its own: other pictures in each step, the same in each evaluation and in a resumed run.
            step = self.state.global_step if model.training else 0
            pixels = random_pictures(model, len(E), torch.Generator().manual_seed(self.args.seed + step)).to(E.device)
            loss = loss + weights.functional * functional_loss(model, Y, E, mask, target_mask, pixels)
        return {"loss": loss, "y": y, "e": e}

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if "inputs" in self.args.include_for_metrics:  # transformers takes them by this name
            inputs.setdefault(getattr(self.model, "main_input_name", "input_ids"), inputs["target_input_ids"])
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        return loss.detach(), outputs["y"].detach(), outputs["e"].detach()


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


def _is_full(pair: dict[str, Any]) -> bool:
    return all(isinstance(pair[side], str) and pair[side].strip() for side in ("source", "target"))


def text_projection(model: Any) -> nn.Module | None:
    """What projects the text tower's pooled output into the space that it shares with pictures; None where nothing does."""
    return next(
        (m for name, m in base_model(model).named_modules() if name.rpartition(".")[2] == "text_projection"), None
    )


def random_pictures(model: Any, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Noise of the size that the model's vision tower reads: (count, 3, H, W)."""
    config: Any = base_model(model).config
    config = getattr(config, "vision_config", None) or getattr(config, "image_config", None) or config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(count, 3, height, width, generator=generator)


def _tower(model: Any) -> MultilingualTower:
    part = multilingual_tower(model)
    if part is None:
        configs = [method.config.__name__ for method in METHODS.values() if method.promises.starts_as == "images"]
        raise ValueError(f"The model has no language: get_peft_model(model, {' or '.join(configs)}(...)) adds one.")
    return part
