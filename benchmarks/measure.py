"""Training by `transformers.Trainer`, and what it costs: parameters, seconds, memory, bytes on disk."""

from __future__ import annotations

import math
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_multimodal import parameter_groups

from .experiment import Experiment


def prepare(model: nn.Module, experiment: Experiment) -> nn.Module:
    """The base model with the experiment's adapter, or with the parameters thawed that it trains."""
    model.requires_grad_(False)
    if (config := experiment.peft_config()) is not None:
        return get_peft_model(model, config)
    if experiment.trainable is not None:
        thawed = [p for name, p in model.named_parameters() if re.fullmatch(experiment.trainable, name)]
        if not thawed:
            raise ValueError(f"{experiment.name}: no parameter matches {experiment.trainable!r}.")
        for parameter in thawed:
            parameter.requires_grad_(True)
    return model


def fit(
    model: nn.Module,
    dataset: Any,
    collator: Any,
    training: Mapping[str, Any],
    seed: int,
    trainer: type[Trainer] = Trainer,
    rates: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Train with `Trainer` on the CPU and say what it took.

    Args:
        training: `TrainingArguments`; they win over those set here.
        trainer: `Trainer` or a subclass.
        rates: Learning rates of their own, as `parameter_groups` takes them.
        kwargs: Further arguments of the trainer, such as `compute_loss_func` or `callbacks`.

    Returns:
        trainable_parameters, adapter_bytes, train_seconds, step_seconds and step_processor_seconds (medians; on a
        busy machine only the latter can be compared), peak_extra_bytes (resident memory at its highest during
        training, over that before) and the mean train_loss.
    """
    clock = StepClock()
    with tempfile.TemporaryDirectory() as scratch, PeakMemory() as memory:
        settings: dict[str, Any] = {
            "output_dir": scratch,
            "use_cpu": True,
            "seed": seed,
            "data_seed": seed,
            "remove_unused_columns": False,
            "label_names": [],
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": 10,
        }
        args = TrainingArguments(**(settings | dict(training)))
        if rates:
            groups = parameter_groups(model, args.learning_rate, args.weight_decay, **rates)
            kwargs["optimizers"] = torch.optim.AdamW(groups), None
        runner = trainer(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=collator,
            **kwargs | {"callbacks": [*kwargs.get("callbacks", []), clock]},
        )
        started = time.perf_counter()
        outcome = runner.train()
        seconds = time.perf_counter() - started
    if not math.isfinite(outcome.training_loss):
        raise FloatingPointError(f"The training loss is {outcome.training_loss}.")
    wall, processor = clock.medians()
    return footprint(model) | {
        "train_seconds": round(seconds, 2),
        "step_seconds": round(wall, 4),
        "step_processor_seconds": round(processor, 4),
        "peak_extra_bytes": memory.extra,
        "train_loss": outcome.training_loss,
    }


def footprint(model: nn.Module) -> dict[str, int]:
    """Number of trainable parameters, and bytes of the safetensors file that keeps them."""
    trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    size = 0
    if trained:
        with tempfile.TemporaryDirectory() as scratch:
            if isinstance(model, PeftModel):
                model.save_pretrained(scratch)
            else:
                save_file(trained, Path(scratch) / "model.safetensors")
            size = sum(path.stat().st_size for path in Path(scratch).rglob("*.safetensors"))
    return {"trainable_parameters": sum(p.numel() for p in trained.values()), "adapter_bytes": size}


class StepClock(TrainerCallback):
    """Seconds of each optimizer step, by the clock on the wall and of the processor; making its batch is left out."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.processor: list[float] = []
        self._started = (0.0, 0.0)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = (time.perf_counter(), time.process_time())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.wall.append(time.perf_counter() - self._started[0])
        self.processor.append(time.process_time() - self._started[1])

    def medians(self) -> tuple[float, float]:
        """Of the wall's seconds and of the processor's, all threads together."""
        return statistics.median(self.wall), statistics.median(self.processor)


class PeakMemory:
    """Highest resident memory of this process inside a `with` block, over that at its start, by sampling."""

    def __init__(self, interval: float = 0.02) -> None:
        self.interval = interval
        self.extra = 0
        self._process = psutil.Process()
        self._done = threading.Event()

    def __enter__(self) -> PeakMemory:
        self._before = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self.interval):
            self.extra = max(self.extra, self._process.memory_info().rss - self._before)
