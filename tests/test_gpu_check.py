"""The GPU check itself, where there is no GPU: it says so, and runs on a processor with tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from peft_multimodal.core.registry import METHODS


def test_without_a_gpu_it_is_skipped_visibly(monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    assert "skipped, nothing was checked" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


CHECKS = ("trains", "half", "checkpoints", "saves", "switches", "compiles", "graphs")


TITLES = sorted(method.title for method in METHODS.values())


@pytest.mark.parametrize("only", [TITLES[0], *(pytest.param(title, marks=pytest.mark.full) for title in TITLES[1:])])
def test_every_check_runs(only: str, tmp_path: Path, capsys):
    options = ["--device", "cpu", "--size", "tiny", "--rounds", "2", "--compiler", "eager", "--only", only]
    assert gpu_check.main([*options, "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    assert file.name == "cpu-no-gpu.json"
    found = json.loads(file.read_text())
    assert found["device"] == "cpu (no GPU)"
    table = capsys.readouterr().out
    assert any(only in methods for methods in found["bases"].values())
    for methods in found["bases"].values():
        assert gpu_check.LORA in methods
        for method, result in methods.items():
            assert [result[check] for check in CHECKS] == ["ok"] * 6 + ["no GPU"]
            assert result["cost"]["step_seconds"] > 0
            assert f"| {method} |" in table
        assert methods[gpu_check.LORA]["cost"]["relative_to_lora"]["median"] == 1.0


def test_a_failed_check_is_a_result_and_an_exit_code(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setattr(gpu_check.Checks, "run", lambda self: {"parameters": 1, "trains": self.outcome(lambda: 1 // 0)})
    options = ["--device", "cpu", "--size", "tiny", "--rounds", "1", "--only", "nothing", "--out", str(tmp_path)]
    assert gpu_check.main(options) == 1
    assert "failed: ZeroDivisionError" in capsys.readouterr().out
