"""An adapter's scale between the base and the adapted model: exact for weight updates, undone, kept in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import METHODS, home, run, wrap
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from test_policy import output, stirred

from peft_multimodal import AuroraModeApproxConfig, TowerPolicy, Train, adapter_scale
from peft_multimodal.core.registry import method_of
from peft_multimodal.evaluation import scale_curve

CLIP = FAMILIES["clip"]
TARGETS = ["q_proj", "fc1"]

UPDATES = {
    "aurora": lambda: AuroraModeApproxConfig(r=3, alpha=5),
    "tucker": lambda: AuroraModeApproxConfig(r=3, core="tucker", share="none"),
    "lora": lambda: LoraConfig(r=3, target_modules=TARGETS, modules_to_save=["visual_projection"]),
    "loha": lambda: LoHaConfig(r=3, target_modules=TARGETS),
    "lokr": lambda: LoKrConfig(r=3, target_modules=TARGETS),
    "policy": lambda: TowerPolicy(vision=AuroraModeApproxConfig(r=2), text=LoraConfig(r=2), connector=Train()),
}


def scalable(method: str) -> bool:
    config: Any = METHODS[method](home(method))
    found = method_of(config)
    assert found is not None
    return found.model.linear_tensors(config) is not None


@pytest.mark.parametrize("name", UPDATES)
def test_a_weight_update_is_interpolated_exactly(name: str) -> None:
    model = stirred(get_peft_model(CLIP.build(), UPDATES[name]()))
    adapted = output(CLIP, model)
    with adapter_scale(model, 0.3):
        scaled = output(CLIP, model)
    assert torch.equal(output(CLIP, model), adapted)  # undone to the last bit
    base, whole = CLIP.build().state_dict(), model.merge_and_unload().state_dict()
    oracle = CLIP.build()
    oracle.load_state_dict(
        {
            key: base[key] + 0.3 * (whole[key] - base[key]) if base[key].is_floating_point() else base[key]
            for key in base
        }
    )
    assert (output(CLIP, oracle) - scaled).abs().max() < 1e-5
    assert (scaled - adapted).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_each_method_goes_from_the_base_to_the_adapter_or_is_refused(method: str) -> None:
    family = home(method)
    model = wrap(family, method)
    adapted = run(family, model)
    if not scalable(method):
        with pytest.raises(ValueError, match="can't be scaled"):
            adapter_scale(model, 0.5)
        assert torch.equal(run(family, model), adapted)
        return
    with model.disable_adapter():
        base = run(family, model)
    with adapter_scale(model, 0):
        assert (run(family, model) - base).abs().max() < 1e-6
    with adapter_scale(model, 1):
        assert torch.equal(run(family, model), adapted)
    with adapter_scale(model, 0.01):
        near = (run(family, model) - base).abs().max()
        assert 0 < near < 0.2 * (adapted - base).abs().max()
    assert torch.equal(run(family, model), adapted)


@pytest.mark.parametrize("name", ["aurora", "lora", "policy"])
def test_merged_adapters_are_scaled_too(name: str) -> None:
    config = UPDATES[name]()
    if hasattr(config, "modules_to_save"):
        config.modules_to_save = None
    model = stirred(get_peft_model(CLIP.build(), config))
    with adapter_scale(model, 0.5):
        expected = output(CLIP, model)
    model.merge_adapter()
    adapted = output(CLIP, model)
    with adapter_scale(model, 0.5):
        assert (output(CLIP, model) - expected).abs().max() < 1e-5
    assert (output(CLIP, model) - adapted).abs().max() < 1e-5


def test_a_lasting_scale_is_saved(tmp_path: Path) -> None:
    model = stirred(get_peft_model(CLIP.build(), UPDATES["policy"]()))
    adapter_scale(model, 0.75)
    scaled = output(CLIP, model)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(CLIP, PeftModel.from_pretrained(CLIP.build(), tmp_path)), scaled)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
        LoraConfig(r=2, target_modules=TARGETS, lora_bias=True),
        IA3Config(target_modules=TARGETS, feedforward_modules=["fc1"]),
        OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj"]),
    ],
)
def test_what_is_no_linear_update_is_refused(config: Any) -> None:
    model = stirred(get_peft_model(CLIP.build(), config))
    adapted = output(CLIP, model)
    with pytest.raises(ValueError, match="can't be scaled"):
        adapter_scale(model, 0.5)
    assert torch.equal(output(CLIP, model), adapted)


@pytest.mark.parametrize("a", [-1, float("nan"), float("inf"), "1", None, True])
def test_a_scale_is_a_number(a: Any) -> None:
    model = get_peft_model(CLIP.build(), UPDATES["aurora"]())
    with pytest.raises(ValueError, match="finite number >= 0"):
        adapter_scale(model, a)
    with pytest.raises(ValueError, match="No adapter"):
        adapter_scale(CLIP.build(), 0.5)


def test_the_curve_is_evaluated_printed_and_drawn(tmp_path: Path) -> None:
    model = stirred(get_peft_model(CLIP.build(), UPDATES["aurora"]())).train()
    adapted = output(CLIP, model)
    base = output(CLIP, CLIP.build())

    def evaluate(m: Any) -> dict[str, float]:
        assert not m.training
        found = output(CLIP, m)
        return {"old": -float((found - base).abs().max()), "new": -float((found - adapted).abs().max())}

    curve = scale_curve(model, evaluate, (0, 0.5, 1))
    assert list(curve.points) == [0, 0.5, 1]
    assert curve.best("old") == 0
    assert curve.best("new") == 1
    assert model.training
    assert str(curve).splitlines()[0].split() == ["scale", "old", "new"]
    assert "<svg" in curve.plot(tmp_path / "curve.svg").read_text()
    with pytest.raises(ValueError, match=r"no metric 'newer'.*'old', 'new'"):
        curve.best("newer")
