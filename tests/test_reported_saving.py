"""What users do with files: several kinds of adapters on one model, files that don't fit, no network, the Hub in training.

Each test is one thing that somebody has tried. What can't work is refused, and then the model is as it was.
"""

from __future__ import annotations

import json
import re
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from families import FAMILIES, Family, tiny
from methods import METHODS, distance, home, run, stir, trace, wrap
from peft import AutoPeftModel, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_multimodal
from peft_multimodal import AdapterCallback, AdapterError, AuroraModeApproxConfig, ContrastiveTrainer, load, save
from peft_multimodal.doctor import examine

NAMES = [method for method in METHODS if "-" not in method]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LLAMA = hf.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    tie_word_embeddings=False,
)  # fmt: skip
IDS = torch.arange(4, 12)[None]


def llama(**changes: Any) -> hf.LlamaForCausalLM:
    return tiny(hf.LlamaForCausalLM, hf.LlamaConfig(**{**LLAMA.to_dict(), **changes}))()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def state(model: nn.Module) -> dict[str, Any]:
    """All that a refused file might have changed: modules, values, dtypes, and which of them are one."""
    tensors = {n: (p.clone(), p.dtype, id(p)) for n, p in model.named_parameters(remove_duplicate=False)}
    return {"modules": trace(model), "tensors": tensors}


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    assert after["modules"] == before["modules"]
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (value, dtype, which) in before["tensors"].items():
        now, now_dtype, now_which = after["tensors"][name]
        assert (now_dtype, now_which) == (dtype, which), name
        assert torch.equal(now, value), name


# --------------------------------------------------------------------------------- PEFT's own adapters beside ours

# By family: the attention of the text, norms and heads; what lies inside layers that GatedXAttn wraps, and what outside.
PLACES = {
    "blip_retrieval": {"attention": ["query", "key"], "norm": ["LayerNorm"], "head": "itm_head"},
    "clip": {"attention": ["q_proj", "k_proj"], "norm": ["layer_norm1"], "head": "visual_projection"},
    "llava": {"attention": ["q_proj", "k_proj"], "norm": ["input_layernorm"], "head": "lm_head"},
}
STOCK: dict[str, Callable[[dict[str, Any]], peft.PeftConfig]] = {
    "LoRA": lambda p: peft.LoraConfig(r=2, target_modules=p["attention"]),
    "DoRA": lambda p: peft.LoraConfig(r=2, target_modules=p["attention"], use_dora=True),
    "IA3": lambda p: peft.IA3Config(target_modules=p["attention"], feedforward_modules=[]),
    "OFT": lambda p: peft.OFTConfig(oft_block_size=4, target_modules=p["attention"]),
    "VeRA": lambda p: peft.VeraConfig(r=2, target_modules=p["attention"][:1]),
    "LN tuning": lambda p: peft.LNTuningConfig(target_modules=p["norm"]),
    "whole modules": lambda p: peft.LNTuningConfig(target_modules=p["outside"], modules_to_save=[p["head"]]),
}
OUTSIDE = {"blip_retrieval": ["post_layernorm"], "clip": ["post_layernorm"], "llava": ["post_layernorm", "layer_norm2"]}


def stock(family: Family, kind: str, model: nn.Module) -> PeftModel:
    places = {**PLACES[family.name], "outside": OUTSIDE[family.name]}
    return shaken(get_peft_model(model, STOCK[kind](places), adapter_name="stock"), "stock")


def ours(family: Family, method: str, model: nn.Module, **changes: Any) -> PeftModel:
    return wrap(family, method, base=model, adapter_name="ours", **changes)


@torch.no_grad()
def shaken(model: PeftModel, name: str) -> PeftModel:
    generator = torch.Generator().manual_seed(5)
    for key, parameter in model.named_parameters():
        if f".{name}." in f"{key}.":
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def comes_back(family: Family, model: PeftModel, order: tuple[str, str], folder: Path) -> None:
    """Saved by the stock call and by ours, both adapters load by the stock call and by ours."""
    want = run(family, model)
    for by, other in ((PeftModel.save_pretrained, PeftModel.from_pretrained), (save, load)):
        by(model, folder / by.__name__)
        loaded: Any = family.build()
        for name in order:
            loaded = other(loaded, folder / by.__name__ / name, adapter_name=name)
        assert distance(run(family, loaded.eval()), want) <= 1e-6


