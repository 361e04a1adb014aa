"""What is left of a general ability after adaptation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..core.modes import eval_mode


def retention(adapted: float, reference: float) -> float:
    """What is left of an ability after adaptation: `100 * adapted / reference` percent; forgetting is 100 minus it.

    Raises:
        ValueError: The reference isn't positive, so that there was nothing to retain.
    """
    if not reference > 0:
        raise ValueError(f"reference={reference}: retention needs a positive score before adaptation.")
    return 100 * adapted / reference


@dataclass(frozen=True)
class Forgetting:
    """A general score before and after adaptation, in its own unit.

    `forgotten` is before - on; `exact_off` says whether the model with its adapters off scores as before to the last
    bit, None where nothing can be switched off.
    """

    before: float
    on: float
    off: float | None

    @property
    def forgotten(self) -> float:
        return self.before - self.on

    @property
    def exact_off(self) -> bool | None:
        return None if self.off is None else self.off == self.before


def forgetting(model: Any, score: Callable[[Any], float], before: float) -> Forgetting:
    """What an adapted model has forgotten: its general score with adapters on and off, against that of the open model.

    Each module's train or eval mode is what it was before, also after an error.

    Args:
        model: In a `PeftModel`; or fully fine-tuned, which can't be switched off.
        score: The general ability of a model as one number, the more the better, such as
            `lambda m: retrieval_recall(**compute_embeddings(m, general, collator))["mean_recall"]`.
        before: What `score` gave for the model before it was adapted.
    """
    with eval_mode(model):
        on, off = float(score(model)), None
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                off = float(score(model))
    return Forgetting(float(before), on, off)
