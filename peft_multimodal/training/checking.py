"""The check of a training's first steps, and what each tower's gradients are from then on, as a callback."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from .check import Look, norm_of
from .check_report import TrainingReport, tell

_FIRST = 3  # steps after which what lies behind a zero start has a gradient


class CheckTraining(TrainerCallback):
    """Says at the start of a training what doesn't train, and logs the norm of each tower's gradients.

    It looks at the gradients that the trainer itself has made, so it serves any loss, and takes no pass of its own. What has
    no gradient at the first step is looked at again at the third: until then it may lie behind a tensor that starts at
    zero. The norms are `grad_norm/<tower>` beside `grad_norm`, before clipping; no number is read off the device between two
    logs. For what a batch can tell in advance call [`check_training`].

    Args:
        strict: Raise where something doesn't train, instead of warning.

    Examples:
        >>> from transformers import Trainer, TrainingArguments
        >>> args = TrainingArguments("out", learning_rate=1e-3, remove_unused_columns=False, label_names=[])
        >>> callbacks = [CheckTraining()]
        >>> Trainer(model, args, train_dataset=dataset, data_collator=collator, callbacks=callbacks).train()
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self._norms: dict[str, Tensor] = {}
        self._look: Look | None = None
        self._handles: list[Any] = []
        self._dead: set[str] = set()
        self._steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._look = look = Look(model)
        self._steps, self._norms, self._dead = 0, {}, set(look.trained)
        look.saw_images = not look.readers
        self._handles = [r.register_forward_hook(lambda *_: setattr(look, "saw_images", True)) for r in look.readers]
        report = TrainingReport()
        look.check_placement(report)
        look.check_frozen(report)
        self._say(report)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        look = self._look
        if look is None:
            return
        self._steps += 1
        if self._steps <= _FIRST:
            self._first(look)
        if (state.global_step + 1) % max(int(state.logging_steps), 1) == 0 or self._steps == 1:
            gradients: dict[str, list[Tensor]] = defaultdict(list)
            for name, parameter in look.trained.items():
                if parameter.grad is not None:
                    gradients[look.row(name)[0]].append(parameter.grad)
            self._norms = {tower: norm_of(found) for tower, found in gradients.items()}

    def _first(self, look: Look) -> None:
        """What has had no gradient so far; at the third step of these, or where the reason is plain, it is said."""
        here = look.trained
        if all(here[name].grad is None for name in here):  # DeepSpeed keeps them elsewhere
            self._dead = set()
        self._dead = {n for n in self._dead if here[n].grad is None or not bool(here[n].grad.any())}  # type: ignore[union-attr]
        why = {name: reason for name in self._dead if (reason := look.why(name))}
        if self._steps == _FIRST:
            why |= {name: "the loss doesn't reach it" for name in self._dead if name not in why}
        self._dead -= why.keys()
        report = TrainingReport(rows=look.rows(why) if why else [])
        tell(report)
        self._say(report)

    def _say(self, report: TrainingReport) -> None:
        for finding in report.findings:
            text = f"{finding.what} {finding.way_out}"
            if self.strict and finding.level == "problem":
                self._remove()
                raise ValueError(text)
            warnings.warn(text, stacklevel=2)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not self._norms or not logs or "grad_norm" not in logs:
            return
        norms = {tower: float(norm) for tower, norm in self._norms.items()}
        whole = sum(norm**2 for norm in norms.values()) ** 0.5
        unclipped = float(logs["grad_norm"]) / whole if whole else 1.0
        found = {f"grad_norm/{tower}": norm * unclipped for tower, norm in norms.items()}
        logs.update(found)
        state.log_history[-1].update(found)
        self._norms = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
