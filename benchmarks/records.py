"""Results on disk: one JSON file a run, written whole or not at all, with what is needed to judge and repeat it."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import peft_multimodal

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Record:
    """One run: an experiment with one seed."""

    task: str
    experiment: str
    label: str
    seed: int
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: dict[str, float]
    items: dict[str, Any]
    cost: dict[str, Any]

    def write(self, folder: Path = RESULTS) -> Path:
        path = record_path(self.task, self.experiment, self.seed, folder)
        write_atomically(path, compact(asdict(self)))
        return path


def record_path(task: str, experiment: str, seed: int, folder: Path = RESULTS) -> Path:
    return folder / task / f"{experiment.replace('/', '_')}_seed{seed}.json"


def read_records(task: str, folder: Path = RESULTS) -> list[Record]:
    """The task's results so far."""
    files = sorted((folder / task).glob("*_seed*.json"))
    return [Record(**json.loads(path.read_text("utf-8"))) for path in files]


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's content, None when there is no such file."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def environment() -> dict[str, Any]:
    """Versions and hardware, without the machine's name."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "peft_multimodal": peft_multimodal.__version__,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def write_atomically(path: Path, text: str) -> None:
    """Write aside and rename: a reader sees the old file or the new one, an interruption leaves no part of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


def compact(value: Any, depth: int = 0) -> str:
    """Indented JSON whose lists of numbers and strings stay on one line."""
    if isinstance(value, dict) and value:
        pad = "  " * (depth + 1)
        rows = [f"{pad}{json.dumps(key)}: {compact(item, depth + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(rows) + "\n" + "  " * depth + "}" + ("" if depth else "\n")
    return json.dumps(value, ensure_ascii=False, separators=(",", ": "))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()
