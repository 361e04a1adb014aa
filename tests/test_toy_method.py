"""A method is one file with its page, and the case of its tests: everything else finds it in the registry."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import auto_families
import case
import docs_tables
import methods
import pytest
import test_auto_contract
import test_contract
from case import Case
from families import FAMILIES
from peft import PeftModel, get_peft_model, mapping
from peft.utils import PeftType
from torch import nn

from peft_multimodal import __main__ as command
from peft_multimodal import matched_modules
from peft_multimodal.core import registry

PAGE = '''
"""Toy: y' = y + up(tanh(down(y))) at the end of every sub-layer."""

from dataclasses import dataclass

import torch
from torch import nn

from peft_multimodal.core.config import TargetedConfig
from peft_multimodal.core.parts import AttachedPart, MultimodalLayer
from peft_multimodal.core.registry import Promises, Use, method
from peft_multimodal.core.sites import ends
from peft_multimodal.core.tuner import MultimodalTuner


@dataclass
class ToyConfig(TargetedConfig):
    r: int = 2

    def __post_init__(self):
        super().__post_init__()
        self.check_number("r", 1, integer=True)


class ToyLayer(AttachedPart, MultimodalLayer):
    adapter_layer_names = ("toy_down", "toy_up")

    def __init__(self, network, role):
        super().__init__(network, role)
        self.hooks = [network.register_forward_hook(self.residual)]

    def add(self, adapter_name, width, r):
        self.toy_down[adapter_name] = nn.Linear(width, r)
        self.toy_up[adapter_name] = nn.Linear(r, width, bias=False)
        nn.init.zeros_(self.toy_up[adapter_name].weight)
        self.settle(adapter_name)

    def residual(self, network, args, y):
        for name in self.live_adapters():
            down, up = self.toy_down[name], self.toy_up[name]
            y = y + up(torch.tanh(down(self._cast_input_dtype(y, up.weight.dtype)))).to(y.dtype)
        return y


@method(
    "toy",
    ToyConfig,
    summary="A toy for tests.",
    use=Use(have="a test", want="a method", cost="nothing", compare="nothing"),
    docs="docs/toy.md",
    promises=Promises(acts_on="layers"),
)
class ToyModel(MultimodalTuner):
    tuner_layer_cls = ToyLayer
    learning_rates = (1e-4, 1e-2)
    not_mergeable = "The toy is no weight update."

    @classmethod
    def candidates(cls, config, model, anatomy):
        return ends(model, anatomy)

    @classmethod
    def default_targets(cls, config, candidates):
        return candidates

    def make(self, injection, site, module):
        return ToyLayer(module, site.role)

    def add(self, injection, site, part):
        part.add(injection.adapter_name, site.d_out, injection.config.r)
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The module of the page, registered; nothing of it is left after the test."""
    (tmp_path / "toy_page.py").write_text(PAGE)
    spec = importlib.util.spec_from_file_location("toy_page", tmp_path / "toy_page.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "toy_page", module)
    spec.loader.exec_module(module)
    yield module
    del registry.METHODS["toy"]
    for table in (
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
    ):
        del table[PeftType.TOY]
    PeftType._member_names_.remove("TOY")
    del PeftType._member_map_["TOY"], PeftType._value2member_map_["TOY"]
    type.__delattr__(PeftType, "TOY")


def test_a_method_of_one_file_is_found_everywhere(toy, tmp_path: Path, monkeypatch, capsys):
    def parameters(base: nn.Module, config) -> int:
        return sum((2 * site.d_out + 1) * config.r for site in matched_modules(base, config))

    mine = Case("toy", lambda family, **changes: toy.ToyConfig(**changes), parameters, anywhere=toy.ToyConfig)
    cases = {**case.declared(), "toy": mine}
    for module in (case, methods, test_contract, test_auto_contract):
        if hasattr(module, "declared"):
            monkeypatch.setattr(module, "declared", lambda: cases)
    family = FAMILIES["clip"]
    monkeypatch.setitem(test_contract.METHODS, "toy", mine.config)
    monkeypatch.setitem(test_auto_contract.METHODS, "toy", mine)

    # PEFT, the card, the doctor.
    model = methods.wrap(family, "toy")
    assert isinstance(model, PeftModel)
    assert "Toy" in docs_tables.methods_table()
    assert "A toy for tests." in docs_tables.index()
    model.save_pretrained(tmp_path / "adapter")
    assert "# Toy" in (tmp_path / "adapter" / "README.md").read_text()
    family.build().save_pretrained(tmp_path / "base")
    assert command.main(["doctor", str(tmp_path / "base"), str(tmp_path / "adapter"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["healthy"]
    assert command.main(["doctor", str(tmp_path / "base")]) == 0
    assert "Toy: " in capsys.readouterr().out
    loaded = PeftModel.from_pretrained(family.build(), tmp_path / "adapter")
    assert methods.distance(methods.run(family, loaded), methods.run(family, model)) <= 1e-6

    # The contract, and classes that PEFT's and transformers' auto mappings name.
    test_contract.test_unloaded_it_is_the_base_model(family, "toy")
    some = next(c for c in auto_families.auto_cases() if str(c) == "LlavaOnevisionForConditionalGeneration")
    test_auto_contract.test_core_of_the_contract(some, "toy", tmp_path / "auto")
    count = get_peft_model(family.build(), toy.ToyConfig()).get_nb_trainable_parameters()[0]
    assert count == parameters(family.build(), toy.ToyConfig()) > 0