# A layer is put around what these are stored in, or (VeRA) they keep something outside the model.
REFUSED = {
    *((method, "VeRA") for method in NAMES),
    *((method, kind) for method in ("aurora_mode_approx", "gated_xattn") for kind in ("LoRA", "DoRA", "IA3", "OFT")),
    ("gated_xattn", "LN tuning"),
}


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("method", NAMES)
def test_ours_around_a_stock_adapter(method: str, kind: str, tmp_path: Path):
    family = home(method)
    model = stock(family, kind, family.build())
    first, before = run(family, model), state(model)
    if (method, kind) in REFUSED:
        with pytest.raises(ValueError, match=r"'stock' \(\w+\).*(loaded again|outside the model).*merge_and_unload"):
            ours(family, method, model)
        assert_untouched(model, before)
        assert list(model.peft_config) == ["stock"]
        assert distance(run(family, model), first) == 0
        return
    comes_back(family, ours(family, method, model).eval(), ("stock", "ours"), tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in STOCK if kind != "VeRA"])
@pytest.mark.parametrize("method", NAMES)
def test_a_stock_adapter_around_ours(method: str, kind: str, tmp_path: Path):
    """PEFT itself makes the second call: what it accepts comes back."""
    family = home(method)
    places = {**PLACES[family.name], "outside": OUTSIDE[family.name], "norm": ["layer_norm1", "LayerNorm"]}
    model = get_peft_model(ours(family, method, family.build()), STOCK[kind](places), adapter_name="stock")
    comes_back(family, shaken(model, "stock"), ("ours", "stock"), tmp_path)


@pytest.mark.parametrize("method", NAMES)
def test_whole_modules_of_ours_below_a_stock_adapter(method: str, tmp_path: Path):
    """PEFT switches them off: it can't be saved from there, the doctor says so, and its own PeftModel saves it."""
    family = home(method)
    places = PLACES[family.name]
    first = shaken(ours(family, method, family.build(), modules_to_save=[places["head"]]), "ours")
    want = run(family, first)
    both = get_peft_model(first, STOCK["LoRA"](places), adapter_name="stock")
    with pytest.raises(ValueError, match=r"'ours' trains modules_to_save=.*stock.*selected_adapters=\['ours'\]"):
        both.save_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match="modules_to_save"):
        save(both, tmp_path / "both")
    assert any("'ours' trains modules_to_save" in finding.what for finding in examine(both).findings)
    first.save_pretrained(tmp_path, selected_adapters=["ours"])
    assert distance(run(family, load(family.build(), tmp_path / "ours").eval()), want) <= 1e-6


@pytest.mark.parametrize("method", ["aurora_mode_approx", "gated_xattn", "hard_sample_domain_adapter"])
def test_a_second_method_leaves_whole_modules_of_the_first_on(method: str):
    family = home(method)
    first = stock(family, "whole modules", family.build())
    want = run(family, first)
    both = wrap(family, method, stirred=False, base=first, adapter_name="ours")  # the identity at its start
    assert distance(run(family, both), want) == 0
    (wrapper,) = (m for m in both.modules() if isinstance(m, ModulesToSaveWrapper))
    assert wrapper.active_adapters == ["stock"]
    assert all(p.requires_grad for p in wrapper.modules_to_save.parameters())
    both.add_adapter("more", METHODS[method](family))
    both.set_adapter("more")
    assert wrapper.active_adapters == ["stock"]


def test_biases_of_a_stock_adapter_do_not_move():
    """Trained biases are stored under their modules' paths, also where the adapter's layers are elsewhere."""
    family = FAMILIES["clip"]
    config = peft.LoraConfig(r=2, target_modules=["fc1"], bias="all")
    model = get_peft_model(family.build(), config, adapter_name="stock")
    before = state(model)
    with pytest.raises(ValueError, match=r"_proj belongs to adapter 'stock' \(LORA\)"):
        ours(family, "aurora_mode_approx", model)
    assert_untouched(model, before)
    ours(family, "hard_sample_domain_adapter", model)  # puts nothing around modules


