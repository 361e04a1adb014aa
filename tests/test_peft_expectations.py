"""What users of PEFT and of transformers' adapter calls expect, and what is refused instead of half working."""

from __future__ import annotations

import json
import warnings
from itertools import permutations
from pathlib import Path

import peft
import pytest
import torch
from case import declared
from families import FAMILIES, Family
from methods import (
    CASES,
    CLASSES,
    METHODS,
    adapter,
    distance,
    fill,
    home,
    run,
    stir,
    trace,
    word_tokenizer,
    wrap,
)
from packaging.version import Version
from peft import (
    LoraConfig,
    PeftMixedModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from peft.utils.save_and_load import load_peft_weights
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from peft_multimodal import load, save


def cases(*unmarked: str) -> pytest.MarkDecorator:
    """Every (family, method); families that aren't named are marked `full`."""
    found = [
        pytest.param(FAMILIES[name], method, id=f"{name}-{method}", marks=() if name in unmarked else pytest.mark.full)
        for name, method in CASES
    ]
    return pytest.mark.parametrize(("family", "method"), found)


each_method = pytest.mark.parametrize("method", METHODS)


def state(model: nn.Module) -> dict:
    """What a refusal must leave as it is: also what transformers and PEFT note on a model."""
    return {**trace(model), "notes": {k: v for k, v in vars(model).items() if "peft" in k}}


# ------------------------------------------------------------------------------------------------------------ status


@cases("clip", "blip_retrieval", "llava")
def test_status_of_every_layer(family: Family, method: str):
    model = wrap(family, method)
    model.add_adapter("other", METHODS[method](family))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}

    def statuses() -> dict:
        found = {status.name: status for status in model.get_layer_status()}
        assert found.keys() == {name.removeprefix("base_model.") for name in layers}
        assert {s.module_type for s in found.values()} == {type(m).__name__ for m in layers.values()}
        return found

    for status in statuses().values():
        assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
        held = set(status.available_adapters)
        assert held <= {"default", "other"}
        assert status.requires_grad == {name: name == "default" for name in sorted(held)}
        assert status.devices == {name: ["cpu"] for name in sorted(held)}
    whole = model.get_model_status()
    assert whole.base_model_type == type(model.get_base_model()).__name__
    assert whole.peft_types == dict.fromkeys(("default", "other"), model.peft_config["default"].peft_type.value)
    assert (whole.trainable_params, whole.total_params) == model.get_nb_trainable_parameters()
    assert whole.num_adapter_layers == len(layers)

    model.set_adapter("other")
    assert all(status.active_adapters == ["other"] for status in statuses().values())
    assert model.get_model_status().requires_grad == {"default": False, "other": True}
    with model.disable_adapter():
        assert not any(status.enabled for status in statuses().values())
        assert model.get_model_status().enabled is False
    assert model.get_model_status().enabled is True
    model.set_requires_grad("other", False)
    assert not [n for n, p in model.named_parameters() if p.requires_grad]
    model.set_requires_grad("other")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapter(model, "other"))


# --------------------------------------------------------------------------- adapters in a bare model, and hot-swapping

# `add_adapter`, `delete_adapter` and others of a transformers model ask for a PEFT that may not be out yet, before anything else.
TRANSFORMERS_TAKES_THIS_PEFT = Version(peft.__version__) >= Version(MIN_PEFT_VERSION)


def refusal(by_transformers: bool, ours: str) -> str:
    """The refusal that a user sees: ours, unless transformers refuses this version of PEFT first."""
    return (
        ours
        if TRANSFORMERS_TAKES_THIS_PEFT or not by_transformers
        else "version of PEFT you are using is not compatible"
    )


# What several layers read: PEFT itself refuses to inject such a method.
SHARED = {m: PEFT_TYPE_TO_TUNER_MAPPING[METHODS[m](home(m)).peft_type].uses_shared_state for m in METHODS}


def not_injected(method: str) -> str:
    if SHARED[method]:
        return r"shared state.*get_peft_model"
    return r"isn't injected into a bare model.*get_peft_model\(model, config\).*PeftModel\.from_pretrained"


@cases("clip", "blip_retrieval", "llava")
def test_injection_into_a_bare_model_is_refused(family: Family, method: str, tmp_path: Path):
    """Refused before anything is changed: the model can be wrapped as if nothing had been."""
    config = METHODS[method](family)
    wrap(family, method).save_pretrained(tmp_path)
    model = family.build().requires_grad_(False)
    expected, before = run(family, model), state(model)
    calls = {
        "inject_adapter_in_model": lambda: inject_adapter_in_model(config, model),
        "add_adapter": lambda: model.add_adapter(config, "mine"),
        "load_adapter": lambda: model.load_adapter(str(tmp_path)),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=refusal(name == "add_adapter", not_injected(method))):
            call()
        if SHARED[method]:  # transformers notes an adapter before it asks PEFT, whose refusal leaves the note
            vars(model).pop("_hf_peft_config_loaded", None)
        assert state(model) == before
    with pytest.raises(ValueError, match=refusal(True, "No adapter loaded")):
        model.delete_adapter("mine")
    assert torch.equal(run(family, model), expected)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*second time.*")
        get_peft_model(model, config)


