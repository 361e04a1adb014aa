"""What people do with PEFT's own calls: delete, route rows, add up, trace, quantise, ask layers, shard."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from families import FAMILIES, VOCAB, Family, tiny
from methods import CASES, METHODS, adapter, distance, home, inputs, promising, run, stir, wrap
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_multimodal import (
    AuroraModeApproxConfig,
    GatedXAttnConfig,
    HardSampleDomainAdapterConfig,
    StructuredPromptConfig,
    matched_modules,
)
from peft_multimodal.core.parts import AttachedPart

WHOLE = {
    "clip": "visual_projection",
    "llava": "multi_modal_projector",
    "blip_retrieval": "itm_head",
    "llama": "lm_head",
}
each_method = pytest.mark.parametrize("method", METHODS)
ROUTES_ROWS = promising(rows=True)


def wholes(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    return {path: m for path, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}


@torch.no_grad()
def move_wholes(model: nn.Module, adapter_name: str, by: float) -> None:
    for wrapper in wholes(model).values():
        for parameter in wrapper.modules_to_save[adapter_name].parameters():
            parameter.add_(by)


def two(method: str, family: Family) -> Any:
    """Adapters "default", which is active, and "other", each with a trained module beside it."""
    whole = {"modules_to_save": [WHOLE[family.name]]}
    model = wrap(family, method, **whole)
    model.add_adapter("other", METHODS[method](family, **whole))
    stir(model, "other", seed=1)
    move_wholes(model, "default", 0.1)
    move_wholes(model, "other", -0.2)
    return model


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------- they delete an adapter that trained a module beside


@each_method
def test_the_remaining_adapter_keeps_its_trained_module(method: str):
    family = home(method)
    model = two(method, family)
    expected, trains = run(family, model), trained(model)
    model.delete_adapter("other")
    assert [m.active_adapters for m in wholes(model).values()] == [["default"]]
    assert torch.equal(run(family, model), expected)
    assert trained(model) == trains


@each_method
def test_the_next_adapter_brings_its_trained_module(method: str):
    family = home(method)
    model = two(method, family)
    model.set_adapter("other")
    expected, trains = run(family, model), trained(model)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="active"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(run(family, model), expected)
    assert trained(model) == trains
    model.delete_adapter("other")
    assert model.active_adapters == []


@each_method
def test_a_frozen_adapter_stays_frozen_when_another_is_deleted(method: str):
    model = two(method, home(method))
    model.set_requires_grad("default", False)
    model.delete_adapter("other")
    assert not trained(model)


@each_method
def test_the_last_adapter_takes_its_trained_module_along(method: str):
    """So that the next one can bring its own."""
    family = home(method)
    whole = {"modules_to_save": [WHOLE[family.name]]}
    model = wrap(family, method, **whole)
    move_wholes(model, "default", 0.1)
    model.delete_adapter("default")
    assert not wholes(model)
    assert torch.equal(run(family, model.base_model.model), run(family, family.build()))
    model.add_adapter("next", METHODS[method](family, **whole))
    model.set_adapter("next")
    assert [m.active_adapters for m in wholes(model).values()] == [["next"]]


CLASSIFIERS = {
    "SEQ_CLS": hf.BertForSequenceClassification,
    "TOKEN_CLS": hf.BertForTokenClassification,
    "QUESTION_ANS": hf.BertForQuestionAnswering,
}
BERT = hf.BertConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB, num_labels=2
)


@pytest.mark.parametrize("task_type", CLASSIFIERS)
@pytest.mark.parametrize("config", [AuroraModeApproxConfig, HardSampleDomainAdapterConfig])
def test_the_head_that_a_task_brings_stays_trained(config: type, task_type: str):
    small = {"r": 4} if config is AuroraModeApproxConfig else {"bottleneck_dim": 8, "num_heads": 2}
    model = get_peft_model(tiny(CLASSIFIERS[task_type], BERT)(), config(task_type=task_type, **small)).eval()
    model.add_adapter("other", config(task_type=task_type, **small))
    move_wholes(model, "default", 0.5)
    ids = torch.tensor([[1, 5, 6, 2]])

    def output() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids)[0]

    expected = output()
    assert wholes(model)
    model.delete_adapter("other")
    assert torch.equal(output(), expected)


@pytest.mark.parametrize("task_type", CLASSIFIERS)
def test_one_config_of_a_task_serves_models_of_several_sizes(task_type: str, tmp_path):
    config = AuroraModeApproxConfig(r=4, task_type=task_type)
    for width in (32, 16):
        base = tiny(CLASSIFIERS[task_type], hf.BertConfig(**{**BERT.to_diff_dict(), "hidden_size": width}))
        model = get_peft_model(base(), config)
        assert model.peft_config["default"] is not config
        assert config.base_signature is None
        move_wholes(model, "default", 0.5)
        model.save_pretrained(tmp_path / str(width))
        loaded = peft.PeftModel.from_pretrained(base(), tmp_path / str(width)).eval()
        ids = torch.tensor([[1, 5, 6, 2]])
        assert torch.equal(loaded(input_ids=ids)[0], model.eval()(input_ids=ids)[0])


def test_all_layers_choose_the_same_next_adapter():
    """A layer that has not the one which the others have chosen is idle, it doesn't choose a third."""
    family = FAMILIES["clip"]
    model = wrap(family, "hard_sample_domain_adapter")
    model.add_adapter("b", METHODS["hard_sample_domain_adapter"](family, last_layers=1))
    model.add_adapter("c", METHODS["hard_sample_domain_adapter"](family))
    for name in "bc":
        stir(model, name, seed=ord(name))
    model.set_adapter("b")
    expected = run(family, model)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="active"):
        model.delete_adapter("default")
    assert {tuple(m.active_adapters) for m in model.modules() if isinstance(m, BaseTunerLayer)} == {("b",)}
    assert torch.equal(run(family, model), expected)


