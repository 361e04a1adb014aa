"""Errors of means and of differences by the bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .retrieval import Ids, codes_of


@dataclass(frozen=True)
class BootstrapEstimate:
    """Mean, its standard error and 95 % interval, in the unit of the values."""

    mean: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """`mean(a) - mean(b)`, its standard error and 95 % interval, in the unit of the values."""

    difference: float
    standard_error: float
    low: float
    high: float


def bootstrap_error(
    values: Sequence[float] | np.ndarray | Tensor, groups: Ids | None = None, samples: int = 10_000, seed: int = 0
) -> BootstrapEstimate:
    """Percentile bootstrap of the mean over test items.

    Args:
        values: One value per item, `(n,)`.
        groups: One hashable per item. Items of a group (the images of a concept) are drawn together, which is right
            where they aren't independent: the mean of a draw is its items' sum over its items' number.
        samples: Draws with replacement.

    Raises:
        ValueError: Fewer than two items or groups, NaN, or sizes that disagree.
    """
    return BootstrapEstimate(*_bootstrap(values, groups, samples, seed))


def paired_bootstrap(
    a: Sequence[float] | np.ndarray | Tensor,
    b: Sequence[float] | np.ndarray | Tensor,
    groups: Ids | None = None,
    samples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Bootstrap of `mean(a) - mean(b)` where `a[i]` and `b[i]` are two models' values on the same item.

    The arguments are those of `bootstrap_error`. Exchanging a and b negates the difference and the interval.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a and b are not paired: shapes {a.shape} and {b.shape}.")
    return PairedDifference(*_bootstrap(a - b, groups, samples, seed))


def _bootstrap(values: Any, groups: Ids | None, samples: int, seed: int) -> tuple[float, float, float, float]:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"Values must be finite and of shape (items,), not {values.shape}.")
    if samples < 2:
        raise ValueError(f"samples={samples}: at least 2 are needed.")
    code, _ = codes_of(groups, groups, len(values), len(values))
    sums, sizes = np.bincount(code, values), np.bincount(code)
    if len(sizes) < 2:
        raise ValueError(f"A bootstrap needs at least 2 items (groups), not {len(sizes)}.")
    rng, means = np.random.default_rng(seed), []
    for start in range(0, samples, 500):  # times each group is drawn, 500 draws at a time to bound the memory
        drawn = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=min(500, samples - start))
        means.append((drawn @ sums) / (drawn @ sizes))
    mean = np.concatenate(means)
    low, high = np.percentile(mean, [2.5, 97.5])
    return float(values.mean()), float(mean.std(ddof=1)), float(low), float(high)
