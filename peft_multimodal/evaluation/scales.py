"""What a model knows of the new and of the old, at several scales of its adapter."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..core.anatomy import table
from ..core.modes import eval_mode
from ..core.scaling import adapter_scale

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class ScaleCurve:
    """The metrics at each scale; `print` it, or `plot` it.

    Args:
        points: {scale: {metric: value}}.
    """

    points: dict[float, dict[str, float]]

    def best(self, metric: str) -> float:
        """The scale at which a metric is highest.

        Raises:
            ValueError: there is no such metric; the message lists those that there are.
        """
        names = list(next(iter(self.points.values())))
        if metric not in names:
            raise ValueError(f"There is no metric {metric!r}; there are {names}.")
        return max(self.points, key=lambda a: self.points[a][metric])

    def __str__(self) -> str:
        names = list(next(iter(self.points.values())))
        return table(("scale", *names), [(f"{a:g}", *(f"{m[n]:.4g}" for n in names)) for a, m in self.points.items()])

    __repr__ = __str__

    def plot(self, file: str | os.PathLike) -> Path:
        """Draw each metric over the scale, as SVG, PNG or PDF by the file's ending."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes: Any = figure.subplots()
        for name in next(iter(self.points.values())):
            axes.plot(list(self.points), [metrics[name] for metrics in self.points.values()], marker="o", label=name)
        axes.set_xlabel("scale of the adapter (0: the base, 1: as trained)")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file)
        return Path(file)


def scale_curve(
    model: nn.Module, evaluate: Callable[[Any], Mapping[str, float]], scales: Sequence[float] = SCALES
) -> ScaleCurve:
    """Evaluate a model at several scales of its active adapters (WiSE-FT, Wortsman et al. 2022); it is left as it was.

    Choose the scale on validation data, then keep it: `adapter_scale(model, curve.best("new"))`.

    Args:
        model: A `PeftModel` that [`adapter_scale`] takes.
        evaluate: `model -> {metric: value}`, called in eval mode; metrics of the new task and of what the base knew.
        scales: Of them 0 is the base and 1 the adapter as trained.

    Examples:
        >>> from peft_multimodal.evaluation import compute_embeddings, retrieval_recall
        >>> curve = scale_curve(model, lambda m: retrieval_recall(**compute_embeddings(m, dataset, collator), ks=(1,)))
        >>> print(curve)
    """
    points = {}
    for a in scales:
        with adapter_scale(model, a), eval_mode(model):
            points[float(a)] = {name: float(value) for name, value in evaluate(model).items()}
    if not points:
        raise ValueError("scales is empty.")
    return ScaleCurve(points)