@pytest.mark.parametrize("method", ["aurora_mode_approx", "hard_sample_domain_adapter", "structured_prompt"])
def test_beside_trained_tokens_peft_saves_nothing_else(method: str, tmp_path: Path):
    family = FAMILIES["clip"]
    tokens = peft.LoraConfig(r=2, target_modules=["fc1"], trainable_token_indices={"token_embedding": [5, 6]})
    model = get_peft_model(family.build(), tokens, adapter_name="stock")
    before = state(model)
    with pytest.raises(ValueError, match=r"token_embedding has rows that an adapter trains.*merge_and_unload"):
        ours(family, method, model)
    assert_untouched(model, before)
    both = get_peft_model(ours(family, method, family.build()), tokens, adapter_name="stock")
    with pytest.raises(ValueError, match=r"\('stock': LORA\) trains rows of .*token_embedding.*can't save 'ours'"):
        both.save_pretrained(tmp_path)
    both.save_pretrained(tmp_path, selected_adapters=["stock"])


def test_no_prompt_encoder_is_left_behind():
    model = get_peft_model(llama(), peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    before = state(model)
    with pytest.raises(ValueError, match=r"'default' \(PROMPT_TUNING\) keeps weights outside the model's layers"):
        get_peft_model(model, AuroraModeApproxConfig(r=2), adapter_name="ours")
    assert_untouched(model, before)


def test_ours_around_a_stock_adapter_around_ours():
    lora = peft.LoraConfig(r=2, target_modules=["down_proj"])
    model = get_peft_model(get_peft_model(llama(), AuroraModeApproxConfig(r=2)), lora, adapter_name="stock")
    with pytest.raises(ValueError, match=r"was put around a PeftModel.*that one last"):
        get_peft_model(model, METHODS["gated_xattn"](FAMILIES["llava"]), adapter_name="eyes")
    with pytest.raises(ValueError, match=r"belongs to adapter 'stock' \(LORA\)"):
        model.base_model.model.add_adapter("more", AuroraModeApproxConfig(r=2, target_modules=["down_proj"]))


# ------------------------------------------------------------------------------------------- modules_to_save that aren't


# By family: a module written wrongly, the right one, and a bare parameter.
SLIPS = {
    "blip_retrieval": ("itm_hed", "itm_head", "class_embedding"),
    "clip": ("vison_model", "vision_model", "logit_scale"),
    "llava": ("lm_hed", "lm_head", "class_embedding"),
}


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("slip", ["typo", "list", "parameter"])
def test_modules_to_save_that_nothing_would_train(method: str, slip: str):
    family = home(method)
    typo, meant, parameter = SLIPS[family.name]
    name, message = {
        "typo": (typo, rf"no module of this name\. Did you mean '{meant}'\? At its top there are .*named_modules"),
        "list": ("layers", r"a ModuleList, which is no module that runs\. Name its modules: .*\.layers\.0"),
        "parameter": (
            parameter,
            rf"bare parameter \(.*{parameter}\).*requires_grad_\(True\).*No adapter file holds it",
        ),
    }[slip]
    model = family.build()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, METHODS[method](family, modules_to_save=[name]))
    assert_untouched(model, before)
    assert all(p.requires_grad for p in model.parameters())


def test_a_loaded_config_is_a_template(tmp_path: Path):
    """What is written into it afterwards isn't looked for in the file, and has to exist."""
    family = FAMILIES["clip"]
    wrap(family, "aurora_mode_approx").save_pretrained(tmp_path)
    config = AuroraModeApproxConfig.from_pretrained(tmp_path)
    config.modules_to_save = ["visual_projection"]
    model = get_peft_model(family.build(), config)
    assert any(isinstance(m, ModulesToSaveWrapper) for m in model.modules())
    config = AuroraModeApproxConfig.from_pretrained(tmp_path)
    config.modules_to_save = ["visual_projektion"]
    with pytest.raises(ValueError, match="Did you mean 'visual_projection'"):
        get_peft_model(family.build(), config)


