"""One policy for all towers: what it refuses, and what it makes is one adapter for PEFT and the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES, Family
from methods import METHODS, trace
from peft import (
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from test_contract import Rows
from test_parameter_groups import arguments, rates
from torch import Tensor

from peft_multimodal import (
    AdapterCallback,
    AuroraModeApproxConfig,
    HardSampleDomainAdapterConfig,
    StructuredPromptConfig,
    TowerPolicy,
    Train,
    UniAdapterConfig,
    load,
    parameter_groups,
)
from peft_multimodal.core.towers import PLACES, TowerMap

LLAVA, CLIP = FAMILIES["llava"], FAMILIES["clip"]

# Each of them on a family, with every kind of tower in one place or another.
POLICIES: dict[str, tuple[str, Callable[[], TowerPolicy]]] = {
    "one method twice": (
        "clip",
        lambda: TowerPolicy(vision=AuroraModeApproxConfig(r=2), text=AuroraModeApproxConfig(r=5, alpha=10)),
    ),
    "three methods": (
        "llava",
        lambda: TowerPolicy(
            vision=UniAdapterConfig(), connector=Train(lr=2e-5), decoder=LoraConfig(r=3, target_modules=["q_proj"])
        ),
    ),
    "a merger inside the tower": (
        "qwen2_5_vl",
        lambda: TowerPolicy(vision=LoraConfig(r=2, use_dora=True), connector=HRAConfig(r=2), decoder=LoHaConfig(r=2)),
    ),
    "fusion inside the text": (
        "blip_retrieval",
        lambda: TowerPolicy(
            vision=HardSampleDomainAdapterConfig(),
            text=OFTConfig(r=2, oft_block_size=0),
            fusion=AuroraModeApproxConfig(r=3),
        ),
    ),
    "whole towers": ("clip", lambda: TowerPolicy(vision=Train(), connector=Train(lr=1e-5))),
    "whole modules beside": (
        "llama",
        lambda: TowerPolicy(decoder=AuroraModeApproxConfig(r=2, modules_to_save=["lm_head"]), lr={"lm_head": 1e-5}),
    ),
    "scales": (
        "florence2",
        lambda: TowerPolicy(
            text=IA3Config(target_modules=["k_proj", "fc1"], feedforward_modules=["fc1"]), decoder=LoraConfig(r=2)
        ),
    ),
}


@torch.no_grad()
def output(family: Family, model: Any) -> Tensor:
    return family.output(model(**family.inputs(model)))


@torch.no_grad()
def stirred(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def made(name: str) -> tuple[Family, PeftModel]:
    family = FAMILIES[POLICIES[name][0]]
    return family, stirred(POLICIES[name][1]().apply(family.build()))


# ------------------------------------------------------------------------------------------------------- the whole


@pytest.mark.parametrize("name", POLICIES)
def test_it_is_one_adapter_that_is_saved_loaded_switched_off_and_taken_out(name: str, tmp_path: Path) -> None:
    family, model = made(name)
    base = family.build()
    before, adapted = output(family, base), output(family, model)
    assert (adapted - before).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(output(family, model), before)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = PeftModel.from_pretrained(family.build(), tmp_path)
    assert (output(family, again) - adapted).abs().max() <= 1e-5  # OFT makes its rotations anew
    trained = load(family.build(), tmp_path, adapter_name="other", is_trainable=True)
    assert (output(family, trained) - adapted).abs().max() <= 1e-5
    assert trained.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    assert again.get_nb_trainable_parameters()[0] == 0
    assert torch.equal(output(family, model.unload()), before)
    assert trace(again.unload()) == trace(base) | {"": trace(again.unload())[""]}


@pytest.mark.parametrize("name", ["one method twice", "a merger inside the tower", "whole towers", "scales"])
def test_it_merges_as_a_whole(name: str) -> None:
    family, model = made(name)
    adapted = output(family, model)
    if name != "whole towers":  # what trains whole isn't merged in place, as with PEFT
        model.merge_adapter()
        assert (output(family, model) - adapted).abs().max() < 1e-4
        model.unmerge_adapter()
        assert (output(family, model) - adapted).abs().max() < 1e-4
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(family.build())
    assert (output(family, merged) - adapted).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["three methods", "fusion inside the text"])
def test_it_does_not_merge_in_part(name: str) -> None:
    family, model = made(name)
    adapted = output(family, model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="beside"):
            merge()
    assert torch.equal(output(family, model), adapted)


def test_two_policies_on_one_model_are_switched_and_deleted(tmp_path: Path) -> None:
    family, model = made("one method twice")
    first = output(family, model)
    model.add_adapter("other", TowerPolicy(text=LoraConfig(r=2), vision=AuroraModeApproxConfig(r=3)))
    assert torch.equal(output(family, model), first)
    model.set_adapter("other")
    stirred(model)
    second = output(family, model)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(output(family, model), first)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other-" in n)
    model.save_pretrained(tmp_path)
    assert (output(family, PeftModel.from_pretrained(family.build(), tmp_path / "other")) - second).abs().max() < 1e-6
    model.delete_adapter("default")
    assert torch.equal(output(family, model), second)
    assert not [n for n, _ in model.named_parameters() if "default" in n]


def test_another_method_goes_around_it(tmp_path: Path) -> None:
    model = TowerPolicy(decoder=AuroraModeApproxConfig(r=2)).apply(LLAVA.build(), "words")
    both = get_peft_model(model, METHODS["gated_xattn"](LLAVA), adapter_name="images")
    both.save_pretrained(tmp_path)
    assert {p.parent.name for p in tmp_path.glob("*/adapter_model.safetensors")} == {"words", "images"}


# ----------------------------------------------------------------------------------------------------- the Trainer


def test_the_stock_trainer_trains_resumes_and_takes_the_best(tmp_path: Path) -> None:
    policy = TowerPolicy(
        vision=LoraConfig(r=2), connector=Train(lr=2e-4), decoder=AuroraModeApproxConfig(r=2), lr={"vision": 1e-3}
    )

    def trainer(steps: int) -> hf.Trainer:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = policy.apply(LLAVA.build())
        rows = Rows(LLAVA, model)
        options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
        options |= {"load_best_model_at_end": True, "label_names": ["labels"], "lr_scheduler_type": "linear"}
        args = arguments(tmp_path, max_steps=steps, learning_rate=3e-3, **options)
        optimizers: Any = (policy.optimizer(model, args), None)
        sets = {"train_dataset": rows, "eval_dataset": rows}
        return hf.Trainer(model, args, rows.collate, callbacks=[AdapterCallback()], optimizers=optimizers, **sets)

    whole = trainer(4)
    whole.train()
    last = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert last.keys() == again.keys()
    assert all(torch.equal(last[key], again[key]) for key in last)
    best = PeftModel.from_pretrained(LLAVA.build(), str(whole.state.best_model_checkpoint))
    assert torch.equal(output(LLAVA, best), output(LLAVA, whole.model))


def test_each_tower_has_its_learning_rate_and_scales_no_decay() -> None:
    policy = TowerPolicy(
        vision=AuroraModeApproxConfig(r=2),
        connector=Train(lr=2e-5),
        decoder=LoraConfig(r=2, use_dora=True, modules_to_save=["lm_head"]),
        lr={"vision": 1e-3, "decoder": 2e-4, "lm_head": 3e-6},
    )
    model = policy.apply(LLAVA.build())
    args = hf.TrainingArguments("unused", learning_rate=0.5, weight_decay=0.1, use_cpu=True, optim="adamw_torch")
    optimizer = policy.optimizer(model, args)
    found = rates(model, optimizer.param_groups)
    assert {rate for n, (rate, _) in found.items() if "default-vision" in n} == {1e-3}
    assert {rate for n, (rate, _) in found.items() if "default-decoder" in n} == {2e-4}
    assert {rate for n, (rate, _) in found.items() if "multi_modal_projector" in n} == {2e-5}
    assert {rate for n, (rate, _) in found.items() if "lm_head" in n} == {3e-6}
    undecayed = {n for n, (_, decay) in found.items() if not decay}
    assert all(n in undecayed for n in found if "magnitude" in n or "_norm" in n or n.endswith("bias"))
    assert not any(n in undecayed for n in found if "lora_A" in n or "_U." in n)


def test_scales_of_pefts_own_methods_have_no_decay() -> None:
    ia3 = get_peft_model(CLIP.build(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    assert {group["weight_decay"] for group in parameter_groups(ia3, 1e-3, 0.1)} == {0.0}
    lora = get_peft_model(CLIP.build(), LoraConfig(r=1, target_modules=["k_proj"]))
    assert {group["weight_decay"] for group in parameter_groups(lora, 1e-3, 0.1)} == {0.1}


def test_the_table_says_it_before_and_after() -> None:
    policy = TowerPolicy(
        vision="frozen",
        connector=Train(lr=2e-5),
        decoder=LoraConfig(r=4, modules_to_save=["lm_head"]),
        lr={"lm_head": 1e-5},
    )
    base = LLAVA.build()
    state = trace(base)
    before = str(policy.table(base))
    assert trace(base) == state
    assert "frozen" in before
    model = policy.apply(base)
    table = policy.table(model)
    assert str(table) == before
    rows = {row.name: row for row in table.rows}
    assert rows["vision"].trained == 0
    assert rows["connector"].trained == rows["connector"].parameters > 0
    assert rows["decoder"].method == "Lora r=4"
    assert [rows[name].lr for name in ("connector", "decoder", "lm_head")] == [2e-5, None, 1e-5]
    assert sum(row.trained for row in table.rows) == model.get_nb_trainable_parameters()[0]
    assert sum(rows[name].parameters for name in ("vision", "decoder", "connector")) <= sum(
        p.numel() for p in base.parameters()
    )


# ------------------------------------------------------------------------------------------------------- refusals


def test_a_misspelt_tower_is_an_error_that_lists_what_exists() -> None:
    with pytest.raises(TypeError, match=r"'visoin'.*Did you mean 'vision'.*vision, text, fusion, decoder, connector"):
        TowerPolicy(visoin="frozen", text=Train())
    with pytest.raises(ValueError, match=r"lr names \['visoin'\].*vision, text"):
        TowerPolicy(vision=Train(), lr={"visoin": 1e-3})
    with pytest.raises(ValueError, match=r"CLIPModel has no 'decoder'. It has vision, text, connector"):
        TowerPolicy(decoder=LoraConfig()).apply(CLIP.build())


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        ({}, "leaves every tower frozen"),
        ({"text": "forzen"}, "must be 'frozen'"),
        ({"text": Train(), "lr": {"text": -1}}, "positive number"),
        ({"text": LoraConfig(), "lr": {"vision": 1e-3}}, "'vision', which is frozen"),
        ({"text": Train(lr=1e-3), "lr": {"text": 1e-3}}, "two learning rates"),
        ({"text": PromptTuningConfig(num_virtual_tokens=2)}, "outside of a tower"),
        ({"text": VeraConfig()}, "outside of a tower"),
        ({"text": StructuredPromptConfig()}, "isn't an adapter of one tower"),
        ({"text": LoraConfig(bias="all")}, "bias must be 'none'"),
        ({"text": LoraConfig(target_modules=["q"], trainable_token_indices=[1])}, "beyond a tower"),
        ({"text": LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[1])}, "beyond a tower"),
        ({"text": {"peft_type": "LORA", "cls": "os.system"}}, "isn't the config of a LORA adapter"),
        ({"text": {"peft_type": "os.system"}}, "isn't known here"),
        ({"text": {"peft_type": "TOWER_POLICY"}}, "isn't known here"),
    ],
)
def test_what_can_not_be_is_refused_where_it_is_written(towers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TowerPolicy(**towers)


@pytest.mark.parametrize(
    ("family", "towers", "message"),
    [
        ("clip", {"text": LoraConfig(target_modules=["nowhere"])}, "TowerPolicy.text: .*matches nothing.*q_proj"),
        ("clip", {"vision": LoraConfig(r=2), "connector": UniAdapterConfig()}, "TowerPolicy.connector: No module"),
        ("clip", {"vision": LoraConfig(r=2), "text": LoraConfig(target_modules=["layer_norm1"])}, "TowerPolicy.text: "),
        ("clip", {"text": AuroraModeApproxConfig(towers=["vision"])}, "Leave towers out"),
        ("clip", {"text": LoraConfig(r=2, modules_to_save=["nothing"])}, "no module of this name"),
        (
            "llava",
            {"vision": LoraConfig(r=2), "decoder": HardSampleDomainAdapterConfig()},
            "TowerPolicy.decoder: A decoder",
        ),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(family: str, towers: dict[str, Any], message: str) -> None:
    base = FAMILIES[family].build()
    expected = output(FAMILIES[family], base)
    before = trace(base)
    with pytest.raises(ValueError, match=message):
        TowerPolicy(**towers).apply(base)
    assert trace(base) == before
    assert all(p.requires_grad for p in base.parameters())
    assert torch.equal(output(FAMILIES[family], base), expected)


def test_tied_weights_do_not_train_as_a_whole() -> None:
    config = hf.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    )
    config.tie_word_embeddings = True
    with pytest.raises(ValueError, match=r"shares its weight.*tie_word_embeddings=False"):
        TowerPolicy(decoder=Train()).apply(hf.LlamaForCausalLM(config))


def test_a_file_that_lacks_a_tower_is_refused_and_the_base_stays(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    _, model = made("three methods")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "/model.language_model.layers.1" not in k}, file, {"format": "pt"})
    base = LLAVA.build()
    expected = output(LLAVA, base)
    with pytest.raises(ValueError, match="missing: decoder/"):
        load(base, tmp_path)
    assert torch.equal(output(LLAVA, base), expected)


# ------------------------------------------------------------------------------------------------------- the places


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_has_one_place(name: str) -> None:
    base = FAMILIES[name].build()
    towers = TowerMap(base)
    wholes = {place: towers.whole(place) for place in PLACES}
    inside = {path: place for place, paths in wholes.items() for path in paths}
    for parameter, _ in base.named_parameters():
        around = [inside[path] for path in inside if parameter.startswith(f"{path}.")]
        assert len(around) <= 1
        assert around in ([], [towers.place(parameter)])
    for tower, path in FAMILIES[name].towers.items():
        if path and wholes.get(tower):
            assert any(p == path or p.startswith(f"{path}.") or path.startswith(f"{p}.") for p in wholes[tower])


@pytest.mark.parametrize(
    ("family", "connectors"),
    [
        ("clip", ["visual_projection", "text_projection"]),
        ("llava", ["model.multi_modal_projector"]),
        ("qwen2_5_vl", ["model.visual.merger"]),
        ("idefics3", ["model.connector"]),
        ("blip_2", ["language_projection"]),
        ("siglip", []),
        ("llama", []),
    ],
)
def test_connectors(family: str, connectors: list[str]) -> None:
    assert TowerMap(FAMILIES[family].build()).whole("connector") == connectors
