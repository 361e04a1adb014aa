"""Copies of collators that differ in a setting: for evaluation, or for callers that compute the loss themselves."""

from __future__ import annotations

import copy
from typing import Any


def evaluating(collator: Any, every_text: bool = False) -> Any:
    """A collator as evaluation uses it: of several texts in a row the first, or with every_text all of them.

    The result is the same in each call. A collator that has no such switch is given back as it is.
    """
    switch = getattr(collator, "evaluating", None)
    return collator if switch is None else switch(every_text=every_text)


def without_loss(collator: Any, model: Any = None) -> Any:
    """A collator for callers that compute the loss themselves: one that wasn't told the model puts no `return_loss`.

    Given the model, one of this package takes its limit and its padding from there.
    """
    switch = getattr(collator, "without_loss", None)
    if switch is not None:
        return switch(model)
    return changed(collator, return_loss=False) if getattr(collator, "return_loss", False) is None else collator


def changed(collator: Any, /, **values: Any) -> Any:
    changed = copy.copy(collator)
    vars(changed).update(values)
    return changed
