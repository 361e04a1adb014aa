"""What is printed once when training ends: what trained, how much, where it is saved, the next command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from families import FAMILIES
from methods import adapter, wrap
from peft import get_peft_model
from test_hard_samples import Pairs
from test_trainer import arguments

from peft_multimodal import (
    AdapterCallback,
    AuroraModeApproxConfig,
    ContrastiveTrainer,
    TowerPolicy,
    UniAdapterConfig,
)
from peft_multimodal.__main__ import main


def trained(folder: Path, model: Any = None, trainer: type[hf.Trainer] = ContrastiveTrainer, **options: Any) -> Any:
    """Two steps; the model."""
    model = wrap(FAMILIES["clip"], "aurora_mode_approx", stirred=False) if model is None else model
    data = Pairs(8)
    stock = {} if trainer is ContrastiveTrainer else {"data_collator": with_loss, "callbacks": [AdapterCallback()]}
    args = arguments(
        folder, **{"max_steps": 2, "logging_steps": 2, "learning_rate": 1e-3, "label_names": [], **options}
    )
    trainer(model, args, train_dataset=data, eval_dataset=data, **stock).train()
    return model


def with_loss(rows: list[dict[str, Any]]) -> dict[str, Any]:
    batch = hf.default_data_collator([{name: row[name] for name in row if name != "id"} for row in rows])
    return {**batch, "return_loss": True}


@pytest.mark.parametrize("trainer", [hf.Trainer, ContrastiveTrainer])
def test_the_next_command_runs(trainer: type[hf.Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    FAMILIES["clip"].build().save_pretrained(tmp_path / "base")
    base = hf.CLIPModel.from_pretrained(tmp_path / "base")
    model = wrap(FAMILIES["clip"], "aurora_mode_approx", stirred=False, base=base, adapter_name="mine")
    trained(tmp_path / "run", model, trainer, save_strategy="steps", save_steps=1)
    printed = capsys.readouterr().out
    size, total = (sum(p.numel() for p in found) for found in (adapter(model, "mine").values(), model.parameters()))
    assert f"Trained the adapter 'mine' (AuroraModeApprox): {size:,} of {total:,} parameters" in printed
    assert re.search(r"^2 steps, 0\.5 epochs, \d+ seconds, mean loss \d", printed, re.MULTILINE)
    folder = tmp_path / "run/checkpoint-2/mine"
    assert f"Saved in {folder}. Next: python -m peft_multimodal doctor" in printed
    assert printed.count("Trained the adapter") == 1
    assert main(shlex.split(printed.split("Next: ")[1])[3:]) == 0
    assert "every weight has its place" in capsys.readouterr().out


def test_of_several_checkpoints_the_best_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trained(tmp_path, **steps, **best, learning_rate=5e-3)  # so that the loss falls: the first is "the best"
    assert f"Saved in {tmp_path / 'checkpoint-1'}." in capsys.readouterr().out


def test_what_isn_t_saved_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "checkpoint-2").mkdir()  # of an older run
    trained(tmp_path)
    assert capsys.readouterr().out.rstrip().endswith('Not saved yet. Next: model.save_pretrained("my-adapter")')


def test_a_model_without_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = trained(tmp_path, FAMILIES["clip"].build())
    printed = capsys.readouterr().out
    assert f"Trained {sum(p.numel() for p in model.parameters()):,} parameters of CLIPModel." in printed
    assert printed.rstrip().endswith('Not saved yet. Next: trainer.save_model("my-model")')


def test_a_policy_has_a_line_for_each_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    policy = TowerPolicy(vision=AuroraModeApproxConfig(r=2), text=UniAdapterConfig())
    model = get_peft_model(FAMILIES["clip"].build(), policy)
    AdapterCallback().on_train_end(arguments(tmp_path), hf.TrainerState(), None, model=model)
    printed = capsys.readouterr().out
    sizes = [int(size.replace(",", "")) for size in re.findall(r"^Trained the adapter .*: ([\d,]+) of", printed, re.M)]
    assert len(sizes) == 2
    assert sum(sizes) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "(AuroraModeApprox)" in printed
    assert "(UniAdapter)" in printed


def test_other_processes_and_searches_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = wrap(FAMILIES["clip"], "aurora_mode_approx")
    for silent in ({"is_world_process_zero": False}, {"is_hyper_param_search": True}):
        AdapterCallback().on_train_end(arguments(tmp_path), hf.TrainerState(**silent), None, model=model)
        assert capsys.readouterr().out == ""
    AdapterCallback().on_train_end(arguments(tmp_path), hf.TrainerState(), None, model=model)
    assert "Trained the adapter 'default'" in capsys.readouterr().out
