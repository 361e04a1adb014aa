"""How difficulties are measured, and what they do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HardSampling:
    """How difficulties are measured, and what they do; the equations stand in `hard_samples`.

    Args:
        difficulty: "prob", "margin" or "loss".
        momentum: mu; a pair without a base difficulty takes its first visit's.
        emphasis: e, "rank" or "power".
        alpha: Exponent of the sampling weights; 0 draws all pairs alike.
        eta: Share of the draws that goes by weight; the others are uniform, so that each pair is visited again.
        eps: Added to e.
        gamma: Exponent of the loss weights; 0 weighs all pairs alike.
        beta: Importance correction, 0 (none) to 1 (in expectation the loss of uniform sampling).
        queue_size: K; of a data set that is smaller, its size.
        margin, margin_width: m_0 and T of "margin", cosines.
        guard_share: Pairs among this share of the hardest, whose difficulty hasn't fallen by `guard_fall` from its base,
            are taken for mismatched: their e counts as the median's, and w is at most 1. 0 switches the guard off.
        guard_fall: See there.
        guard_visits: After how many visits at the earliest; with 0 the hardest are suspected from the start, until they
            fall, and shuffled captions are not learned before they are found.
    """

    difficulty: str = "prob"
    momentum: float = 0.9
    emphasis: str = "rank"
    alpha: float = 2.0
    eta: float = 0.8
    eps: float = 0.01
    gamma: float = 0.5
    beta: float = 0.0
    queue_size: int = 4096
    margin: float = 0.1
    margin_width: float = 0.05
    guard_share: float = 0.05
    guard_fall: float = 0.05
    guard_visits: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("difficulty", ("prob", "margin", "loss")), ("emphasis", ("rank", "power"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}")
        ranges: dict[str, tuple[float, float]] = {
            "momentum": (0, 1),
            "eta": (0, 1),
            "beta": (0, 1),
            "guard_share": (0, 1),
            "margin": (-2, 2),
        }
        ranges |= {"alpha": (0, 100), "gamma": (0, 100), "eps": (1e-6, 1), "margin_width": (1e-6, 100)}
        ranges |= {"guard_fall": (-1, 1), "guard_visits": (0, 1_000_000), "queue_size": (1, 10_000_000)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            kinds = (int,) if name in ("guard_visits", "queue_size") else (int, float)
            if type(value) not in kinds or not low <= value <= high:
                raise ValueError(f"{name} must be a number from {low} to {high}, got {value!r}")
