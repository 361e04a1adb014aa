"""One step that tells: eight planted faults are found, healthy models have none, and nothing is left changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES, Family
from methods import METHODS, home, trace, word_tokenizer, wrap
from peft import LoraConfig, PeftModel, get_peft_model
from test_contract import Rows
from test_parameter_groups import arguments
from torch import Tensor, nn

from peft_multimodal import AuroraModeApproxConfig, CheckTraining, TowerPolicy, Train, check_training
from peft_multimodal.__main__ import main
from peft_multimodal.training.check_report import BEHIND_ZERO

LLAVA, CLIP = FAMILIES["llava"], FAMILIES["clip"]


def loss_of(family: Family) -> Callable[[nn.Module, Any], Tensor] | None:
    """For classes that compute none."""
    return None if family.targets else lambda model, batch: family.output(model(**batch)).square().mean()


def checked(family: Family, model: Any, **options: Any) -> Any:
    batch = family.train_inputs(model) or family.inputs(model)
    return check_training(model, batch, loss=loss_of(family), **options)


def lora(family: Family = LLAVA, **changes: Any) -> PeftModel:
    return get_peft_model(family.build(), LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **changes}))


def unread() -> tuple[Any, Any]:
    model = lora()
    return model, LLAVA.train_inputs(model)


def no_image() -> tuple[Any, Any]:
    model = lora(exclude_modules=r".*vision_tower.*layers\.1\..*")
    assert LLAVA.targets is not None
    return model, LLAVA.targets(LLAVA.text_inputs(model))


def frozen_tower() -> tuple[Any, Any]:
    model = lora(CLIP)
    for name, parameter in model.named_parameters():
        if "vision_model" in name:
            parameter.requires_grad_(False)
    return model, CLIP.train_inputs(model)


def checkpointing() -> tuple[Any, Any]:
    model = lora(CLIP)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.disable_input_require_grads()
    return model, CLIP.train_inputs(model)


def no_labels() -> tuple[Any, Any]:
    model = lora(exclude_modules=r".*vision_tower.*layers\.1\..*")
    batch = LLAVA.train_inputs(model)
    assert batch is not None
    return model, {**batch, "labels": torch.full_like(batch["labels"], -100)}


def another_is_active() -> tuple[Any, Any]:
    model = lora(CLIP)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"]))
    model.set_requires_grad("other")
    return model, CLIP.train_inputs(model)


def half() -> tuple[Any, Any]:
    base = CLIP.build().half()
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    return model, CLIP.train_inputs(model)


def scaled_by_zero() -> tuple[Any, Any]:
    model = lora(CLIP, lora_alpha=0)
    return model, CLIP.train_inputs(model)


def merged() -> tuple[Any, Any]:
    model = lora(CLIP)
    model.merge_adapter()
    return model, CLIP.train_inputs(model)


def nothing_trains() -> tuple[Any, Any]:
    model = lora(CLIP, inference_mode=True)
    return model, CLIP.train_inputs(model)


FAULTS = {
    "vision_feature_layer": (unread, "'default' in the vision have no gradient: vision_feature_layer"),
    "no image in the batch": (no_image, "'default' in the vision has a gradient: no image in the batch"),
    "a frozen tower": (frozen_tower, "In the vision tower no parameter of adapter 'default' trains"),
    "checkpointing": (checkpointing, "frozen by gradient checkpointing"),
    "masked labels": (no_labels, "every label is -100"),
    "another adapter is active": (another_is_active, "No tensor of 'other' in the text has a gradient: not active"),
    "float16": (half, "'default' in the text is stored in float16"),
    "scaled by 0": (scaled_by_zero, "No tensor of 'default' in the text has a gradient: scaled by 0"),
    "merged": (merged, "merged into the weights"),
    "nothing trains": (nothing_trains, "No parameter of the model trains"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    plant, expected = FAULTS[name]
    model, batch = plant()
    report = check_training(model, batch)
    assert not report.healthy
    assert expected in str(report)
    assert all(finding.way_out for finding in report.findings)
    with pytest.raises(ValueError, match="Something doesn't train"):
        check_training(model, batch, strict=True)


def test_a_loss_that_ignores_the_adapter_is_found() -> None:
    def without(model: Any, batch: Any) -> Tensor:
        with model.disable_adapter():
            return model(**batch).loss

    model = lora(CLIP)
    report = check_training(model, CLIP.train_inputs(model) or {}, loss=without)
    assert "No tensor of 'default' in the text has a gradient: the loss doesn't reach it" in str(report)


def test_gradients_that_are_no_numbers_are_found() -> None:
    def broken(model: Any, batch: Any) -> Tensor:
        return model(**batch).loss * torch.tensor(0.0).sqrt() + (model(**batch).logits_per_image * 0).sqrt().sum()

    model = lora(CLIP)
    assert "NaN or infinite" in str(check_training(model, CLIP.train_inputs(model) or {}, loss=broken))


@pytest.mark.parametrize("method", METHODS)
def test_a_healthy_model_has_no_fault(method: str) -> None:
    family = home(method)
    model = wrap(family, method, stirred=False)
    report = checked(family, model, strict=True)
    assert report.moves > 0
    assert {row.adapter for row in report.rows} >= {"default"}
    assert sum(row.tensors for row in report.rows) == sum(p.requires_grad for p in model.parameters())
    assert report.loss is not None
    assert all(set(row.why) <= {BEHIND_ZERO} for row in report.rows)


def test_lora_a_lies_behind_a_zero_start() -> None:
    report = checked(CLIP, lora(CLIP))
    assert report.healthy
    assert {row.tower: (row.why[BEHIND_ZERO], row.zero_share) for row in report.rows} == {
        "vision": (4, 0.5),
        "text": (4, 0.5),
    }
    assert "behind a zero start (4)" in str(report)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_made_where_they_are_switched_off(mode: type) -> None:
    model = lora(CLIP)
    batch = CLIP.train_inputs(model)
    assert batch is not None
    with mode():
        assert check_training(model, batch, strict=True).healthy


def test_a_policy_and_full_fine_tuning_are_looked_at_too() -> None:
    policy = TowerPolicy(vision=AuroraModeApproxConfig(r=2), connector=Train(), decoder=LoraConfig(r=2))
    report = checked(LLAVA, policy.apply(LLAVA.build()), strict=True)
    found = {(row.tower, row.adapter) for row in report.rows}
    assert found == {("vision", "default-vision"), ("connector", "modules_to_save"), ("decoder", "default-decoder")}
    report = checked(CLIP, CLIP.build())
    assert {row.adapter for row in report.rows} == {"the base's own"}
    assert report.healthy


def test_nothing_is_left_changed() -> None:
    model = wrap(CLIP, "aurora_mode_approx", stirred=False)
    model.eval()
    model.base_model.model.vision_model.train()
    batch = CLIP.train_inputs(model)
    assert batch is not None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    grads = {n: p.grad for n, p in model.named_parameters()}
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    before, drawn = trace(model), torch.get_rng_state()
    check_training(model, batch)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert trace(model) == before
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is grads[n] for n, p in model.named_parameters())
    assert all(grad is None or bool((grad == 1).all()) for grad in grads.values())


def test_a_batch_without_a_loss_is_refused() -> None:
    model = lora(LLAVA)
    with pytest.raises(ValueError, match=r"computes no loss from this batch.*pass loss="):
        check_training(model, LLAVA.inputs(model))


# -------------------------------------------------------------------------------------------------- the command line


def saved_clip(folder: Path) -> Path:
    looks = hf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIP.build().save_pretrained(folder)
    hf.CLIPProcessor(looks, word_tokenizer()).save_pretrained(folder)
    return folder


def test_the_doctor_takes_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = saved_clip(tmp_path / "clip")
    wrap(CLIP, "aurora_mode_approx").save_pretrained(tmp_path / "healthy")
    scaled_by_zero()[0].save_pretrained(tmp_path / "dead")
    assert main(["doctor", str(base), str(tmp_path / "healthy"), "--step"]) == 0
    assert "a small step moves the output by" in capsys.readouterr().out
    assert main(["doctor", str(base), str(tmp_path / "dead"), "--step", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert "scaled by 0" in report["findings"][0]["what"]
    assert {row["tower"] for row in report["rows"]} == {"vision", "text"}
    assert main(["doctor", str(base), str(tmp_path / "nowhere"), "--step"]) == 1
    assert "No step can be taken" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["doctor", str(base), "--step"])


# ------------------------------------------------------------------------------------------------------ in training


def trainer(model: Any, folder: Path, callback: CheckTraining, **options: Any) -> hf.Trainer:
    rows = Rows(CLIP, model)
    args = arguments(folder, learning_rate=1e-3, logging_steps=2, label_names=[], **options)
    return hf.Trainer(model, args, rows.collate, train_dataset=rows, callbacks=[callback])


def test_the_callback_logs_the_gradients_of_each_tower(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = lora(CLIP)
    run = trainer(model, tmp_path, CheckTraining(), max_steps=4)
    run.train()
    logged = [entry for entry in run.state.log_history if "grad_norm" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    for entry in logged:
        towers = [entry["grad_norm/vision"], entry["grad_norm/text"]]
        assert sum(norm**2 for norm in towers) ** 0.5 == pytest.approx(entry["grad_norm"], rel=1e-3)
    assert not [w for w in recwarn if "'default'" in str(w.message)]


def test_the_callback_says_at_the_first_steps_what_does_not_train(tmp_path: Path) -> None:
    model, _ = scaled_by_zero()
    with pytest.warns(UserWarning, match="scaled by 0"):
        trainer(model, tmp_path, CheckTraining(), max_steps=1).train()
    model, _ = scaled_by_zero()
    with pytest.raises(ValueError, match="scaled by 0"):
        trainer(model, tmp_path, CheckTraining(strict=True), max_steps=1).train()


def test_the_callback_reads_no_number_between_logs(tmp_path: Path) -> None:
    model = lora(CLIP)
    callback = CheckTraining()
    run = trainer(model, tmp_path, callback, max_steps=3)
    reads: list[int] = []
    original = Tensor.__float__
    run.train()
    step = hf.TrainerState(global_step=4, logging_steps=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "__float__", lambda x: reads.append(1) or original(x))
        patch.setattr(Tensor, "__bool__", lambda x: reads.append(1) or True)
        callback.on_pre_optimizer_step(run.args, step, None, model=model)
    assert not reads