PEFT_WARNS = ("ignore:You are trying to modify", "ignore:Already found a `peft_config`")


@pytest.mark.filterwarnings(*PEFT_WARNS)
def test_another_methods_trained_module_stays_on():
    """Through a second wrap, and whatever is switched or deleted by the second's own calls."""
    family = FAMILIES["clip"]
    one = wrap(family, "hard_sample_domain_adapter", adapter_name="one", modules_to_save=["visual_projection"])
    move_wholes(one, "one", 0.3)
    expected, trains = run(family, one), trained(one)
    two = get_peft_model(one, METHODS["aurora_mode_approx"](family), adapter_name="two")
    assert trains <= trained(two)
    assert distance(run(family, two), expected) <= 1e-6  # the second starts as the base
    two.add_adapter("three", METHODS["aurora_mode_approx"](family, modules_to_save=["text_projection"]))
    two.set_adapter("three")
    assert trains <= trained(two)
    one.set_requires_grad("one", False)
    two.delete_adapter("three")
    assert not any(".one." in name for name in trained(two))
    assert distance(run(family, two), expected) <= 1e-6


@pytest.mark.filterwarnings(*PEFT_WARNS)
def test_two_methods_dont_train_one_module():
    family, whole = FAMILIES["clip"], {"modules_to_save": ["visual_projection"]}
    one = wrap(family, "hard_sample_domain_adapter", adapter_name="one", **whole)
    expected, before = run(family, one), set(one.state_dict())
    with pytest.raises(ValueError, match=r"visual_projection is trained by the adapter of another method"):
        get_peft_model(one, METHODS["aurora_mode_approx"](family, **whole), adapter_name="two")
    assert set(one.state_dict()) == before
    assert torch.equal(run(family, one), expected)


# ----------------------------------------------------------------------------------- they name an adapter for each row


