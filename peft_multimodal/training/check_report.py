"""What a check of a training says: a row for each tower and adapter, what is wrong, and the ways out."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from ..core.anatomy import table
from ..core.finding import Finding

BEHIND_ZERO = "behind a zero start"

_WAYS_OUT = {
    "adapters are switched off": "model.enable_adapter_layers().",
    "merged into the weights": "model.unmerge_adapter() before training.",
    "not active": "model.set_adapter(name), or set_requires_grad(name, False) if it shall rest.",
    "scaled by 0": "Give the config an alpha above 0.",
    "no image in the batch": "Check the collator: a batch needs pixel_values for a vision tower to train.",
    "vision_feature_layer reads an earlier layer": "Leave these layers out of target_modules; they cost memory alone.",
    "frozen by gradient checkpointing": 'Use gradient_checkpointing_kwargs={"use_reentrant": False}.',
    "trains in eval mode alone": "Something is switched off by model.train(), such as a layer's drop rate of 1.",
    "the loss doesn't reach it": "What the module gives doesn't enter the loss: leave it out of the adapter, or check the loss.",
}


@dataclass
class Row:
    """What one adapter, or what is trained whole, has in one tower.

    Args:
        tower: Its name; "shared" for what all towers use.
        adapter: Its name; "modules_to_save", or "the base's own".
        norm: Of its gradients.
        why: {reason: tensors} of those without a gradient.
    """

    tower: str
    adapter: str
    tensors: int = 0
    parameters: int = 0
    norm: float = 0.0
    why: Counter[str] = field(default_factory=Counter)
    dtypes: set[str] = field(default_factory=set)
    devices: set[str] = field(default_factory=set)

    @property
    def zero_share(self) -> float:
        """The share of its tensors whose gradient is exactly zero."""
        return sum(self.why.values()) / self.tensors if self.tensors else 0.0


def _cells(row: Row) -> tuple[Any, ...]:
    where = " ".join(sorted(row.dtypes)), " ".join(sorted(row.devices))
    why = ", ".join(f"{reason} ({count})" for reason, count in row.why.items())
    size = row.tensors, f"{row.parameters:,}"
    return row.tower, row.adapter, *size, f"{row.norm:.2e}", f"{row.zero_share:.0%}", *where, why


@dataclass
class TrainingReport:
    """What `check_training` found; `print` it. `healthy` says whether there is no problem.

    Args:
        loss: Of the batch; None where there was none.
        moves: How far a small step moves the output at most; None where no step could be taken.
    """

    loss: float | None = None
    moves: float | None = None
    rows: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return not any(finding.level == "problem" for finding in self.findings)

    def __str__(self) -> str:
        header = ("tower", "adapter", "tensors", "parameters", "gradient", "zero", "dtype", "device", "why zero")
        cells = [_cells(row) for row in self.rows]
        seen = "" if self.loss is None else f"\nloss {self.loss:.4g}"
        if self.moves is not None:
            seen += f"; a small step moves the output by {self.moves:.2e}"
        faults = [f"{f.level.upper()}: {f.what}" + (f"\n  {f.way_out}" if f.way_out else "") for f in self.findings]
        return "\n\n".join([table(header, cells) + seen, *faults, "healthy" if self.healthy else "not healthy"])

    __repr__ = __str__

    def as_dict(self) -> dict[str, Any]:
        rows = [
            {**vars(r), "why": dict(r.why), "dtypes": sorted(r.dtypes), "devices": sorted(r.devices)} for r in self.rows
        ]
        findings = [asdict(finding) for finding in self.findings]
        return {**vars(self), "rows": rows, "findings": findings, "healthy": self.healthy}

    def problem(self, what: str, way_out: str = "") -> None:
        self.findings.append(Finding("problem", what, way_out))

    def warning(self, what: str, way_out: str = "") -> None:
        self.findings.append(Finding("warning", what, way_out))


def tell(report: TrainingReport) -> None:
    """A problem for each row and reason, but for what lies behind a zero start."""
    for row in report.rows:
        for reason, count in row.why.items():
            if reason == BEHIND_ZERO:
                continue
            part = "No" if count == row.tensors else f"{count} of {row.tensors}"
            tensors = "tensor of" if part == "No" else "tensors of"
            has = "has a gradient" if part == "No" else "have no gradient"
            report.problem(f"{part} {tensors} {row.adapter!r} in the {row.tower} {has}: {reason}.", _WAYS_OUT[reason])
