"""Trainer integration of losses that a model's own forward doesn't compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data import FiniteBatches
from .checkpoints import STATE, to_resume
from .losses import LOGIT_SCALE, retrieval_loss


class AdapterTrainer(Trainer):
    """What the trainers of the package have in common: their own loss, adapters of any name, no NaN in their data,
    and exact restarts after a kill."""

    loss_is_scaled_for_ga = False  # a mean over its own batch

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.data_collator = FiniteBatches(self.data_collator, getattr(self.data_collator, "id_column", None) or "id")
        if self.args.n_gpu > 1:
            raise ValueError("DataParallel isn't supported: start one process a GPU with `accelerate launch`.")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`; True resumes from the newest checkpoint that is complete (see `last_checkpoint`)."""
        return super().train(to_resume(resume_from_checkpoint, self.args.output_dir), *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            (folder / STATE).unlink(missing_ok=True)  # an older run's would vouch for a save that is killed
            self._save_beside(folder)
        super()._save_checkpoint(model, trial)

    def _save_beside(self, folder: Path) -> None:
        """Write into a checkpoint what transformers knows nothing of, before transformers makes it complete."""

    def _load_best_model(self) -> None:
        # transformers looks for an adapter in the checkpoint's root, where PEFT keeps that which is called "default".
        model: Any = self.accelerator.unwrap_model(self.model)
        named = [name for name in getattr(model, "peft_config", {}) if name != "default"]
        best = Path(self.state.best_model_checkpoint or "")
        for name in named:
            if (best / name / SAFETENSORS_WEIGHTS_NAME).is_file():
                model.load_adapter(str(best / name), name, is_trainable=model.peft_config[name].inference_mode is False)
        if (best / SAFETENSORS_WEIGHTS_NAME).is_file() or not named:
            super()._load_best_model()


class ImageTextRetrievalTrainer(AdapterTrainer):
    """`transformers.Trainer` whose loss is `retrieval_loss`: ITC + ITM, for models like `BlipForImageTextRetrieval`.

    Use it with `ImageTextCollator` and `TrainingArguments(remove_unused_columns=False)`. Evaluation gives eval_loss
    with negatives drawn from `args.seed`, thus the same each time; recall is for `peft_multimodal.evaluation`.
    Gradient accumulation, mixed precision and DDP work as ever; `torch_compile` doesn't reach this loss.

    Args:
        logit_scale: 1 / temperature of ITC and of the hard negatives.
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
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        # accelerate's mixed precision lives in the forward that is replaced here.
        with self.accelerator.autocast():
            outputs = call_inside(
                model, module, lambda batch: retrieval_loss(module, batch, self.logit_scale, generator), inputs
            )
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        generator = torch.Generator(device=self.args.device).manual_seed(self.args.seed)
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs), generator=generator)
        return loss.detach(), None, None  # type: ignore[union-attr]


def call_inside(wrapper: nn.Module, module: nn.Module, function: Callable[[dict[str, Any]], Any], batch: Any) -> Any:
    """`function(batch)` as module's forward for one call: a DDP or FSDP wrapper's hooks run, as for any forward."""
    wrapper = getattr(wrapper, "_orig_mod", wrapper)  # torch.compile is the outermost wrapper
    own = vars(module).get("forward")  # accelerate's mixed precision, or an adapter's

    def restore() -> None:
        vars(module).pop("forward", None)
        if own is not None:
            module.forward = own

    def forward(batch: dict[str, Any]) -> Any:
        restore()  # the function may call the module itself
        return function(batch)

    module.forward = forward
    try:
        return wrapper(batch)
    finally:
        restore()
