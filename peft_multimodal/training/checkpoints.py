"""Which checkpoint of a `Trainer` to go on from, after a process was killed at any moment."""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

STATE = "trainer_state.json"
BATCHES = "batches.json"  # of the trainers of this package
BATCH = "per_device_train_batch_size"
_NUMBER = re.compile(r"checkpoint-(\d+)")
_RANK = re.compile(r"rng_state_(\d+)\.pth")
# One of each list: of transformers, of FSDP with whole and with sharded states, of DeepSpeed.
_PARTS = {
    "weights": (
        *("adapter_model.safetensors", "*/adapter_model.safetensors", "model*.safetensors"),
        *("pytorch_model_fsdp.bin", "pytorch_model_fsdp_*", "latest"),
    ),
    "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*", "latest"),
    "scheduler": ("scheduler.pt", "latest"),
    "random numbers": ("rng_state.pth", "rng_state_*.pth"),
}
_ZIPPED = (".pt", ".pth", ".bin")  # what torch.save writes: a zip, whose directory is its end


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest complete checkpoint in a `Trainer`'s output folder; None where there is none, so training starts at
    step 0.

    A save that was killed leaves a folder that lacks files, or has the beginning of one. It is passed over with a
    warning that says what is wrong. Processes that share a file system find the same checkpoint.

    Give each run an output folder of its own. In an old run's folder, a run that was killed while it saved may have
    left its files among those of a finished checkpoint, and this function can't tell. The trainers of this package
    are safe.

    Args:
        output_dir: The folder that `TrainingArguments` names.

    Examples:
        >>> from transformers import Trainer, TrainingArguments
        >>> args = TrainingArguments("resumable", learning_rate=1e-3, remove_unused_columns=False, label_names=[])
        >>> trainer = Trainer(model, args, train_dataset=dataset, data_collator=collator)
        >>> trainer.train(resume_from_checkpoint=last_checkpoint("resumable"))
    """
    folder = Path(output_dir)
    checkpoints = {int(m[1]): p for p in folder.glob("checkpoint-*") if (m := _NUMBER.fullmatch(p.name)) and p.is_dir()}
    for step in sorted(checkpoints, reverse=True):
        fault = fault_of(checkpoints[step])
        if fault is None:
            return str(checkpoints[step])
        warnings.warn(f"{checkpoints[step]} is passed over: {fault}.", stacklevel=2)
    return None


def fault_of(checkpoint: Path) -> str | None:
    """What keeps training from going on exactly from this checkpoint; None where nothing does.

    Headers and ends of the files are read, not what stands between them.
    """
    state = checkpoint / STATE
    if not state.is_file():
        return f"it has no {STATE}, which is written last: its save was interrupted"
    for file in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        if not _is_whole(file):
            return f"{file.relative_to(checkpoint)} is cut off or damaged"
    written = _read(state)
    if not isinstance(written, dict):
        return f"{STATE} is cut off or damaged"
    step = written.get("global_step")
    if (match := _NUMBER.fullmatch(checkpoint.name)) and step != int(match[1]):
        return f"its {STATE} is of step {step}"
    for part, names in _PARTS.items():
        if not any(_is_there(path) for name in names for path in checkpoint.glob(name)):
            return f"it has no {part}: it was saved with save_only_model=True, or its save was interrupted"
    ranks = sorted(int(m[1]) for p in checkpoint.glob("rng_state_*.pth") if (m := _RANK.fullmatch(p.name)))
    if ranks and (len(ranks) == 1 or ranks != list(range(len(ranks)))):
        return f"of several processes only {ranks} saved their random numbers"
    return None


def to_resume(asked: Any, output_dir: str | os.PathLike | None) -> Any:
    """`resume_from_checkpoint` with True resolved to the newest complete checkpoint; ValueError where there is none."""
    if asked is not True:
        return asked
    newest = last_checkpoint(output_dir or ".")
    if newest is None:
        raise ValueError(
            f"{output_dir} has no complete checkpoint to resume from: train() without it starts at step 0."
        )
    return newest


def batches_of(checkpoint: Path) -> dict[str, int]:
    """The batches that a checkpoint was trained with, as `AdapterTrainer` has them; what isn't known is left out."""
    written = _read(checkpoint / BATCHES) if (checkpoint / BATCHES).is_file() else None
    if isinstance(written, dict):
        return {name: value for name, value in written.items() if isinstance(value, int)}
    state = _read(checkpoint / STATE) if (checkpoint / STATE).is_file() else None
    size = state.get("train_batch_size") if isinstance(state, dict) else None
    return {BATCH: size} if isinstance(size, int) else {}


def rows_of_a_step(batches: dict[str, int]) -> int:
    """Of all processes together; with split_batches they share a batch out."""
    return batches[BATCH] * (1 if batches.get("split_batches") else batches["processes"])


def goes_on_exactly(then: dict[str, int], now: dict[str, int], draws: int | None, joint_loss: bool) -> bool:
    """Whether every step still to come sees the rows, and has the loss, that it would have had.

    Args:
        then, now: The batches of a checkpoint and of the run that goes on from it.
        draws: Rows of an epoch; None of a data set that streams.
        joint_loss: Whether the loss is one of all processes' rows.
    """
    rows = [rows_of_a_step(batches) for batches in (then, now)]
    whole = draws is not None and draws % rows[0] == 0  # every batch is full
    dropped = bool(then["dataloader_drop_last"] and now["dataloader_drop_last"])
    if then["gradient_accumulation_steps"] != now["gradient_accumulation_steps"] or rows[0] != rows[1]:
        return False
    if then["processes"] != now["processes"]:  # several processes fill up a last batch
        return joint_loss and draws is not None and (whole or dropped)
    return whole or then["dataloader_drop_last"] == now["dataloader_drop_last"]


def _is_whole(file: Path) -> bool:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="np"):
                return True
        except (SafetensorError, OSError):
            return False
    if file.suffix == ".json":
        return _read(file) is not None
    return file.suffix not in _ZIPPED or zipfile.is_zipfile(file)


def _is_there(path: Path) -> bool:
    # torch's distributed checkpoints have .metadata once they are whole.
    return path.is_file() or (path / ".metadata").is_file()


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