@pytest.mark.parametrize("method", sorted(ROUTES_ROWS))
def test_each_row_has_its_adapters_trained_module(method: str):
    family = FAMILIES["clip"]
    model = two(method, family)
    names = ["other", "__base__", "default"]
    mixed = run(family, model, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = run(family, model)
        else:
            model.set_adapter(name)
            alone = run(family, model)
        torch.testing.assert_close(mixed[row, row], alone[row, row], atol=1e-5, rtol=1e-5)
        model.set_adapter("default")
        torch.testing.assert_close(run(family, model, adapter_names=names), mixed)
    with model.disable_adapter():
        base = run(family, model)
    assert distance(run(family, model, adapter_names=["__base__"] * 3), base) <= 1e-5
    assert distance(run(family, model), base) > 1e-2


@pytest.mark.parametrize("method", sorted(ROUTES_ROWS))
def test_a_row_whose_adapter_trains_no_module_has_the_base_models(method: str):
    family = FAMILIES["clip"]
    model = wrap(family, method, modules_to_save=["visual_projection"])
    model.add_adapter("plain", METHODS[method](family))
    stir(model, "plain", seed=1)
    move_wholes(model, "default", 0.3)
    model.set_adapter("plain")
    expected = run(family, model)
    assert distance(run(family, model, adapter_names=["plain"] * 3), expected) <= 1e-5
    model.set_adapter("default")
    assert distance(run(family, model, adapter_names=["plain"] * 3), expected) <= 1e-5


def test_a_trained_text_projection_follows_the_language_of_each_row():
    family = FAMILIES["clip"]
    model = wrap(family, "cross_lingual_adapter", modules_to_save=["text_projection"])
    model.add_adapter("other", METHODS["cross_lingual_adapter"](family, modules_to_save=["text_projection"]))
    stir(model, "other", seed=1)
    move_wholes(model, "other", 0.3)
    texts = {k: v for k, v in family.inputs().items() if k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        mixed = model.get_text_features(**texts, adapter_names=["other", "default", "__base__"]).pooler_output
        for row, name in enumerate(["other", "default"]):
            model.set_adapter(name)
            alone = model.get_text_features(**texts).pooler_output
            torch.testing.assert_close(mixed[row], alone[row], atol=1e-5, rtol=1e-5)


def test_a_trained_module_of_other_kinds_is_refused_by_rows():
    family = FAMILIES["clip"]
    model = wrap(family, "hard_sample_domain_adapter", modules_to_save=["post_layernorm"])
    expected = run(family, model)
    with pytest.raises(ValueError, match=r"post_layernorm.*modules_to_save.*set_adapter"):
        run(family, model, adapter_names=["default"] * 3)
    assert torch.equal(run(family, model), expected)


@each_method
@pytest.mark.parametrize("names", [["default"], ["__base__"], ["__base__"] * 7, "default"])
def test_adapter_names_of_a_wrong_length_are_refused(method: str, names: Any):
    family = home(method) if method not in ROUTES_ROWS else FAMILIES["clip"]
    model = wrap(family, method)
    with pytest.raises(ValueError, match="adapter_names"):
        run(family, model, adapter_names=names)


def test_rows_that_one_thread_names_are_not_anothers():
    family = FAMILIES["clip"]
    model = two("hard_sample_domain_adapter", family)
    expected, found = run(family, model), {}
    linear = wholes(model)["base_model.model.visual_projection"]

    def elsewhere(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread() and not found:
            thread = threading.Thread(target=lambda: found.update(output=run(family, model)))
            thread.start()
            thread.join()

    linear.register_forward_hook(elsewhere)
    run(family, model, adapter_names=["other"] * 3)
    assert torch.equal(found["output"], expected)


# ------------------------------------------------------------------------------------------- they add adapters up


def test_adapters_with_trained_modules_are_not_added_up():
    family = FAMILIES["clip"]
    model = two("aurora_mode_approx", family)
    expected, before = run(family, model), set(model.state_dict())
    with pytest.raises(ValueError, match=r"modules_to_save: visual_projection"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    assert list(model.peft_config) == ["default", "other"]
    assert set(model.state_dict()) == before
    assert torch.equal(run(family, model), expected)


def test_types_of_combination():
    family = FAMILIES["clip"]
    model = wrap(family, "aurora_mode_approx")
    with pytest.raises(ValueError, match=r"combination_type='svd' isn't supported.*\"sum\""):
        model.add_weighted_adapter(["default"], [1.0], "whole", combination_type="svd")
    expected = run(family, model)
    for kind in ("sum", "cat"):
        model.add_weighted_adapter(["default"], [1.0], f"by-{kind}", combination_type=kind)
        model.set_adapter(f"by-{kind}")
        assert distance(run(family, model), expected) <= 1e-5


# ---------------------------------------------------------------------------------------- they shard, trace, quantise


@pytest.mark.parametrize(("name", "method"), CASES)
def test_no_parameter_is_of_no_dimension(name: str, method: str):
    """FSDP shards none such."""
    family = FAMILIES[name]
    model = get_peft_model(family.build(), METHODS[method](family))
    assert not [n for n, p in adapter(model).items() if not p.ndim]


def test_gates_are_numbers_in_the_file(tmp_path: Path):
    """As they were written before: older files load, and newer ones load in older versions."""
    family, method = FAMILIES["blip_retrieval"], "aurora_mode_approx-fusion"
    model = wrap(family, method)
    model.save_pretrained(tmp_path)
    gates = {k: v.shape for k, v in load_file(tmp_path / "adapter_model.safetensors").items() if "ga" in k}
    assert len(gates) == 5
    assert set(gates.values()) == {torch.Size([])}
    loaded = peft.PeftModel.from_pretrained(family.build(), tmp_path)
    assert torch.equal(run(family, loaded), run(family, model))


@each_method
def test_every_module_can_be_asked_for_a_weight(method: str):
    model = wrap(home(method), method)
    parts = [m for m in model.modules() if isinstance(m, AttachedPart)]
    assert not any(hasattr(part, name) for part in parts for name in ("weight", "bias", "qweight"))
    for module in model.modules():
        hasattr(module, "weight"), hasattr(module, "bias")


class Traceable(nn.Module):
    """A call by position that gives one tensor."""

    def __init__(self, family: Family, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.family, self.names = model, family, names

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.family.output(self.model(**dict(zip(self.names, tensors, strict=True))))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@each_method
def test_it_is_traced(method: str):
    family = home(method)
    model = wrap(family, method)
    expected, batch = run(family, model), inputs(family, model)
    with torch.no_grad():
        whole = Traceable(family, model, list(batch))
        traced = torch.jit.trace(whole, tuple(batch.values()), check_trace=False, strict=False)
        assert distance(traced(*batch.values()), expected) <= 1e-5


@each_method
def test_it_is_quantised_dynamically(method: str):
    family = home(method)
    model = wrap(family, method)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    error = distance(run(family, quantised), run(family, model))
    assert 0 < error < 0.15 * float(run(family, model).abs().max())


@each_method
def test_casts_of_inputs_can_be_switched_off(method: str):
    family = home(method)
    model = wrap(family, method)
    expected = run(family, model)
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    with disable_input_dtype_casting(model):
        assert not any(layer.cast_input_dtype_enabled for layer in layers)
        assert torch.equal(run(family, model), expected)
    assert all(layer.cast_input_dtype_enabled for layer in layers)


@pytest.mark.parametrize("method", ["aurora_mode_approx", "hard_sample_domain_adapter", "cross_lingual_adapter"])
def test_without_casts_a_layer_meets_the_dtype_that_it_gets(method: str):
    """The adapters are float32 in a bfloat16 model."""
    family = FAMILIES["clip"]
    model = wrap(family, method, base=family.build().bfloat16())
    run(family, model)
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        run(family, model)


# -------------------------------------------------------------------------------------------- they ask layers and classes


def test_a_wrapped_linear_has_its_features():
    """As LoRA's layers have them, for every kind of module that is wrapped."""
    for name in ("clip", "vision_text_dual_encoder", "altclip", "mllama", "florence2"):
        family = FAMILIES[name]
        model = wrap(family, "aurora_mode_approx")
        paths = [m.module for m in matched_modules(family.build(), METHODS["aurora_mode_approx"](family))]
        lora = get_peft_model(family.build(), LoraConfig(r=2, target_modules=paths))
        for path in paths:
            ours, theirs = (m.get_base_model().get_submodule(path) for m in (model, lora))
            assert (ours.in_features, ours.out_features) == (theirs.in_features, theirs.out_features), path
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2))
    layer = get_peft_model(gpt2, AuroraModeApproxConfig(r=2)).base_model.model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (32, 96)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def test_a_wrapped_attention_of_torch_has_its_features():
    ours = get_peft_model(Attention(), AuroraModeApproxConfig(r=2)).base_model.model.attention
    theirs = get_peft_model(Attention(), LoraConfig(r=2, target_modules=["attention"])).base_model.model.attention
    assert (ours.in_features, ours.out_features) == (theirs.in_features, theirs.out_features)


LLAMA = hf.LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB
)
NOTHING = {
    "a name": ("clip", AuroraModeApproxConfig(target_modules=["nope"])),
    "a regex": ("clip", HardSampleDomainAdapterConfig(target_modules="nope.*")),
    "a tower": ("clip", AuroraModeApproxConfig(towers=["decoder"])),
    "layers": ("clip", AuroraModeApproxConfig(target_modules=["q_proj"], layers_to_transform=[9])),
    "all excluded": ("clip", AuroraModeApproxConfig(exclude_modules=".*")),
    "two towers": ("llava", HardSampleDomainAdapterConfig(placement="top")),
    "a decoder": ("clip", GatedXAttnConfig(media_token_id=1, vision_hidden_size=8)),
    "so many layers": ("llama", GatedXAttnConfig(media_token_id=1, vision_hidden_size=8, every_n_layers=9)),
    "a dual encoder": ("llama", StructuredPromptConfig()),
}


@pytest.mark.parametrize("what", NOTHING)
def test_nothing_matched_is_pefts_own_error(what: str):
    name, config = NOTHING[what]
    base = hf.LlamaForCausalLM(LLAMA) if name == "llama" else FAMILIES[name].build()
    for call in (lambda: get_peft_model(base, config), lambda: matched_modules(base, config)):
        with pytest.raises(peft.NoMatchingPeftModuleError):
            call()


@pytest.mark.parametrize("pattern", ["", [], None])
def test_an_empty_pattern_of_layers_is_none(pattern: Any):
    base, options = FAMILIES["clip"].build(), {"target_modules": ["q_proj"], "layers_to_transform": [1]}
    ours = {m.module for m in matched_modules(base, AuroraModeApproxConfig(**options, layers_pattern=pattern))}
    lora = get_peft_model(base, LoraConfig(**options, layers_pattern=None))
    assert ours == set(lora.base_model.targeted_module_names)


@each_method
def test_whether_state_is_shared_is_said_as_peft_means_it(method: str):
    """PEFT refuses to inject such a method, as its own VeRA, before ours would."""
    family = home(method)
    config, model = METHODS[method](family), family.build()
    tuner = wrap(family, method).base_model
    shared = any(parent is tuner.model for parent, _, _ in tuner.attached_parts())  # a store below the model
    assert type(tuner).uses_shared_state == shared
    with pytest.raises(ValueError, match="shared state" if shared else "hangs beside frozen modules"):
        inject_adapter_in_model(config, model)
    tuner = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    with pytest.raises(ValueError, match="shared state" if shared else "hangs beside frozen modules"):
        tuner(model, copy.deepcopy(config), "default")


TASKS = ("FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_CLS", "TOKEN_CLS", None)


@pytest.mark.parametrize("task_type", TASKS)
def test_a_task_type_blames_no_input_that_nobody_gave(task_type: str | None):
    """PEFT's classes name a text model's inputs, as None."""
    family = FAMILIES["clip"]
    model = wrap(family, "structured_prompt", task_type=task_type)
    expected = run(family, wrap(family, "structured_prompt"))
    assert distance(run(family, model), expected) <= 1e-6