@pytest.mark.parametrize("whole", ["token_embedding", "text_model.embeddings", "embeddings"])
def test_prompts_are_not_passed_over_by_a_trained_embedding(whole: str):
    family = FAMILIES["clip"]
    model = family.build()
    before = state(model)
    with pytest.raises(ValueError, match=r"token_embedding\) is in modules_to_save=.*prompts.*passed over"):
        wrap(family, "structured_prompt", base=model, modules_to_save=[whole])
    assert_untouched(model, before)
    other = wrap(family, "hard_sample_domain_adapter", modules_to_save=[whole], adapter_name="other")
    tokens = peft.TrainableTokensConfig(target_modules=["token_embedding"], token_indices=[5])
    lora = peft.LoraConfig(r=2, target_modules=["token_embedding"])
    for below in (other, *(get_peft_model(family.build(), c, adapter_name="other") for c in (tokens, lora))):
        with pytest.raises(ValueError, match=r"token_embedding.* is trained by another adapter"):
            ours(family, "structured_prompt", below)
        assert list(below.peft_config) == ["other"]


def test_the_logit_scale_trains_as_the_message_says():
    family = FAMILIES["clip"]
    model = wrap(family, "aurora_mode_approx")
    model.get_base_model().logit_scale.requires_grad_(True)
    family.loss(model).backward()
    assert model.get_base_model().logit_scale.grad.abs() > 0


def test_two_methods_do_not_train_one_module():
    family = home("hard_sample_domain_adapter")
    model = stock(family, "whole modules", family.build())
    before = state(model)
    with pytest.raises(ValueError, match="itm_head is trained by the adapter of another method already"):
        ours(family, "hard_sample_domain_adapter", model, modules_to_save=["itm_head"])
    assert_untouched(model, before)


def test_heads_that_peft_adds_by_the_task_need_not_exist():
    config = AuroraModeApproxConfig(r=2, task_type="SEQ_CLS")
    model = get_peft_model(
        hf.LlamaForSequenceClassification(hf.LlamaConfig(**{**LLAMA.to_dict(), "pad_token_id": 0})), config
    )
    assert any(isinstance(m, ModulesToSaveWrapper) for m in model.modules())


# ----------------------------------------------------------------------------------------------- files that don't fit


def by_set_state_dict(base: nn.Module, folder: Path) -> None:
    model = get_peft_model(base, AuroraModeApproxConfig(r=2, modules_to_save=["lm_head"]))
    before = state(model)
    try:
        set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    finally:
        assert_untouched(model, before)
        base.lm_head = base.lm_head.original_module
        model.unload()


def by_auto(base: nn.Module, folder: Path) -> None:
    AutoPeftModel.from_pretrained(folder)


def by_load_adapter(base: nn.Module, folder: Path) -> None:
    model = get_peft_model(base, AuroraModeApproxConfig(r=2), adapter_name="first")
    output = logits(model)
    try:
        model.load_adapter(folder, "second")
    finally:
        assert list(model.peft_config) == ["first"]
        assert distance(logits(model), output) == 0
        model.unload()


WAYS = {
    "load": load,
    "from_pretrained": PeftModel.from_pretrained,
    "low_cpu_mem_usage": lambda base, folder: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True),
    "config=": lambda base, folder: PeftModel.from_pretrained(
        base, folder, config=peft.PeftConfig.from_pretrained(folder)
    ),
    "load_adapter": by_load_adapter,
    "set_peft_model_state_dict": by_set_state_dict,
    "AutoPeftModel": by_auto,
}


