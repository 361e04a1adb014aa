"""Trainer integration of losses that a model's own forward doesn't compute."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from ..core.stand_in import StandIn
from ..core.weights import WeightsDontFit
from ..data import FiniteBatches, evaluating, without_loss
from .callback import AdapterCallback, renew_card
from .checkpoints import BATCH, BATCHES, STATE, batches_of, goes_on_exactly, rows_of_a_step, to_resume
from .learning_rates import parameter_groups
from .losses import LOGIT_SCALE, retrieval_loss


class _OwnCallback(AdapterCallback):
    stock = False


class AdapterTrainer(Trainer):
    """What the trainers of the package have in common: their own loss, adapters of any name, no NaN in their data,
    evaluations that don't draw, batches that have negatives, and exact restarts after a kill.

    All columns of the data reach the collator, whatever `remove_unused_columns` says.

    Args:
        saved_modules_lr, tower_lr, role_lr: Learning rates of their own, as [`parameter_groups`] takes them; also with
            `model_init`, several processes and any optimizer that `TrainingArguments` names.
    """

    data_collator: Any
    predicted = (
        "image_embeds",
        "text_embeds",
    )  # of a loss's outputs: what `compute_metrics` gets as predictions and labels
    loss_is_scaled_for_ga = False  # a mean over its own batch
    joint_loss = False  # whether it is one loss of all processes' rows

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *fixed: Any,
        saved_modules_lr: float | None = None,
        tower_lr: Mapping[str, float] | None = None,
        role_lr: Mapping[str, float] | None = None,
        **kwargs: Any,
    ):
        self._said: set[str] = set()
        self._rates: dict[str, Any] = {"saved_modules_lr": saved_modules_lr, "tower_lr": tower_lr, "role_lr": role_lr}
        if model is not None:
            self._adopt(model)
        super().__init__(model, args or TrainingArguments("trainer_output"), *fixed, **kwargs)
        self.model_accepts_loss_kwargs = False
        id_column = getattr(self.data_collator, "id_column", None) or "id"
        self.data_collator = FiniteBatches(without_loss(self.data_collator, self.model), id_column)
        if self.args.n_gpu > 1:
            raise ValueError("DataParallel isn't supported: start one process a GPU with `accelerate launch`.")
        self.remove_callback(AdapterCallback)
        self.add_callback(_OwnCallback())
        self._check_batches()

    def _adopt(self, model: Any) -> None:
        """Refuse a model that this trainer can't train, and make ready what belongs to it."""

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        self._adopt(model)
        return model

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None and any(rate is not None for rate in self._rates.values()):
            trained: Any = self.model if model is None else model
            chosen = self.optimizer_cls_and_kwargs
            kind, options = chosen or self.get_optimizer_cls_and_kwargs(self.args, trained)
            is_plain = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
            if not is_plain or options.keys() & {"params", "model", "optimizer_dict"}:
                raise ValueError(
                    f"optim={self.args.optim} chooses its parameters itself: leave out saved_modules_lr, tower_lr and role_lr."
                )
            groups = parameter_groups(trained, self.args.learning_rate, self.args.weight_decay, **self._rates)
            self.optimizer_cls_and_kwargs = kind, {**options, "params": groups}
            try:
                return super().create_optimizer(model)
            finally:
                self.optimizer_cls_and_kwargs = chosen  # the next model of `model_init` has parameters of its own
        return super().create_optimizer(model)

    # --- the loss ---

    def _inside(self, model: nn.Module, function: Callable[[Any, dict[str, Any]], Any], batch: Any) -> Any:
        """`function(module, batch)` of the bare module, inside the forward of what is wrapped around it."""
        module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        with self.accelerator.autocast():  # accelerate's mixed precision lives in the forward that is replaced here
            return call_inside(model, module, lambda batch: function(module, batch), batch)

    def _evaluated(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """(loss, outputs), as evaluation computes them."""
        return self.compute_loss(model, inputs, return_outputs=True)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self._evaluated(model, self._prepare_inputs(inputs))
        if prediction_loss_only:
            return loss.detach(), None, None
        predictions, labels = (outputs[name].detach() for name in self.predicted)
        return loss.detach(), predictions, labels

    # --- data ---

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return dataset

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        return data_collator

    def get_train_dataloader(self) -> Any:
        self._check_batches()  # of the size that auto_find_batch_size has come to
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        with self._collating(evaluating(self.data_collator)):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        with self._collating(evaluating(self.data_collator)):
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _collating(self, collator: Any) -> Iterator[None]:
        plain, self.data_collator = self.data_collator, collator
        try:
            yield
        finally:
            self.data_collator = plain

    def _draws(self) -> int | None:
        """Rows of an epoch; None of a data set that streams."""
        return len(self.train_dataset) if has_length(self.train_dataset) else None

    def _needs_negatives(self) -> bool:
        """Whether a batch of one pair teaches nothing."""
        return True

    def _check_batches(self) -> None:
        if self.train_dataset is None:
            return
        processes, draws = self.args.world_size, self._draws()
        rows = rows_of_a_step(self._batches())
        batch = rows if self.joint_loss else rows // processes
        if self.args.dataloader_drop_last and draws is not None and draws < rows:
            raise ValueError(
                f"An epoch has {draws} rows, a batch of all processes {rows}: with dataloader_drop_last=True "
                "no batch is left. Lower per_device_train_batch_size, or set dataloader_drop_last=False."
            )
        if not self._needs_negatives():
            return
        if draws == 1 or batch == 1:
            of = "The data set has" if draws == 1 else "A batch has"
            raise ValueError(
                f"{of} one pair, which has no negatives: the loss would teach nothing, whatever "
                "gradient_accumulation_steps is. Set per_device_train_batch_size to 2 or more."
            )
        if draws is not None and processes == 1 and draws % batch == 1 and not self.args.dataloader_drop_last:
            steps = self.args.max_steps * self.args.gradient_accumulation_steps
            if steps <= 0 or steps * batch > draws:  # the last batch is reached
                self._say(
                    f"The last of an epoch's batches has one pair ({draws} rows in batches of {batch}), which has no "
                    "negatives and teaches nothing: set dataloader_drop_last=True."
                )

    def _say(self, warning: str) -> None:
        """Once, however often it is checked."""
        if warning not in self._said:
            warnings.warn(warning, stacklevel=4)
        self._said.add(warning)

    # --- restarts ---

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; True resumes from the newest checkpoint that is complete (see `last_checkpoint`).

        Raises:
            ValueError: the batches have changed since the checkpoint, so that training can't go on exactly.
        """
        checkpoint = to_resume(resume_from_checkpoint, self.args.output_dir) or None
        self._make_ready(None if checkpoint is None else Path(checkpoint))
        return super().train(checkpoint, *args, **kwargs)

    def _make_ready(self, checkpoint: Path | None) -> None:
        """What comes before training, or before it goes on from a checkpoint."""
        if checkpoint is not None and not self.args.ignore_data_skip:
            self._check_same_batches(checkpoint)

    def _batches(self) -> dict[str, int]:
        accelerator: Any = self.args.accelerator_config
        return {
            "per_device_train_batch_size": self._train_batch_size,
            "processes": self.args.world_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "dataloader_drop_last": int(self.args.dataloader_drop_last),
            "split_batches": int(accelerator.split_batches),
        }

    def _order(self) -> dict[str, int]:
        """What decides, beside the batches, which rows come when; of a data set that streams it isn't known."""
        if not has_length(self.train_dataset):
            return {}
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return {"rows": len(self.train_dataset), "data_seed": seed}

    def _check_same_batches(self, checkpoint: Path) -> None:
        then, order = batches_of(checkpoint), self._order()
        batches = {
            **self._batches(),
            **({BATCH: then[BATCH]} if self.args.auto_find_batch_size and BATCH in then else {}),
        }
        now = {**batches, **order}
        changed = [name for name in now if then.get(name, now[name]) != now[name]]
        if order.keys() & {*changed} or (changed and not self._goes_on_exactly({**now, **then}, batches)):
            was = ", ".join(f"{name}={then[name]} (now {now[name]})" for name in changed)
            raise ValueError(
                f"{checkpoint} was saved with {was}: which rows were trained on couldn't be told, and training would not "
                "go on as it began. Use the same again, or start a run that takes over the weights alone "
                "(ignore_data_skip=True begins its epoch from the start)."
            )

    def _goes_on_exactly(self, then: dict[str, int], now: dict[str, int]) -> bool:
        return goes_on_exactly(then, now, self._draws(), self.joint_loss)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            (folder / STATE).unlink(missing_ok=True)  # an older run's would vouch for a save that is killed
            folder.mkdir(parents=True, exist_ok=True)
            (folder / BATCHES).write_text(
                json.dumps({**self._batches(), **self._order()}, indent=2) + "\n", encoding="utf-8"
            )
            self._save_beside(folder)
        super()._save_checkpoint(model, trial)

    def _save_beside(self, folder: Path) -> None:
        """Write into a checkpoint what transformers knows nothing of, before transformers makes it complete."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except WeightsDontFit as error:
            raise WeightsDontFit(
                f"{resume_from_checkpoint} is another run's: the adapter in it isn't this model's. Give each run an output_dir of its "
                f"own, or call train() without resume_from_checkpoint to start at step 0. ({error})"
            ) from error

    # --- the Hub ---

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The adapter's card, with that of the Trainer below it."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            renew_card(self.accelerator.unwrap_model(self.model), self.args)

    def _load_best_model(self) -> None:
        # transformers knows one adapter, that is called "default": the callback loads every one.
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not hasattr(self.model, "peft_config"):
            super()._load_best_model()


class ImageTextRetrievalTrainer(AdapterTrainer):
    """`transformers.Trainer` whose loss is `retrieval_loss`: ITC + ITM, for models like `BlipForImageTextRetrieval`.

    Use it with `ImageTextCollator`. Evaluation gives eval_loss with negatives drawn from `args.seed`, and so the
    same each time. `compute_metrics` and `predict` get image embeddings as predictions and text embeddings as
    labels, `(rows, d)` each, of unit length. They are ITC's; `peft_multimodal.evaluation.rerank_recall` re-ranks by
    ITM.

    Gradient accumulation, mixed precision and DDP work as usual. `torch_compile` doesn't reach this loss.

    Args:
        args: What `Trainer` takes by position.
        logit_scale: 1 / temperature of ITC and of the hard negatives.
        kwargs: The other arguments of `Trainer`, and `saved_modules_lr`, `tower_lr` and `role_lr` of
            `parameter_groups`.

    Raises:
        ValueError: batches of one pair.

    Source: Li et al. 2022, "BLIP", arXiv 2201.12086.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import AutoProcessor, BlipForImageTextRetrieval, TrainingArguments
        >>> BLIP = "Salesforce/blip-itm-base-coco"
        >>> model = get_peft_model(BlipForImageTextRetrieval.from_pretrained(BLIP), UniAdapterConfig())
        >>> collator = ImageTextCollator(AutoProcessor.from_pretrained(BLIP), model=model)
        >>> args = TrainingArguments("out", learning_rate=1e-3, remove_unused_columns=False, label_names=[])
        >>> ImageTextRetrievalTrainer(model, args, train_dataset=dataset, data_collator=collator).train()
    """

    def __init__(self, *args: Any, logit_scale: float = LOGIT_SCALE, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.logit_scale = logit_scale

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        outputs = self._inside(model, lambda m, batch: retrieval_loss(m, batch, self.logit_scale, generator), inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _evaluated(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        generator = torch.Generator(device=self.args.device).manual_seed(self.args.seed)
        return self.compute_loss(model, inputs, return_outputs=True, generator=generator)


def call_inside(wrapper: nn.Module, module: nn.Module, function: Callable[[dict[str, Any]], Any], batch: Any) -> Any:
    """`function(batch)` as module's forward for one call: a DDP or FSDP wrapper's hooks run, as for any forward."""
    wrapper = getattr(wrapper, "_orig_mod", wrapper)  # torch.compile is the outermost wrapper

    def forward(batch: dict[str, Any]) -> Any:
        stand_in.give_back()  # the function may call the module itself
        return function(batch)

    stand_in = StandIn(module, "forward", forward)
    try:
        return wrapper(batch)
    finally:
        stand_in.give_back()
