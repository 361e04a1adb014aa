"""The two numbers between cosines and a contrastive loss: the scale (1 / temperature) and the sigmoid loss's bias."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.anatomy import base_model
from .losses import LOGIT_SCALE

# "Clipped to prevent scaling the logits by more than 100" (CLIP, Radford et al. 2021).
LARGEST = 100.0


def logit_scale(model: Any) -> Tensor:
    """1 / temperature of a model: its own, or that of BLIP and CLIP at their start."""
    base = base_model(model)
    log_scale, temperature = (getattr(base, name, None) for name in ("logit_scale", "temperature"))
    if isinstance(log_scale, Tensor):
        low, high = _own_bounds(base)
        log_scale = _whole(log_scale).float()
        return (log_scale if high is None else log_scale.clamp(low, high)).exp()
    if isinstance(temperature, Tensor):  # ALIGN, TIPSv2
        return 1 / _whole(temperature).float()
    return torch.tensor(LOGIT_SCALE, device=next(base.parameters()).device)


def logit_bias(model: Any) -> Tensor | None:
    """The bias of a model that was trained by the sigmoid loss (SigLIP); None where there is none."""
    bias = getattr(base_model(model), "logit_bias", None)
    return _whole(bias).float() if isinstance(bias, Tensor) else None


class ScaleBounds:
    """Keeps a scale that is trained within its family's bounds: call it after each step of the optimizer.

    A model that knows its bounds is asked. CLIP and its like are held at 100, as their authors did, or at the value with
    which training starts if that is larger. A model of the sigmoid loss has no bound.
    """

    def __init__(self, model: nn.Module) -> None:
        self.scales: list[tuple[nn.Parameter, float, float]] = []
        for parameter, low, high in _trained_scales(model):
            start = float(_whole(parameter.detach()))
            self.scales.append((parameter, min(low, start), max(high, start)))

    @torch.no_grad()
    def __call__(self) -> None:
        for parameter, low, high in self.scales:
            parameter.clamp_(low, high)


def _trained_scales(model: nn.Module) -> Iterator[tuple[nn.Parameter, float, float]]:
    """Wherever they are: in the model itself, or in a copy that `modules_to_save` made of a part."""
    for module in model.modules():
        for name in ("logit_scale", "temperature"):
            parameter = module._parameters.get(name)
            if parameter is not None and parameter.requires_grad and parameter.numel() == 1:
                yield parameter, *(_log_bounds(module) if name == "logit_scale" else (1 / LARGEST, math.inf))


def _log_bounds(module: Any) -> tuple[float, float]:
    low, high = _own_bounds(module)
    if high is None and not isinstance(getattr(module, "logit_bias", None), Tensor):
        high = math.log(LARGEST)
    return -math.inf if low is None else low, math.inf if high is None else high


def _own_bounds(module: Any) -> tuple[float | None, float | None]:
    """What a model says of its log scale: as an attribute (AIMv2), or as constants beside its class (FLAVA)."""
    if hasattr(module, "max_log_logit_scale"):
        return 0.0, float(module.max_log_logit_scale)
    beside = sys.modules.get(type(module).__module__)
    return getattr(beside, "LOGIT_SCALE_CLAMP_MIN", None), getattr(beside, "LOGIT_SCALE_CLAMP_MAX", None)


def _whole(parameter: Any) -> Tensor:
    """A scalar's value: under FSDP2, which wants it to have a dimension, a process has a part of it."""
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).squeeze()