def of_another_size(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = torch.zeros(72, 32)


def of_integers(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = tensors[key].to(torch.int32)


def with_nan(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key][0, 0] = float("nan")


def without(tensors: dict[str, Tensor], key: str) -> None:
    del tensors[key]


FAULTS = {
    of_another_size: r"has shape \(72, 32\), the model needs \(64, 32\).*resize_token_embeddings\(72\)",
    of_integers: r"holds torch\.int32, the model needs torch\.float32",
    with_nan: "holds NaN",
    without: r"modules_to_save=\['lm_head'\], but its .* has no lm_head\.weight\. Restore",
}


@pytest.mark.parametrize(
    ("fault", "key", "way"),
    [
        (fault, key, way)
        for key in ("lm_head.weight", "model.embed_tokens.weight")
        for fault in FAULTS
        for way in WAYS
        # What a file lacks is known where its folder is.
        if fault is not without or (key == "lm_head.weight" and way != "config=")
    ],
)
def test_a_file_that_does_not_fit_leaves_the_base_as_it_was(fault: Callable, key: str, way: str, tmp_path: Path):
    llama().save_pretrained(tmp_path / "base")
    base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    folder = tmp_path / "adapter"
    model = get_peft_model(base, AuroraModeApproxConfig(r=2, modules_to_save=["lm_head"]))
    model.save_pretrained(folder, save_embedding_layers=True)
    tensors = load_file(folder / WEIGHTS)
    fault(tensors, f"base_model.model.{key}")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    output, before = logits(base), state(base)
    by_peft = way == "set_peft_model_state_dict" and fault is without  # PEFT stumbles before it asks us
    with pytest.raises(KeyError if by_peft else ValueError, match="lm_head" if by_peft else FAULTS[fault]):
        WAYS[way](base, folder)
    assert distance(logits(base), output) == 0
    if way in ("load", "from_pretrained", "low_cpu_mem_usage", "config="):
        assert all(p.requires_grad for p in base.parameters())
    if way != "load_adapter":  # there the layers were another adapter's
        before["modules"] = {k: v for k, v in before["modules"].items() if k}
        after = state(base)
        assert {k: v for k, v in after["modules"].items() if k} == before["modules"]
        assert {k: v[1:] for k, v in after["tensors"].items()} == {k: v[1:] for k, v in before["tensors"].items()}


@pytest.mark.parametrize("way", ["load", "from_pretrained", "low_cpu_mem_usage"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_embeddings_stay_tied_and_in_the_dtype_of_the_base(way: str, dtype: torch.dtype, tmp_path: Path):
    model = get_peft_model(llama(tie_word_embeddings=True), AuroraModeApproxConfig(r=2))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    base = llama(tie_word_embeddings=True).to(dtype)
    loaded = WAYS[way](base, tmp_path)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert base.lm_head.weight.dtype == dtype
    assert torch.equal(base.lm_head.weight, model.get_input_embeddings().weight.to(dtype))
    assert logits(loaded).isfinite().all()


@pytest.mark.parametrize("way", ["load", "from_pretrained"])
def test_whole_modules_of_a_file_in_float32_load_into_a_base_in_bfloat16(way: str, tmp_path: Path):
    model = get_peft_model(llama(), AuroraModeApproxConfig(r=2, modules_to_save=["lm_head"]))
    shaken(model, "default").save_pretrained(tmp_path)
    loaded = WAYS[way](llama().to(torch.bfloat16), tmp_path)
    assert distance(logits(loaded), logits(model)) < 0.2


@pytest.mark.parametrize("way", ["load", "from_pretrained", "low_cpu_mem_usage"])
def test_a_whole_module_with_an_infinite_mask_loads(way: str, tmp_path: Path):
    """Only what is trained has to be finite."""

    def masked() -> nn.Module:
        base = llama()
        base.lm_head.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
        return base

    model = get_peft_model(masked(), AuroraModeApproxConfig(r=2, modules_to_save=["lm_head"]))
    shaken(model, "default").save_pretrained(tmp_path)
    assert distance(logits(WAYS[way](masked(), tmp_path)), logits(model)) <= 1e-6


# ------------------------------------------------------------------------------------------------ saving asks nobody


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Who was asked for; nobody answers."""
    asked: list[Any] = []

    def nobody(host: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(host)
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    # Where the tests run offline, PEFT doesn't come to it.
    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", nobody)
    return asked


@pytest.mark.parametrize("method", NAMES)
def test_saving_does_not_ask_the_hub(method: str, network: list[Any], tmp_path: Path):
    family = home(method)
    base = family.build()
    base.name_or_path = base.config._name_or_path = "someone/base"
    model = wrap(family, method, base=base)
    save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "stock")
    get_peft_model_state_dict(model)
    assert model.peft_config["default"].base_model_name_or_path == "someone/base"
    for folder in ("ours", "stock"):
        assert json.loads((tmp_path / folder / CONFIG).read_text())["base_model_name_or_path"] == "someone/base"
    assert network == []


def test_resized_embeddings_of_a_base_in_the_cache_are_saved(network: list[Any], tmp_path: Path, monkeypatch):
    repository = tmp_path / "models--someone--llama"
    llama().config.save_pretrained(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base = llama()
    base.name_or_path = "someone/llama"
    for size, saved in ((64, False), (72, True)):
        base.resize_token_embeddings(size)
        model = get_peft_model(base, AuroraModeApproxConfig(r=2))
        tensors = get_peft_model_state_dict(model)
        assert ("base_model.model.model.embed_tokens.weight" in tensors) is saved
        assert model.peft_config["default"].base_model_name_or_path == "someone/llama"
        base = model.unload()
    assert network == []


@pytest.mark.parametrize("method", METHODS)
def test_unload_gives_the_base_also_where_a_module_was_trained_as_a_whole(method: str):
    """PEFT's own methods leave the trained copy in the model; of these it is documented that the base comes back."""
    family = home(method)
    base = family.build()
    whole = [path for path, m in base.named_modules() if not list(m.children()) and list(m.parameters())][-1]
    model = stir(wrap(family, method, modules_to_save=[whole]))
    trained = [p for name, p in model.named_parameters() if ".modules_to_save." in name]
    assert trained
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(1)
    unloaded = model.unload()
    assert unloaded.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(tensor, unloaded.state_dict()[key]) for key, tensor in base.state_dict().items())


# ------------------------------------------------------------------------------------------- the Hub during training


class FakeHub:
    """What is uploaded, as it is then: {commit message: {path: bytes}}."""

    def __init__(self) -> None:
        self.uploads: dict[str, dict[str, bytes]] = {}

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, folder_path: str, commit_message: str, **options: Any) -> Any:
        files = (f for f in Path(folder_path).rglob("*") if f.is_file() and "checkpoint-" not in str(f))
        self.uploads[commit_message] = {str(f.relative_to(folder_path)): f.read_bytes() for f in files}
        return SimpleNamespace(done=lambda: True, result=lambda: None, exception=lambda: None)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = torch.tensor([1, 4 + i, 5, 63])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.full((3, 16, 16), i / 8),
        }


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    return {**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}, "return_loss": True}


