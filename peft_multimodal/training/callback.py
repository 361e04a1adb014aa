"""What an adapter needs from a `Trainer`, as a callback for any of them."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..core import companions
from ..core.checks import COMPANIONS
from ..core.companions import record_of
from ..core.registry import method_of
from ..core.switching import adapters_of
from .summary import summary
from .temperature import ScaleBounds


class AdapterCallback(TrainerCallback):
    """Gives the stock `Trainer` what the trainers of this package bring themselves.

    - `load_best_model_at_end=True` loads every adapter of the best checkpoint, whatever its name. `Trainer` alone looks
      for one adapter that is called "default", and otherwise keeps the last weights.
    - A warning says when training starts at a learning rate outside the range of the adapter's method. At `Trainer`'s
      default of 5e-5 most methods hardly learn.
    - `push_to_hub=True` pushes adapters of any name with each checkpoint, their companion files and their card.
    - A temperature that is trained stays within its family's bounds.
    - When training ends, the main process prints once what was trained, where it is saved, and the next command.

    Raises:
        ValueError: when training starts, if the stock Trainer's own loading of the best model would mix adapters up.

    Examples:
        >>> from transformers import Trainer, TrainingArguments
        >>> args = TrainingArguments("out", learning_rate=1e-3, remove_unused_columns=False, label_names=[])
        >>> callbacks = [AdapterCallback()]
        >>> Trainer(model, args, train_dataset=dataset, data_collator=collator, callbacks=callbacks).train()
    """

    stock = True  # whether the trainer is; one of this package loads no adapter into another
    saved: Path | None = None  # the last checkpoint of this training

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Raises ValueError where the stock Trainer's own loading of the best model would mix adapters up."""
        adapters = getattr(model, "peft_config", {})
        if (
            self.stock
            and args.load_best_model_at_end
            and "default" in adapters
            and model.active_adapters[0] != "default"
        ):
            raise ValueError(
                f"With load_best_model_at_end=True Trainer would load the adapter 'default' into {model.active_adapters[0]!r}, "
                "which is active. Give none of several adapters the name 'default'."
            )
        for config in adapters.values():
            record_of(config).best_is_loaded = True  # by this callback: there is nothing to warn of
        for message in rate_messages(model, kwargs.get("optimizer")):
            warnings.warn(message, stacklevel=2)
        self.bounds = ScaleBounds(model)
        self.saved = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bounds()

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # FSDP and DeepSpeed keep whole states, which `Trainer` finds.
        if args.load_best_model_at_end and state.best_model_checkpoint and not (args.fsdp or args.deepspeed):
            load_adapters(model, Path(state.best_model_checkpoint))
        if state.is_world_process_zero and not state.is_hyper_param_search:
            best = state.best_model_checkpoint if args.load_best_model_at_end else None
            print(summary(model, state, self.saved if best is None else Path(best)))

    def on_push_begin(
        self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """transformers pushes what lies in the root of a checkpoint, where PEFT keeps the adapter called "default" alone."""
        output, checkpoint = Path(str(args.output_dir)), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not state.is_world_process_zero or not (output / checkpoint).is_dir():
            return
        for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            if (output / checkpoint / file).is_file():
                shutil.copy(output / checkpoint / file, output)
        for folder in (output / checkpoint).iterdir():
            if folder.name in COMPANIONS or (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
                shutil.copytree(folder, output / folder.name, dirs_exist_ok=True)
        renew_card(model, args)


def renew_card(model: Any, args: TrainingArguments) -> None:
    """Write the adapters' card into a trainer's output folder, above what is there."""
    folder = Path(str(args.output_dir))
    model = getattr(model, "module", model)  # of a distributed wrapper
    if hasattr(model, "peft_config"):
        companions.renew_card(model, folder, args.hub_model_id or folder.name)


def load_adapters(model: Any, checkpoint: Path) -> list[str]:
    """Read all of a `PeftModel`'s adapters that a checkpoint has; their names.

    PEFT keeps the adapter "default" in the checkpoint's root, and each other one in a folder of its name.
    """
    loaded = []
    for name, config in getattr(model, "peft_config", {}).items():
        folder = checkpoint if name == "default" else checkpoint / name
        if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            model.load_adapter(str(folder), name, is_trainable=config.inference_mode is False)
            loaded.append(name)
    return loaded


def rate_messages(model: Any, optimizer: Any) -> list[str]:
    """A sentence for each active adapter whose learning rate is out of its method's range.

    Ranges are for optimizers of Adam's kind, whose steps don't depend on the gradients' size; others are passed over.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if "adam" not in type(optimizer).__name__.lower():
        return []
    messages = []
    for name, config in adapters_of(model):
        method = method_of(config)
        if method is None or method.model.learning_rates is None:
            continue
        low, high = method.model.learning_rates
        rate = _rate(model, name, optimizer)
        if rate and not low <= rate <= high:
            effect = "it will hardly learn" if rate < low else "training may be unstable"
            messages.append(
                f"The adapter {name!r} trains at a learning rate of {rate:g}: {effect}. "
                f"{method.title} takes {low:g} to {high:g}: set TrainingArguments(learning_rate=...)."
            )
    return messages


def _rate(model: nn.Module, adapter_name: str, optimizer: Any) -> float:
    """The largest rate of an adapter's parameters; 0 where none is trained."""
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    groups = [
        group
        for group in optimizer.param_groups
        if any(adapter_name in names.get(id(p), "").split(".") for p in group["params"])
    ]
    return max((float(group.get("initial_lr", group["lr"])) for group in groups), default=0.0)
