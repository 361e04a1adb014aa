"""What a server would make of a LoRA: module by module, and in all."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from ..core.finding import Finding

MERGE = "Merge the adapter and serve the merged model: model.merge_and_unload().save_pretrained(folder)."
OR_MERGE = f"Or m{MERGE[1:]}"
LEAVE_OUT = (
    "Leave the tower out: in training by target_modules or towers=[...], afterwards by export_lora(drop=[...]). "
    + MERGE
)
OTHER_BASE = f"Name the base that it was trained on, or correct the keys. {OR_MERGE}"


@dataclass
class Module:
    """What a LoRA's file has for one module, and what the server makes of it.

    Args:
        name: Without PEFT's prefix.
        shapes: {"A": (rank, d_in), "B": (d_out, rank)}.
        verdict: "loaded", "conditional" (on how the server is started), "ignored" or "refused"; "unchecked" without a base
            that LoRA is served for.
        why, way_out: Of "conditional", "ignored" and "refused".
    """

    name: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    verdict: str = "unchecked"
    why: str = ""
    way_out: str = ""

    @property
    def rank(self) -> int | None:
        return self.shapes["A"][0] if len(self.shapes.get("A", ())) == 2 else None

    def judge(self, verdict: str, why: str, way_out: str = OTHER_BASE) -> None:
        if self.verdict in ("loaded", "conditional"):
            self.verdict, self.why, self.way_out = verdict, why, way_out


@dataclass
class ServingReport:
    """What a server would load, ignore or refuse; `print(report)` shows it.

    Args:
        server, source: Its name, and what its rules were read in.
        base: The base model's class.
        start: How the server is started with this adapter.
        modules: Those that the file names.
        findings: Problems (the server refuses the adapter, or answers otherwise than it was trained) and warnings.
    """

    server: str
    source: str
    base: str | None = None
    start: str = ""
    modules: list[Module] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return not any(finding.level == "problem" for finding in self.findings)

    def problem(self, what: str, way_out: str = MERGE) -> None:
        self.findings.append(Finding("problem", what, way_out))

    def warning(self, what: str, way_out: str = "") -> None:
        self.findings.append(Finding("warning", what, way_out))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "healthy": self.healthy}

    def __str__(self) -> str:
        counts = Counter(module.verdict for module in self.modules)
        parts = [f"server: {self.server}, by the rules of {self.source}"]
        if self.base:
            parts.append(f"base: {self.base} (whether the server has this class is not looked at)")
        if self.modules:
            parts.append("modules: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
        if self.start:
            parts.append(f"start with: {self.start}")
        parts += [f"{f.level.upper()}: {f.what}" + (f"\n  {f.way_out}" if f.way_out else "") for f in self.findings]
        return "\n\n".join([*parts, "it will be served" if self.healthy else "it won't be served as it was trained"])
