"""Learning rates of their own: for what is trained as a whole, for towers, and for the tensors of a method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES
from methods import METHODS, home, wrap
from peft import LoraConfig, PeftModel, get_peft_model
from test_contract import Rows
from test_hard_samples import Pairs

from peft_multimodal import AuroraModeApproxConfig, ContrastiveTrainer, parameter_groups

CLIP = FAMILIES["clip"]


def rates(model: Any, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """{name of a parameter: its learning rate and weight decay}."""
    of = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def lora() -> PeftModel:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["visual_projection"])
    return get_peft_model(CLIP.build(), config)


@pytest.mark.parametrize("method", METHODS)
def test_every_trained_parameter_is_in_one_group(method: str) -> None:
    model = wrap(home(method), method)
    groups = parameter_groups(model, 1e-3, weight_decay=0.1)
    inside = [id(p) for group in groups for p in group["params"]]
    assert sorted(inside) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {group["lr"] for group in groups} == {1e-3}
    stock = hf.Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    assert all((decay > 0) == (name in stock) for name, (_, decay) in rates(model, groups).items())


def test_saved_modules_towers_and_roles_have_rates_of_their_own() -> None:
    model = lora()
    found = rates(
        model,
        parameter_groups(model, 1e-3, saved_modules_lr=1e-4, tower_lr={"text": 5e-4}, role_lr={"lora_B": 1e-2}),
    )
    assert {rate for name, (rate, _) in found.items() if "modules_to_save" in name} == {1e-4}
    assert {rate for name, (rate, _) in found.items() if "lora_B" in name} == {1e-2}
    assert {rate for name, (rate, _) in found.items() if "lora_A" in name and "text_model" in name} == {5e-4}
    assert {rate for name, (rate, _) in found.items() if "lora_A" in name and "vision_model" in name} == {1e-3}


def test_roles_of_a_method_go_by_its_own_names() -> None:
    model = get_peft_model(CLIP.build(), AuroraModeApproxConfig(r=4))
    found = rates(model, parameter_groups(model, 3e-3, role_lr={"P": 1e-2, "lambda": 2e-2}))
    assert {rate for name, (rate, _) in found.items() if "_P_norm" in name} == {1e-2}
    assert {rate for name, (rate, _) in found.items() if "lambda" in name} == {2e-2}
    assert {rate for name, (rate, _) in found.items() if "_U." in name or "_V." in name} == {3e-3}


@pytest.mark.parametrize(("argument", "there"), [("tower_lr", "'text', 'vision'"), ("role_lr", "'lora_A', 'lora_B'")])
def test_a_misspelt_name_is_an_error_that_lists_what_there_is(argument: str, there: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} names .'visoin'.*{there}"):
        parameter_groups(lora(), 1e-3, **{argument: {"visoin": 1e-4}})


def test_a_wrapped_model_has_the_same_groups() -> None:
    model = lora()
    options: dict[str, Any] = {"saved_modules_lr": 1e-4, "tower_lr": {"text": 5e-4}, "role_lr": {"lora_B": 1e-2}}
    expected = rates(model, parameter_groups(model, 1e-3, **options))
    compiled = torch.compile(model, backend="eager")
    distributed = torch.nn.DataParallel(model)  # holds the model as DDP does: `module.`
    for outer in (compiled, distributed):
        groups = parameter_groups(outer, 1e-3, **options)
        assert rates(model, groups) == expected


def test_a_frozen_adapter_has_no_groups() -> None:
    model = lora().requires_grad_(False)
    with pytest.raises(ValueError, match="No parameter of the model trains"):
        parameter_groups(model, 1e-3)


def arguments(folder: Path, **options: Any) -> hf.TrainingArguments:
    fixed: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none"}
    quiet = {
        "save_strategy": "no",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }
    return hf.TrainingArguments(str(folder), **{**fixed, **quiet, **options})


def test_the_stock_trainer_takes_them_by_optimizers(tmp_path: Path) -> None:
    model = lora()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    groups = parameter_groups(model, 0.0, saved_modules_lr=0.0, role_lr={"lora_B": 1e-2})
    rows = Rows(CLIP, model)
    optimizer = torch.optim.AdamW(groups)
    hf.Trainer(model, arguments(tmp_path), rows.collate, train_dataset=rows, optimizers=(optimizer, None)).train()
    moved = {name for name, p in model.named_parameters() if name in before and not p.equal(before[name])}
    assert moved
    assert all("lora_B" in name for name in moved)


def test_our_trainers_take_them_with_model_init_too(tmp_path: Path) -> None:
    data = Pairs(4)
    trainer = ContrastiveTrainer(
        model_init=lora,
        args=arguments(tmp_path, learning_rate=1e-3, optim="adamw_torch"),
        train_dataset=data,
        saved_modules_lr=1e-4,
        role_lr={"lora_B": 1e-2},
    )
    trainer.train()
    optimizer: Any = trainer.optimizer
    found = rates(trainer.model, optimizer.param_groups)
    assert {rate for name, (rate, _) in found.items() if "modules_to_save" in name} == {1e-4}
    assert {rate for name, (rate, _) in found.items() if "lora_B" in name} == {1e-2}
    assert {rate for name, (rate, _) in found.items() if "lora_A" in name} == {1e-3}


def test_another_training_by_model_init_has_groups_of_its_own_model(tmp_path: Path) -> None:
    trainer = ContrastiveTrainer(
        model_init=lora, args=arguments(tmp_path, learning_rate=1e-3), train_dataset=Pairs(4), saved_modules_lr=1e-4
    )
    for rate in (1e-3, 2e-3):
        trainer.args.learning_rate = rate
        trainer.train()
        optimizer: Any = trainer.optimizer
        found = rates(trainer.model, optimizer.param_groups)
        assert {r for name, (r, _) in found.items() if "modules_to_save" in name} == {1e-4}
        assert {r for name, (r, _) in found.items() if "lora_" in name} == {rate}
        assert trainer.optimizer_cls_and_kwargs is None


def test_an_optimizer_that_chooses_its_parameters_is_refused(tmp_path: Path) -> None:
    trainer = ContrastiveTrainer(lora(), arguments(tmp_path), train_dataset=Pairs(4), saved_modules_lr=1e-4)
    trainer.optimizer_cls_and_kwargs = (torch.optim.AdamW, {"params": []})  # as GaLore's is
    with pytest.raises(ValueError, match="chooses its parameters itself"):
        trainer.create_optimizer()
