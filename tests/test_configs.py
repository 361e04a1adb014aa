"""A config holds values alone: whatever is made with it, copied of it or saved of it."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from methods import METHODS, distance, home, run, stir, wrap
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from peft_multimodal import CrossLingualAdapterConfig, HardSampleBank
from peft_multimodal.core.companions import record_of

NAMES = list(METHODS)


def deeper(model: Any) -> nn.Module:
    """A base of the same class with a layer more in each of its stacks."""
    config = copy.deepcopy(model.config)
    for stack in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        if hasattr(stack, "num_hidden_layers"):
            stack.num_hidden_layers += 1
    return type(model)(config).eval()


@pytest.mark.parametrize("method", NAMES)
def test_a_config_is_its_fields(method: str, tmp_path: Path):
    family = home(method)
    model = wrap(family, method)
    model.save_pretrained(tmp_path)
    config = METHODS[method](family)
    for one in (config, model.peft_config["default"], type(config).from_pretrained(tmp_path)):
        assert vars(one).keys() == {field.name for field in fields(one)}
        assert one == copy.deepcopy(one) == pickle.loads(pickle.dumps(one))
        assert one == type(one)(**json.loads(json.dumps(asdict(one))))


@pytest.mark.parametrize("method", NAMES)
def test_one_config_for_two_models(method: str, tmp_path: Path):
    """Each adapter knows its own base: what was filled in for the one is not written into the file of the other."""
    family = home(method)
    config = METHODS[method](family)
    before = asdict(config)
    torch.manual_seed(0)
    first = stir(get_peft_model(family.build(), config).eval())
    expected = run(family, first)
    second = get_peft_model(deeper(family.build()), config)
    assert asdict(config) == before
    assert first.peft_config["default"].base_signature != second.peft_config["default"].base_signature
    for model, name in ((first, "first"), (second, "second")):
        model.save_pretrained(tmp_path / name)
    assert distance(run(family, PeftModel.from_pretrained(family.build(), tmp_path / "first")), expected) <= 1e-6
    PeftModel.from_pretrained(deeper(family.build()), tmp_path / "second")


def test_the_bank_of_one_model_is_not_another_s(tmp_path: Path):
    family = FAMILIES["clip"]
    config = METHODS["hard_sample_domain_adapter"](family)
    trained, other = (get_peft_model(family.build(), config) for _ in range(2))
    trained.base_model.banks["default"] = HardSampleBank(["a", "b"])
    for model, name in ((trained, "trained"), (other, "other")):
        model.save_pretrained(tmp_path / name)
    assert (tmp_path / "trained/hard_sample_bank.safetensors").is_file()
    assert not (tmp_path / "other/hard_sample_bank.safetensors").exists()


def test_an_adapters_config_serves_for_another_adapter():
    family = FAMILIES["clip"]
    model = wrap(family, "structured_prompt")
    model.add_adapter("second", model.peft_config["default"])
    one, other = model.peft_config.values()
    assert one == other
    assert one is not other
    bad = {key: value[..., :1] for key, value in get_peft_model_state_dict(model, adapter_name="second").items()}
    with pytest.raises(ValueError, match="don't fit"):
        set_peft_model_state_dict(model, bad, "second")
    assert list(model.peft_config) == ["default", "second"]  # it may have been trained: it isn't taken out


@pytest.mark.parametrize("method", NAMES)
def test_reading_tensors_and_saving_a_config_write_nothing_else(method: str, tmp_path: Path):
    model = wrap(home(method), method)
    model.peft_config["default"].save_pretrained(tmp_path / "alone")
    assert [file.name for file in (tmp_path / "alone").iterdir()] == ["adapter_config.json"]
    model.save_pretrained(tmp_path / "whole")
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    get_peft_model_state_dict(model)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == written


def test_a_given_encoder_goes_with_the_config_that_it_was_given_to():
    family = FAMILIES["clip"]
    encoder = wrap(family, "cross_lingual_adapter").base_model.language_tower().encoder("default")
    config = CrossLingualAdapterConfig(bottleneck_dim=16, num_heads=2).with_encoder(encoder)
    models = [get_peft_model(family.build(), config) for _ in range(2)]
    assert all(model.base_model.language_tower().encoder("default") is encoder for model in models)
    assert config.encoder_width is None
    unnamed = copy.deepcopy(config)
    unnamed.encoder = None
    with pytest.raises(ValueError, match=r"encoder= is missing.*with_encoder"):
        get_peft_model(family.build(), unnamed)
    seen = weakref.ref(encoder)
    del config, models, encoder
    gc.collect()
    assert seen() is None


def test_a_record_goes_with_its_config():
    config = METHODS["aurora_mode_approx"](FAMILIES["clip"])
    record = weakref.ref(record_of(config))
    assert record_of(copy.deepcopy(config)) is not record()
    del config
    gc.collect()
    assert record() is None


def test_companions_of_an_adapter_below_another_method_s(tmp_path: Path):
    family = FAMILIES["clip"]
    inner = wrap(family, "cross_lingual_adapter", adapter_name="zh")
    with pytest.warns(UserWarning, match="second time"):
        outer = get_peft_model(inner, METHODS["hard_sample_domain_adapter"](family, towers=["vision"]))
    outer.save_pretrained(tmp_path)
    assert (tmp_path / "zh/tokenizer/tokenizer.json").is_file()
    assert "| languages | zh |" in (tmp_path / "README.md").read_text()
