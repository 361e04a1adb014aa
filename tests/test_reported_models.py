"""What people do with models that aren't bare, whole or transformers' own, and what the doctor and a compression say."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from case import declared
from families import FAMILIES, VOCAB
from methods import CLASSES, METHODS, distance, home, run, trace, word_tokenizer, wrap
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import peft_multimodal
from peft_multimodal import (
    AuroraModeApproxConfig,
    AuroraModeApproxModel,
    HardSampleDomainAdapterConfig,
    StructuredPromptConfig,
    describe,
    load,
    matched_modules,
)
from peft_multimodal.core.anatomy import unread_layers
from peft_multimodal.core.registry import METHODS as REGISTERED
from peft_multimodal.doctor import examine

CLIP, LLAVA = FAMILIES["clip"], FAMILIES["llava"]
each_method = pytest.mark.parametrize("method", METHODS)


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


# ------------------------------------------------------------------------------------------------- models in a wrapper


@each_method
@pytest.mark.parametrize("wrapper", [compiled, nn.DataParallel])
def test_wrap_a_model_that_is_compiled_already(method: str, wrapper: Any):
    """Refused, with the order that works; to be looked at, the model needn't be taken out."""
    family = home(method)
    base = family.build()
    wrapped, config = wrapper(base), METHODS[method](family)
    before = trace(base)
    with pytest.raises(
        ValueError, match=rf"{type(base).__name__} is wrapped in {type(wrapped).__name__}.*adapter first"
    ):
        get_peft_model(wrapped, config)
    assert trace(base) == before
    assert list(matched_modules(wrapped, config)) == list(matched_modules(base, config))
    assert describe(wrapped).towers == describe(base).towers


@pytest.mark.parametrize(
    "method", ["aurora_mode_approx", "cross_lingual_adapter", "gated_xattn", "hard_sample_domain_adapter"]
)
def test_load_into_a_model_with_compiled_towers(method: str, tmp_path: Any):
    family = home(method)
    adapted = wrap(family, method)
    adapted.save_pretrained(tmp_path)
    base = family.build()
    for path in family.towers.values():
        parent, _, name = path.rpartition(".")
        setattr(base.get_submodule(parent), name, compiled(base.get_submodule(path)))
    loaded = PeftModel.from_pretrained(base, tmp_path)
    with torch.compiler.set_stance("force_eager"):  # what is loaded matters here
        assert distance(run(family, loaded), run(family, adapted)) < 1e-6


# ------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("aurora_mode_approx", {}),
        ("hard_sample_domain_adapter", {}),
        ("structured_prompt", {}),
        ("structured_prompt", {"order": "GID"}),
        ("structured_prompt", {"shortlist": 2}),
    ],
)
def test_export_with_a_batch_of_any_size(method: str, changes: dict):
    model = wrap(CLIP, method, **changes).eval()
    if method == "structured_prompt":
        model.set_classes(CLASSES, word_tokenizer())

    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            if method == "structured_prompt":
                return self.model(pixel_values=pixel_values).logits
            return self.model.get_image_features(pixel_values=pixel_values).pooler_output

    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    exported = torch.export.export(
        Images(), (torch.randn(3, 3, 16, 16),), dynamic_shapes=(batch,), strict=False
    ).module()
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        assert distance(exported(x), Images()(x)) < 1e-5


# ------------------------------------------------------------------------------------------------- open_clip's layout


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attn(x, x, x, need_weights=False)[0]