@each_method
def test_an_adapter_beside_an_injected_lora_is_refused(method: str):
    """The LoRA goes on acting, and whoever has injected it goes on knowing it."""
    family = home(method)
    model = family.build()
    lora = LoraConfig(r=2, target_modules=["q_proj", "query"], init_lora_weights=False)
    if TRANSFORMERS_TAKES_THIS_PEFT:
        model.add_adapter(lora, "lora")
    else:
        inject_adapter_in_model(lora, model, "lora")
    expected, before = run(family, model), state(model)
    with pytest.raises(ValueError, match=not_injected(method)):
        inject_adapter_in_model(METHODS[method](family), model, "mine")
    with pytest.raises(ValueError, match=refusal(True, not_injected(method))):
        model.add_adapter(METHODS[method](family), "mine")
    assert torch.equal(run(family, model), expected)
    assert state(model) == before
    if TRANSFORMERS_TAKES_THIS_PEFT:
        assert model.active_adapters() == ["lora"]
        model.delete_adapter("lora")


@each_method
def test_hot_swapping_is_refused_and_done_by_setting_weights(method: str, tmp_path: Path):
    """PEFT's closed list has LoRA alone. Setting the weights swaps in place."""
    family = home(method)
    other = stir(wrap(family, method, stirred=False), seed=3)
    expected = run(family, other)
    save(other, tmp_path)
    model = wrap(family, method)
    before, weights, config = run(family, model), get_peft_model_state_dict(other), model.peft_config["default"]
    tensors = {name: parameter.data_ptr() for name, parameter in adapter(model).items()}
    with pytest.raises(ValueError, match="only supports LORA"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    with pytest.raises(RuntimeError, match="unexpected keys"):
        hotswap_adapter_from_state_dict(model, weights, "default", config, parameter_prefix=model.base_model.prefix)
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(model)
    assert torch.equal(run(family, model), before)
    set_peft_model_state_dict(model, load_peft_weights(str(tmp_path), device="cpu"), adapter_name="default")
    assert torch.equal(run(family, model), expected)
    assert {name: parameter.data_ptr() for name, parameter in adapter(model).items()} == tensors


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m == "cross_lingual_adapter" else pytest.mark.full) for m in METHODS]
)
def test_setting_weights_compiles_nothing_anew(method: str):
    torch._dynamo.reset()
    family = home(method)
    model, weights = wrap(family, method), get_peft_model_state_dict(stir(wrap(family, method), seed=3))
    compilations, before = [], run(family, model)

    def backend(graph, _):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    assert distance(run(family, compiled), before) <= 1e-5
    count = len(compilations)
    assert count
    set_peft_model_state_dict(model, weights, adapter_name="default")
    expected = run(family, model)
    assert distance(expected, before) > 1e-3
    assert distance(run(family, compiled), expected) <= 1e-5
    assert len(compilations) == count


@each_method
def test_mixed_models_are_refused(method: str, tmp_path: Path):
    """A closed list of PEFT's. Methods of this package share a model by one `get_peft_model` each, see below."""
    family = home(method)
    model = family.build()
    before = state(model)
    message = r"not compatible with the `PeftMixedModel`|not supported for mixed models"
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, METHODS[method](family), mixed=True)
    assert state(model) == before
    wrap(family, method).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        PeftMixedModel.from_pretrained(model, str(tmp_path))
    assert state(model) == before


# -------------------------------------------------------------------------------------------------- a model wrapped twice


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@each_method
def test_a_second_wrap_warns_and_takes_nothing_away(method: str, tmp_path: Path):
    family = home(method)
    fresh = family.build()
    base, clean = run(family, fresh), trace(fresh)
    model = wrap(family, method)
    first, before = run(family, model), set(adapter(model))
    for again in (model, model.get_base_model()):
        with (
            pytest.warns(UserWarning, match="second time"),
            pytest.raises(ValueError, match=r"'default' already .*unload\(\).*adapter_name='default-2'"),
        ):
            get_peft_model(again, METHODS[method](family))
    assert torch.equal(run(family, model), first)
    with pytest.warns(UserWarning, match="second time"):
        second = get_peft_model(model, METHODS[method](family), adapter_name="other")
    fill(family, second)
    assert second.active_adapters == ["other"]
    assert declared()[method].promises.starts_as == "images" or distance(run(family, second), base) <= 1e-6
    second.set_adapter("default")
    assert torch.equal(run(family, second), first)
    assert set(adapter(second)) == before
    save(second, tmp_path)
    assert {f.parent.name for f in tmp_path.rglob("adapter_model.safetensors")} == {tmp_path.name, "other"}
    unloaded = second.unload()
    assert torch.equal(run(family, unloaded), base)
    assert trace(unloaded) == clean


