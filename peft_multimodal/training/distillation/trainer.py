"""The Trainer that distils a model's text tower into an adapter's language."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.anatomy import base_model, describe
from ...core.registry import METHODS
from ...data import LanguageProcessor
from ...languages import MultilingualTower, multilingual_tower
from ..trainer import AdapterTrainer
from .kept import KeptOutputs, frozen_outputs
from .losses import DistillationLoss, alignment_loss, functional_loss, random_images
from .pairs import FullPairs, PairCollator, full_pairs


class CrossLingualTrainer(AdapterTrainer):
    """`transformers.Trainer` that distils the model's text tower into its active adapter's language.

    The data set has the columns `source` (the tower's language) and `target` (the adapter's). At level="tokens"
    there may also be `pairs`, lists of aligned (target token, source token), where an aligner has made them. No
    image is needed, and no vision tower: the model may be the text side alone. Pairs with an empty side are left out
    and counted.

    `evaluate()` gives eval_loss; `compute_metrics` gets y as predictions and e as labels, (pairs, d_t) each, with
    `cache=True` in the order of the targets' lengths.

    Args:
        model: A `PeftModel` whose active adapter reads another language.
        args: `TrainingArguments`.
        processing_class: A `LanguageProcessor` with the tower's language first, and the adapter's.
        train_dataset: Rows with `source` and `target`; it may stream with `cache=False`.
        eval_dataset: The same.
        loss: Weights of the losses.
        language: Of the processor's tokenizers, the target's; by default the active adapter's name.
        cache: Compute the frozen towers' outputs once and keep them on disk. False for data that doesn't fit, or that
            streams: both towers then run in every step.
        cache_dtype: "float32", or "float16" for half the space.
        cache_dir: Default: the cache of `datasets`.
        kwargs: The other arguments of `Trainer`.

    Raises:
        ValueError: no such adapter is active, a language has no tokenizer, or a column is missing.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import AutoTokenizer, TrainingArguments
        >>> config = CrossLingualAdapterConfig(encoder="intfloat/multilingual-e5-small")
        >>> model = get_peft_model(clip, config, adapter_name="zh")
        >>> english = AutoTokenizer.from_pretrained("openai/clip-vit-base-patch32")
        >>> chinese = AutoTokenizer.from_pretrained("intfloat/multilingual-e5-small")
        >>> args = TrainingArguments("out", learning_rate=2e-3)
        >>> processor = LanguageProcessor(en=english, zh=chinese)
        >>> CrossLingualTrainer(model, args, train_dataset=pairs, processing_class=processor).train()
    """

    processing_class: Any
    predicted = ("y", "e")

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
        tower = _tower(model)
        active = tower.active_adapters
        if len(active) != 1:
            raise ValueError(f"One adapter is trained at a time; active are {active}. Call model.set_adapter(name).")
        self.adapter_name = active[0]
        self.distillation_loss = self._asked
        if self._asked.tokens is None:
            self.distillation_loss = replace(self._asked, tokens=float(tower.level == "tokens"))
        if tower.level != "tokens" and (self.distillation_loss.tokens or self.distillation_loss.functional):
            raise ValueError(
                "The losses tokens= and functional= need an adapter with level='tokens': a fusion encoder reads its states."
            )
        if self.distillation_loss.functional and not any(t.name == "fusion" for t in describe(model).towers):
            raise ValueError(
                "The loss functional= needs the fusion encoder: train in the whole model, not its text side."
            )
        language = self._language or language_of(self.adapter_name, self._processor)
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

    def _prepared(self, data: Any, name: str, tower: MultilingualTower, keep: dict[str, Any] | None = None) -> Any:
        if isinstance(data, dict):
            return {key: self._prepared(rows, f"{name}_{key}", tower, keep) for key, rows in data.items()}
        if data is None:
            return None
        if not hasattr(data, "__len__"):
            if keep is not None:
                raise ValueError("A data set that streams has no end to compute beforehand: set cache=False.")
            self._counts[name] = FullPairs(data, self.args.dataloader_num_workers)
            return self._counts[name]
        full, self._counts[name] = full_pairs(data, name)
        return full if keep is None else KeptOutputs(tower, self.adapter_name, full, self._collator, **keep)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        ready = eval_dataset is None or eval_dataset is self.eval_dataset
        if not ready and not isinstance(eval_dataset, (str, KeptOutputs, FullPairs)):  # another one
            eval_dataset = self._prepared(eval_dataset, "eval", _tower(self.model))
        return super().get_eval_dataloader(eval_dataset)

    def _make_ready(self, checkpoint: Path | None) -> None:
        super()._make_ready(checkpoint)
        if self.model_init is None:
            self._start(self.model)

    def _start(self, model: Any) -> None:
        tower = _tower(model)
        if tower.is_untrained(self.adapter_name):
            tower.start_at(self._mean_teacher(tower), self.adapter_name)

    def _mean_teacher(self, tower: MultilingualTower) -> Tensor:
        if isinstance(self.train_dataset, KeptOutputs):
            return self.train_dataset.mean_teacher()
        if not isinstance(self.train_dataset, list):
            stream: Any = self.train_dataset
            rows = list(itertools.islice(stream, 256))
        else:
            rows = self.train_dataset[:: max(1, len(self.train_dataset) // 256)]
        processor: Any = self.processing_class
        tokens = processor.tokenize([row["source"] for row in rows], processor.base)
        device = next(tower.host().parameters()).device
        return tower.teach(**{name: value.to(device) for name, value in tokens.items()}).pooled.mean(0)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = self._inside(model, self._distil, inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _distil(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        tower, weights = _tower(model), self.distillation_loss
        if "student_states" not in batch:
            batch = frozen_outputs(tower, self.adapter_name, batch)
        Y, y = tower.project(batch["student_states"], batch["student_mask"], self.adapter_name)
        E, mask, target_mask = batch["teacher_states"], batch["student_mask"], batch["teacher_mask"]
        e = E[:, 0] if E.dim() == 3 else E
        loss = weights.pooled(y, e, text_projection(model))
        if weights.tokens:
            assert Y is not None
            loss = loss + weights.tokens * alignment_loss(Y, E, batch["pairs"], mask, target_mask)
        if weights.functional:
            assert Y is not None
            # A generator of its own: other images in each step, the same in each evaluation and in a resumed run.
            step = self.state.global_step if model.training else 0
            pixels = random_images(model, len(E), torch.Generator().manual_seed(self.args.seed + step)).to(E.device)
            loss = loss + weights.functional * functional_loss(model, Y, E, mask, target_mask, pixels)
        return {"loss": loss, "y": y, "e": e}

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "inputs" in self.args.include_for_metrics:  # transformers takes them by this name
            inputs.setdefault(getattr(self.model, "main_input_name", "input_ids"), inputs["target_input_ids"])
        return super().prediction_step(model, inputs, *args, **kwargs)


def language_of(adapter_name: str, processor: LanguageProcessor) -> str:
    """The language of an adapter, which is called as it; ValueError where the processor has other names alone."""
    others = processor.languages[1:]
    if adapter_name not in processor.languages and (others or adapter_name == "default"):
        others = others or ["zh"]
        raise ValueError(
            f"The adapter is called {adapter_name!r}, and the processor has the languages {processor.languages}. Call the "
            f"adapter as its language, get_peft_model(model, config, adapter_name={others[0]!r}), or pass "
            f"language={others[0]!r}."
        )
    return adapter_name


def text_projection(model: Any) -> nn.Module | None:
    """What projects the text tower's pooled output into the space that it shares with images; None where nothing does."""
    return next(
        (m for name, m in base_model(model).named_modules() if name.rpartition(".")[2] == "text_projection"), None
    )


def _tower(model: Any) -> MultilingualTower:
    tower = multilingual_tower(model)
    if tower is None:
        configs = [method.config.__name__ for method in METHODS.values() if method.promises.starts_as == "images"]
        raise ValueError(f"The model has no language: get_peft_model(model, {' or '.join(configs)}(...)) adds one.")
    return tower
