"""The modes that a model is in while it is looked at, and the ones it had before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it the model is in eval mode; afterwards each module has the mode that it had, also after an error."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def unadapted(model: Any) -> Iterator[None]:
    """Within it the model is in eval mode without its adapters; afterwards every mode and `requires_grad` is as before."""
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with eval_mode(model), model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
            yield
    finally:
        for parameter, flag in trains.items():
            if parameter.requires_grad is not flag:  # switching adapters sets them anew
                parameter.requires_grad_(flag)