class OpenClip(nn.Module):
    """`visual`, `transformer` and `encode_text`, and no config."""

    def __init__(self) -> None:
        super().__init__()
        self.context_length = 8
        self.visual = nn.Sequential(
            nn.Conv2d(3, 24, 8, 8), nn.Flatten(2), Turned(), nn.Sequential(Block(24), Block(24))
        )
        self.transformer = nn.Sequential(Block(32), Block(32))
        self.token_embedding = nn.Embedding(VOCAB, 32)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual(images).mean(1)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        assert text.shape[1] == self.context_length
        return self.transformer(self.token_embedding(text)).mean(1)

    def forward(self, images: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encode_image(images), self.encode_text(text)


class Turned(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_adapt_one_tower_of_an_open_clip_model(tower: str):
    base = OpenClip()
    images, text = torch.randn(2, 3, 16, 16), torch.randint(VOCAB, (2, 8))
    with torch.no_grad():
        before = base(images, text)
    assert {t.name: t.path for t in describe(base).towers} == {"vision": "visual", "text": "transformer"}
    model = get_peft_model(base, AuroraModeApproxConfig(r=2, towers=[tower], dropout=0.0))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert ("visual" in name) == (tower == "vision") or "shared" in name
            nn.init.normal_(parameter)
    with torch.no_grad():
        moved = [distance(a, b) > 1e-3 for a, b in zip(model(images, text), before, strict=True)]
    assert moved == [tower == "vision", tower == "text"]


def test_an_open_clip_model_whose_text_cannot_be_run():
    class Strange(OpenClip):
        def encode_text(self, text: torch.Tensor) -> torch.Tensor:
            raise TypeError("text must be strings")

    with pytest.raises(ValueError, match=r"has no config.*encode_text .* fails: text must be strings"):
        matched_modules(Strange(), AuroraModeApproxConfig(towers=["vision"]))


def test_a_model_without_config_or_encode_text():
    """The text's layers are no part of the vision tower."""

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = OpenClip()
            self.visual, self.transformer, self.words = inner.visual, inner.transformer, inner.token_embedding

    found = matched_modules(Custom(), AuroraModeApproxConfig(towers=["vision"]))
    assert {m.module.partition(".")[0] for m in found} == {"visual"}


# ------------------------------------------------------------------------------------------------- one field alone


@pytest.mark.parametrize("method", REGISTERED)
def test_each_number_of_a_config_can_be_set_alone(method: str):
    """No default forbids what another field may be. `num_heads` follows the width; more domains need to say of what."""
    config = REGISTERED[method].config
    fields = {f.name: f.default for f in dataclasses.fields(config)}
    needed = {"media_token_id": 0} if "media_token_id" in fields else {}
    numbers = [
        n for n, default in fields.items() if type(default) is int and n not in ("format_version", "num_domains")
    ]
    for name in numbers:
        for value in (1, 2, 3, 6, 7, 100):
            made = config(**{**needed, name: value})
            assert getattr(made, name) == value
            assert type(dataclasses.asdict(made).get("num_heads", 1)) is int


@pytest.mark.parametrize("num_general", [0, 1, 2, 3, 4, 9])
def test_any_number_of_general_tokens_starts_from_the_default_words(num_general: int):
    model = get_peft_model(CLIP.build(), StructuredPromptConfig(num_general=num_general, attention_dim=6))
    assert model.peft_config["default"].num_heads == 3
    tokenizer = word_tokenizer()
    model.set_classes(["w4"], tokenizer)
    context = model.base_model.classifier().structured_prompt_context["default"].general
    if num_general:
        words = tokenizer("a photo of a", add_special_tokens=False).input_ids[-num_general:]
        start = CLIP.build().text_model.embeddings.token_embedding(torch.tensor(words))
        assert distance(context[-len(words) :], start) == 0
    chosen = StructuredPromptConfig(num_general=2, general_init="w4 w5 w6", attention_dim=4)
    with pytest.raises(ValueError, match="is 3 tokens, but num_general is 2"):
        get_peft_model(CLIP.build(), chosen).set_classes(["w4"], tokenizer)


# ------------------------------------------------------------------------------------------------- layers nobody reads


@pytest.mark.parametrize("method", ["aurora_mode_approx", "hard_sample_domain_adapter"])
@pytest.mark.parametrize(("read", "last"), [(-2, 1), (-1, 2), (1, 0), ([-3, -2], 1), ([0, 3], 2)])
def test_layers_behind_the_one_that_is_read_are_left_out(method: str, read: Any, last: int):
    config = copy.deepcopy(LLAVA.build().config)
    config.vision_feature_layer = read
    base = hf.LlavaForConditionalGeneration(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(base, METHODS[method](LLAVA))
    said = [str(w.message) for w in caught if "gets no gradient" in str(w.message)]
    assert len(said) == (last < 2)
    layers = {
        m.module.split("layers.")[1][0] for m in matched_modules(base, METHODS[method](LLAVA)) if m.tower == "vision"
    }
    assert layers == {str(i) for i in range(last + 1)}
    LLAVA.loss(model).backward()
    if method == "aurora_mode_approx":
        assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_layer_of_other_families_is_taken_to_be_unread(name: str):
    base = FAMILIES[name].build()
    assert bool(unread_layers(base, describe(base))) == (name == "llava")


@pytest.mark.parametrize("method", ["aurora_mode_approx", "hard_sample_domain_adapter"])
def test_layers_that_nobody_reads_by_name_and_from_files(method: str, tmp_path: Any):
    """Who names them gets them, with a warning; an adapter that has them loads."""
    targets = (
        {"target_modules": [f"layers.{i}" for i in range(3)]} if "hard" in method else {"target_modules": ["v_proj"]}
    )
    with pytest.warns(UserWarning, match=r"layers\.2 gets no gradient. The adapter has parts there"):
        model = wrap(LLAVA, method, **targets)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*gets no gradient")
        loaded = load(LLAVA.build(), tmp_path)
    assert any(
        "vision_tower.encoder.layers.2" in n for n, _ in loaded.named_parameters() if loaded.base_model.prefix in n
    )
    assert distance(run(LLAVA, loaded), run(LLAVA, model)) == 0


# ------------------------------------------------------------------------------------------------- parts of a model


@pytest.mark.parametrize("method", ["aurora_mode_approx", "hard_sample_domain_adapter"])
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_an_adapter_of_a_whole_model_on_one_of_its_towers(method: str, tower: str, tmp_path: Any):
    base = CLIP.build()
    kind = {"vision": hf.CLIPVisionModel, "text": hf.CLIPTextModel}[tower]

    def alone() -> torch.nn.Module:
        return kind(getattr(base.config, f"{tower}_config"))

    wrap(CLIP, method).save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match=rf"its {tower} tower alone: .*towers=\['{tower}'\]"):
        load(alone(), tmp_path / "whole")
    wrap(CLIP, method, towers=[tower]).save_pretrained(tmp_path / "tower")
    load(alone(), tmp_path / "tower")  # as the message says


def test_the_tokenizer_of_another_model():
    model = get_peft_model(CLIP.build(), StructuredPromptConfig(general_init=None, attention_dim=4))
    with pytest.raises(
        ValueError, match=f"knows {VOCAB + 40} tokens, the text tower {VOCAB}: it belongs to another model"
    ):
        model.set_classes(["w4"], word_tokenizer(size=VOCAB + 40))
    model.set_classes(["w4"], word_tokenizer())

    text = hf.CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=900, eos_token_id=899)  # fmt: skip
    big = hf.CLIPModel(
        hf.CLIPConfig(text_config=text, vision_config=CLIP.build().config.vision_config, projection_dim=16)
    )
    model = get_peft_model(big, StructuredPromptConfig(general_init=None, attention_dim=4))
    with (
        pytest.warns(UserWarning, match=f"knows {VOCAB} tokens, the text tower 900: it looks like another model's"),
        pytest.raises(ValueError, match="doesn't read what stands in a text: its config looks for eos_token_id 899"),
    ):
        model.set_classes(["w4"], word_tokenizer())  # its texts don't end where the tower pools


# ------------------------------------------------------------------------------------------------- the doctor


def test_the_doctor_on_models_of_one_kind():
    vision, lm = hf.CLIPVisionModel(CLIP.build().config.vision_config), LLAVA.build().model.language_model
    reasons = {m: r["reason"] for m, r in examine(vision).methods.items() if not r["fits"]}
    assert "nothing in it reads text" in reasons["CrossLingualAdapter"]
    assert "train this one" not in reasons["CrossLingualAdapter"]
    reason = examine(lm).methods["HardSampleDomainAdapter"]["reason"]
    assert "encoders" in reason
    assert "decoder (2 attentions)" in reason
    assert "nothing." not in reason


@each_method
def test_the_doctor_on_a_model_with_an_adapter(method: str):
    family = home(method)
    model = wrap(family, method)
    report = examine(model)
    data = json.loads(json.dumps(report.as_dict()))
    ours = data["adapters"]["default"]
    counts = ours["towers"].values()
    assert (ours["method"], ours["active"]) == (declared()[method].method.title, True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(c["parameters"] for c in counts) == sum(c["trained"] for c in counts) == trained
    assert all(t["trained"] == ours["towers"].get(t["name"], {"trained": 0})["trained"] for t in data["towers"])
    base = {t.name: t.parameters for t in describe(family.build()).towers}
    assert {t["name"]: t["parameters"] for t in data["towers"]} == base  # the adapter is no part of it
    assert f"adapter 'default' ({ours['method']}, active)" in str(report)
    assert f"{trained:,}" in str(report) or len(counts) > 1


def test_the_doctor_on_an_adapter_of_pefts_own():
    model = get_peft_model(CLIP.build(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    found = examine(model).adapters["mine"]
    assert (found["method"], set(found["towers"])) == ("LORA", {"vision", "text"})


def test_json_is_data_not_prose():
    report = json.loads(json.dumps(examine(CLIP.build()).as_dict()))
    assert report["methods"]["AuroraModeApprox"]["places"]["text q"] == 2
    assert {t["name"]: t["trained"] == t["parameters"] > 0 for t in report["towers"]} == {"vision": True, "text": True}


# ------------------------------------------------------------------------------------------------- compressing a LoRA


def test_a_compressed_lora_says_what_was_lost():
    def lora() -> PeftModel:
        torch.manual_seed(0)
        model = get_peft_model(CLIP.build(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        small = next(m for n, m in model.named_modules() if n.endswith("text_model.encoder.layers.0.self_attn.q_proj"))
        small.lora_B["default"].weight.data *= 1e-4  # hardly changed: lost as a whole, and no harm done
        return model

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*too small for this LoRA")
        _, errors = AuroraModeApproxModel.from_lora(lora(), AuroraModeApproxConfig(r=12))
    assert errors.total < 0.3
    assert str(errors).startswith(f"relative error of the updates: {errors.total:.2g} in all; by module ")
    assert f"to {max(errors.values()):.2g} (" in str(errors)

    with pytest.warns(UserWarning, match=r"r=1 is too small for this LoRA.*An error of 0.3 needs r=\d+ at least"):
        _, errors = AuroraModeApproxModel.from_lora(lora(), AuroraModeApproxConfig(r=1))
    assert errors.total > 0.3
    assert max(errors.values()) >= errors.total


# ------------------------------------------------------------------------------------------------- names


def test_the_package_shows_its_own_names():
    public = {name for name in dir(peft_multimodal) if not name.startswith("__")}
    assert public == {name for name in peft_multimodal.__all__ if not name.startswith("__")}
    assert issubclass(HardSampleDomainAdapterConfig, peft_multimodal.MultimodalConfig)
    code = "import peft_multimodal; print(*dir(peft_multimodal))"  # before anything lazy is loaded
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert public == {name for name in printed.split() if not name.startswith("__")}