PAIRS = [
    (name, first, second)
    for first, second in permutations([m for m in METHODS if not m.endswith("-fusion")], 2)
    for name in [next((n for n in ("clip", "llava") if (n, first) in CASES and (n, second) in CASES), None)]
    if name
]
NOT_TOGETHER = {frozenset(("cross_lingual_adapter", "structured_prompt"))}
ORDERED = [("aurora_mode_approx", "gated_xattn")]  # the second wraps what the first is in


@pytest.mark.filterwarnings("ignore:You are trying to modify", "ignore:Already found a `peft_config`")
@pytest.mark.parametrize(("name", "first", "second"), PAIRS)
def test_two_methods_on_one_model(name: str, first: str, second: str, tmp_path: Path):
    """Both act, are saved together by either handle, and are loaded in any order that they can be put on in."""
    family = FAMILIES[name]
    base = family.build().requires_grad_(False)
    expected, clean = run(family, base), trace(base)
    one = wrap(family, first, base=base, adapter_name="one")
    alone, before = run(family, one), trace(base)
    if frozenset((first, second)) in NOT_TOGETHER or (second, first) in ORDERED:
        reason = "no model can have both.*deepcopy" if frozenset((first, second)) in NOT_TOGETHER else "Make or load"
        with pytest.raises(ValueError, match=reason):
            get_peft_model(one, METHODS[second](family), adapter_name="two")
        assert list(one.peft_config) == ["one"]
        assert trace(base) == before
        assert torch.equal(run(family, one), alone)
        return
    two = get_peft_model(one, METHODS[second](family), adapter_name="two")
    fill(family, two)
    assert declared()[second].promises.starts_as == "images" or distance(run(family, two), alone) <= 1e-6
    both = run(family, stir(two, "two", seed=1))
    assert distance(both, alone) > 1e-3
    assert distance(both, run(family, stir(wrap(family, second, stirred=False), seed=1))) > 1e-3

    # Both train, and each of them can be frozen.
    names = {"one": set(adapter(one, "one")), "two": set(adapter(two, "two"))}
    assert {n for n, p in two.named_parameters() if p.requires_grad} == names["one"] | names["two"]
    two.set_requires_grad("one", False)
    assert {n for n, p in two.named_parameters() if p.requires_grad} == names["two"]

    # Each handle switches and deletes its own; what disables or takes out serves both.
    for handle, other in ((one, "two"), (two, "one")):
        assert handle.active_adapters == [{"one": "two", "two": "one"}[other]]
        for call in (handle.base_model.set_adapter, handle.delete_adapter):
            with pytest.raises(ValueError, match=rf"'{other}' is of another method"):
                call(other)
        with pytest.raises(ValueError, match=r"can't be merged"):
            handle.merge_and_unload()
        with handle.disable_adapter():
            assert torch.equal(run(family, two), expected)
    assert torch.equal(run(family, two), both)

    for handle in (one, two):
        folder = tmp_path / str(handle is two)
        save(handle, folder)
        assert {f.parent.name for f in folder.rglob("adapter_model.safetensors")} == {"one", "two"}
        kinds = [json.loads((folder / n / "adapter_config.json").read_text())["peft_type"] for n in ("one", "two")]
        assert kinds == [one.peft_config[n].peft_type.value for n in ("one", "two")]
    for order in [("one", "two")] + [("two", "one")] * ((first, second) not in ORDERED):
        model = family.build()
        for adapter_name in order:
            model = load(model, tmp_path / "True" / adapter_name, adapter_name=adapter_name)
        assert distance(run(family, model), both) <= 1e-6

    assert torch.equal(run(family, one.unload()), expected)
    assert trace(base) == clean


@pytest.mark.filterwarnings("ignore:You are trying to modify", "ignore:Already found a `peft_config`")
def test_what_is_kept_of_a_class_list_follows_the_other_method():
    family = FAMILIES["clip"]
    one = wrap(family, "aurora_mode_approx")
    one.add_adapter("other", METHODS["aurora_mode_approx"](family))
    stir(one, "other", seed=2)
    two = stir(get_peft_model(one, METHODS["structured_prompt"](family), adapter_name="prompt"), "prompt")
    two.set_classes(CLASSES, word_tokenizer())
    images = {"pixel_values": family.inputs()["pixel_values"]}
    with torch.no_grad():
        first = two(**images).logits
        one.set_adapter("other")
        other = two(**images).logits
        assert distance(other, first) > 1e-3
        one.set_adapter("default")
        assert torch.equal(two(**images).logits, first)
        one.set_adapter("other")
        two.set_classes(CLASSES[:2], word_tokenizer())
        torch.testing.assert_close(two(**images).logits, other[:, :2])
