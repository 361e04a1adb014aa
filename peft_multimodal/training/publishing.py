"""Adapters on the Hub while they train: `TrainingArguments(push_to_hub=True)`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..core import companions
from ..core.checks import COMPANIONS


class PushAdapters(TrainerCallback):
    """Lets a `Trainer` push adapters of any name, their companion files and their card with each checkpoint.

    transformers pushes what lies in the root of a checkpoint, where PEFT keeps the adapter called "default" alone. This is
    a part of `AdapterCallback`.
    """

    def on_push_begin(
        self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
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