def training(folder: Path, **options: Any) -> hf.TrainingArguments:
    return hf.TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=4, save_steps=1, use_cpu=True, report_to="none",
        disable_tqdm=True, remove_unused_columns=False, label_names=[], **options,
    )  # fmt: skip


@pytest.mark.parametrize("trainer_class", [ContrastiveTrainer, hf.Trainer])
@pytest.mark.parametrize("name", ["default", "mine"])
def test_push_to_hub_during_training(trainer_class: type, name: str, tmp_path: Path, monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    model = wrap(FAMILIES["clip"], "aurora_mode_approx", adapter_name=name)
    args = training(tmp_path / "run", push_to_hub=True, hub_model_id="me/adapter")
    callbacks = [AdapterCallback()] if trainer_class is hf.Trainer else None
    trainer = trainer_class(model, args, train_dataset=Rows(), data_collator=collate, callbacks=callbacks)
    trainer.train()
    place = "" if name == "default" else f"{name}/"
    for step in (1, 2):
        files = hub.uploads[f"Training in progress, step {step}"]
        assert {f"{place}{WEIGHTS}", f"{place}{CONFIG}", "README.md"} <= set(files)
        assert b'peft_multimodal.load(base, "me/adapter"' in files["README.md"]
    trainer.push_to_hub()
    files = hub.uploads["End of training"]
    assert f"{place}{WEIGHTS}" in files
    if trainer_class is hf.Trainer:  # its card is its own, and ours comes back with the next save
        save(model, tmp_path / "run")
        card = (tmp_path / "run" / "README.md").read_text()
    else:
        card = files["README.md"].decode()
    assert card.index("import peft_multimodal") < card.index("Training hyperparameters")
    assert card.count("import peft_multimodal") == 1
    assert (f'subfolder="{name}"' in card) is (name != "default")


def test_the_card_says_what_works(tmp_path: Path):
    save(wrap(FAMILIES["clip"], "aurora_mode_approx"), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "`pip install .` in the folder of its sources" in card
    assert "pip install peft-multimodal" not in card


# -------------------------------------------------------------------------------------------- names and wrong calls


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("name", ["pt", "ro", "da", "a", "adapter", "aurora", "de"])
def test_names_inside_a_prefix_and_frozen_encoders_draw_no_warning(method: str, name: str, tmp_path: Path):
    family = home(method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = wrap(family, method, adapter_name=name)
        model.save_pretrained(tmp_path)
        for way in (load, PeftModel.from_pretrained):
            loaded = way(family.build(), tmp_path / name, adapter_name=name)
            assert distance(run(family, loaded.eval()), run(family, model.eval())) <= 1e-6
        assert loaded.load_adapter(tmp_path / name, f"{name}2").missing_keys == []
    said = [str(w.message) for w in caught if re.search("prefix|missing|reinit", str(w.message))]
    assert said == []


def test_what_else_an_adapter_lacks_is_still_missed(tmp_path: Path):
    """Nothing is given back in place of an adapter's own weights."""
    wrap(FAMILIES["clip"], "aurora_mode_approx", adapter_name="a").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    del tensors[next(iter(tensors))]
    save_file(tensors, tmp_path / "a" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing"):
        load(FAMILIES["clip"].build(), tmp_path / "a", adapter_name="a")


def test_load_takes_a_model_first(tmp_path: Path):
    with pytest.raises(TypeError, match=r"takes the base model itself first, got 'model-id' \(str\)"):
        load("model-id", "aurora")
    with pytest.raises(AdapterError):
        load(llama(), tmp_path / "aurora")


def test_resuming_from_another_run(tmp_path: Path):
    for method, resume in (("aurora_mode_approx", None), ("hard_sample_domain_adapter", True)):
        model = wrap(FAMILIES["clip"], method)
        trainer = ContrastiveTrainer(model, training(tmp_path), train_dataset=Rows(), data_collator=collate)
        if resume:
            with pytest.raises(ValueError, match=r"checkpoint-2 is another run's.*output_dir of its own"):
                trainer.train(resume_from_checkpoint=resume)
        else:
            trainer.train()
    stock = hf.Trainer(model, training(tmp_path), train_dataset=Rows(), data_collator=collate)
    with pytest.raises(ValueError, match=r"None of its keys is this method's.*output_dir of its own"):
        stock.train(resume_from_checkpoint=peft_multimodal.last_checkpoint(tmp_path))


def test_each_block_of_the_documentation_has_an_output_folder_of_its_own():
    root = Path(__file__).parent.parent
    folders = [
        folder
        for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]
        for folder in re.findall(r'TrainingArguments\(\s*"([^"]+)"', page.read_text())
    ]
    assert len(folders) > 10
    assert sorted(folders) == sorted(set(folders))
    assert "out" not in folders


# ------------------------------------------------------------------------------------------------------- tied weights


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_tied_head_is_not_merged(merge: str):
    config = AuroraModeApproxConfig(r=2, target_modules=["lm_head", "q_proj"], dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = stir(get_peft_model(llama(tie_word_embeddings=True), config))
    before = state(model)
    with pytest.raises(
        ValueError, match=r"lm_head shares its weight with model\.embed_tokens.*exclude_modules=\['lm_head'\]"
    ):
        getattr(model, merge)()
    assert_untouched(model, before)
    for untied in (
        get_peft_model(llama(), config),
        get_peft_model(
            llama(tie_word_embeddings=True),
            AuroraModeApproxConfig(r=2, target_modules=["lm_head", "q_proj"], exclude_modules=["lm_head"]),
        ),
    ):
        want = logits(stir(untied))
        merged = getattr(untied, merge)()
        assert distance(logits(merged or untied), want) <= 1e-5
