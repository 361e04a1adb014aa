"""Exported LoRAs: they load without this package and compute what the adapter does, and nothing is left out in silence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from case import declared
from exported import tensors
from families import FAMILIES, text_tower, tiny
from methods import METHODS, distance, home, run, stir, wrap
from peft import LoHaConfig, LoraConfig, PeftConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_multimodal import AdapterError, AuroraModeApproxConfig, TowerPolicy, export_lora
from peft_multimodal.files.servers import SERVERS

HERE = Path(__file__).parent
LORA = [name for name, case in declared().items() if case.promises.lora and "-" not in name]
LLAVA = FAMILIES["llava"]


def files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def products(folder: Path) -> dict[str, Tensor]:
    """{module: scale B A} of a LoRA folder whose modules have one scale."""
    config, weights = files(folder)
    scale = config["lora_alpha"] / config["r"]
    names = {re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", key) for key in weights}
    pair = {n: [weights[f"base_model.model.{n}.lora_{f}.weight"] for f in "BA"] for n in names}
    return {name: scale * (B.double() @ A.double()) for name, (B, A) in pair.items()}


def updates(model: PeftModel, *names: str) -> dict[str, Tensor]:
    """{module: the sum of the adapters' updates}, by the tuner's own algebra."""
    layers = {p: m for p, m in model.get_base_model().named_modules() if hasattr(m, "base_layer")}
    return {p: sum(m.get_delta_weight(n).double() for n in names) for p, m in layers.items()}  # type: ignore[misc]


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], within: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=within * float(value.abs().max()))


# ------------------------------------------------------------------------------------------- without this package


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without this package finds in the exports of all families."""
    root = tmp_path_factory.mktemp("exported")
    for method in LORA:
        for name in declared()[method].families():
            family, folder = FAMILIES[name], root / name
            base = family.build()
            kept = {"class": type(base).__name__, "config": base.config, "batch": family.inputs()}
            kept["weights"] = {key: value.clone() for key, value in base.state_dict().items()}
            model = wrap(family, method, base=base)
            export_lora(model, folder / "lora")
            with torch.no_grad():
                kept["outputs"] = tensors(model(**kept["batch"]))
            torch.save(kept, folder / "kept.pt")
    command = [sys.executable, "-W", "ignore", str(HERE / "exported.py"), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_nobody_imports_this_package(loaded: dict[str, Any]):
    assert loaded["imported"] is False


@pytest.mark.parametrize("name", declared()["aurora_mode_approx"].families())
def test_stock_peft_computes_the_same(name: str, loaded: dict[str, Any]):
    found = loaded["families"][name]
    assert found["adapted"] <= 1e-5
    assert found["merged"] <= 1e-5
    assert found["base"] > 1e-3


# --------------------------------------------------------------------------------------------------- exact factors


@pytest.mark.parametrize(
    "changes",
    [
        {"share": "none"},
        {"share": "per_modality"},
        {"alpha": None},
        {"core": "tucker"},
        {"target_modules": ["q_proj", "out_proj"], "towers": ["decoder"]},
    ],
)
def test_the_factors_are_the_update(changes: dict[str, Any], tmp_path: Path):
    model = wrap(LLAVA, "aurora_mode_approx", **changes)
    export_lora(model, tmp_path)
    assert_equal(products(tmp_path), updates(model, "default"))


@pytest.mark.parametrize(("share", "rank"), [("per_letter", 12), ("per_modality", 8)])
def test_letters_in_one_matrix_have_the_ranks_of_their_groups(share: str, rank: int, tmp_path: Path):
    """Phi-3 keeps q, k and v in one matrix: three groups by letter. By shape k and v, narrower than q, are of one group."""
    config = hf.Phi3Config(**text_tower(32, num_key_value_heads=2))
    base = tiny(hf.Phi3ForCausalLM, config)()
    model = stir(get_peft_model(base, AuroraModeApproxConfig(r=4, alpha=8.0, dropout=0.0, share=share)))
    export_lora(model, tmp_path / "peft")
    written, _ = files(tmp_path / "peft")
    assert written["r"] == written["lora_alpha"] == rank
    assert_equal(products(tmp_path / "peft"), updates(model, "default"))
    stock = PeftModel.from_pretrained(tiny(hf.Phi3ForCausalLM, config)(), tmp_path / "peft")
    tokens = torch.arange(4, 12)[None]
    assert distance(stock(tokens).logits, model(tokens).logits) < 1e-5


def test_matrices_stored_the_other_way_round(tmp_path: Path):
    config = hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)
    model = stir(get_peft_model(tiny(hf.GPT2LMHeadModel, config)(), AuroraModeApproxConfig(r=4, dropout=0.0)))
    export_lora(model, tmp_path)
    assert files(tmp_path)[0]["fan_in_fan_out"] is True
    stock = PeftModel.from_pretrained(tiny(hf.GPT2LMHeadModel, config)(), tmp_path)
    tokens = torch.arange(4, 12)[None]
    assert distance(stock(tokens).logits, model(tokens).logits) < 1e-5
    assert distance(stock.merge_and_unload()(tokens).logits, model(tokens).logits) < 1e-5


def test_modules_of_several_ranks(tmp_path: Path):
    """GPT-2's fused matrix has three groups under share="none", its output projection one."""
    config = hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)
    aurora = AuroraModeApproxConfig(r=4, dropout=0.0, share="none", target_modules=["c_attn", "attn.c_proj"])
    model = stir(get_peft_model(tiny(hf.GPT2LMHeadModel, config)(), aurora))
    export_lora(model, tmp_path / "peft")
    written, _ = files(tmp_path / "peft")
    assert {written["r"], *written["rank_pattern"].values()} == {4, 12}
    tokens = torch.arange(4, 12)[None]
    stock = PeftModel.from_pretrained(tiny(hf.GPT2LMHeadModel, config)(), tmp_path / "peft")
    assert distance(stock(tokens).logits, model(tokens).logits) < 1e-5
    export_lora(model, tmp_path / "sglang", target="sglang")  # which has one rank for all
    written, weights = files(tmp_path / "sglang")
    assert not written["rank_pattern"]
    assert {len(w) for key, w in weights.items() if "lora_A" in key} == {12}
    assert_equal(products(tmp_path / "sglang"), updates(model, "default"))


class Nested(nn.Module):
    """Whose one linear module is called as another one's path ends."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"query": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["query"](self.query(x))


@pytest.mark.parametrize("exclude", [["inner.query"], []])
def test_a_path_that_another_one_ends_in(exclude: list[str], tmp_path: Path):
    torch.manual_seed(0)
    base = Nested()
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    config = AuroraModeApproxConfig(r=2, dropout=0.0, target_modules="all-linear", exclude_modules=exclude)
    model = stir(get_peft_model(base, config))
    export_lora(model, tmp_path)
    fresh = Nested()
    fresh.load_state_dict(weights)
    stock = PeftModel.from_pretrained(fresh, tmp_path)
    x = torch.randn(3, 8)
    assert distance(stock(x), model(x)) < 1e-6
    assert hasattr(stock.get_base_model().inner["query"], "lora_A") is not bool(exclude)


def test_several_adapters_become_their_sum(tmp_path: Path):
    model = wrap(LLAVA, "aurora_mode_approx")
    model.add_adapter("other", AuroraModeApproxConfig(r=3, alpha=6.0, dropout=0.0, towers=["decoder"]))
    stir(model, "other", seed=1)
    export_lora(model, tmp_path, adapter_name=["default", "other"])
    layers = updates(model, "default")
    decoder = {p for p in layers if "language_model" in p}
    both = updates_of(model, decoder, "default", "other") | updates_of(model, layers.keys() - decoder, "default")
    _, weights = files(tmp_path)
    ranks = {key: len(w) for key, w in weights.items() if "lora_A" in key}
    assert {7 if "language_model" in key else 4 for key in ranks} == set(ranks.values())
    stock = PeftModel.from_pretrained(LLAVA.build(), tmp_path)
    found = {
        p: m.get_delta_weight("default").double() for p, m in stock.get_base_model().named_modules() if p in layers
    }
    assert_equal(found, both)


def updates_of(model: PeftModel, paths: Any, *names: str) -> dict[str, Tensor]:
    base = model.get_base_model()
    return {p: sum(base.get_submodule(p).get_delta_weight(n).double() for n in names) for p in paths}  # type: ignore[misc]


def test_a_lora_beside_it_is_written_too(tmp_path: Path):
    inner = get_peft_model(
        LLAVA.build(), LoraConfig(r=2, lora_alpha=6, target_modules=["o_proj"], init_lora_weights=False), "stock"
    )
    model = stir(get_peft_model(inner, AuroraModeApproxConfig(r=4, dropout=0.0)))
    expected = run(LLAVA, model)
    export_lora(model, tmp_path, adapter_name=["default", "stock"])
    stock = PeftModel.from_pretrained(LLAVA.build(), tmp_path)
    assert distance(run(LLAVA, stock), expected) < 1e-5


@pytest.mark.parametrize("outer", ["aurora", "lora"])
def test_an_adapter_of_the_inner_model_is_not_left_out(outer: str, tmp_path: Path):
    """The outer PeftModel names its own adapters alone as active."""
    stock = LoraConfig(r=2, lora_alpha=6, target_modules=["o_proj"], init_lora_weights=False)
    steps = [("default", AuroraModeApproxConfig(r=4, dropout=0.0)), ("stock", stock)]
    model: Any = LLAVA.build()
    for name, config in steps if outer == "lora" else steps[::-1]:
        model = get_peft_model(model, config, name)
    stir(model.base_model.model if outer == "lora" else model)
    assert len(model.active_adapters) == 1
    export_lora(model, tmp_path)
    assert distance(run(LLAVA, PeftModel.from_pretrained(LLAVA.build(), tmp_path)), run(LLAVA, model)) < 1e-5


def test_a_lora_inside_a_module_that_is_trained_whole(tmp_path: Path):
    inner = get_peft_model(LLAVA.build(), LoraConfig(r=2, target_modules=["linear_1"]), "stock")
    model = get_peft_model(inner, AuroraModeApproxConfig(r=4, modules_to_save=["multi_modal_projector"]))
    with pytest.raises(ValueError, match=r"multi_modal_projector is trained whole.*'stock' acts inside.*Merge"):
        export_lora(model, tmp_path / "x", adapter_name=["default", "stock"])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (6e4, torch.float16)])
def test_numbers_that_are_not_finite_are_not_written(value: float, dtype: torch.dtype, tmp_path: Path):
    config = AuroraModeApproxConfig(r=4, alpha=16.0, dropout=0.0)
    model = get_peft_model(LLAVA.build().to(dtype), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "aurora_mode_approx_V" in name:
                parameter.fill_(value)
    with pytest.raises(ValueError, match=rf"not finite in {str(dtype).removeprefix('torch.')}.*float\(\)"):
        export_lora(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_keep_the_dtype(dtype: torch.dtype, tmp_path: Path):
    base = LLAVA.build().to(dtype)
    config = AuroraModeApproxConfig(r=4, alpha=8.0, dropout=0.0)
    model = stir(get_peft_model(base, config, autocast_adapter_dtype=False))
    export_lora(model, tmp_path)
    _, weights = files(tmp_path)
    assert {value.dtype for value in weights.values()} == {dtype}
    assert_equal(products(tmp_path), updates(model, "default"), within=2e-2)


def test_a_merged_adapter_is_written_as_it_is(tmp_path: Path):
    model = wrap(LLAVA, "aurora_mode_approx")
    expected = updates(model, "default")
    model.merge_adapter()
    export_lora(model, tmp_path)
    assert_equal(products(tmp_path), expected)


# -------------------------------------------------------------------------------------------------- for servers


@pytest.mark.parametrize("r", [1, 4, 48])
def test_ranks_are_filled_up_for_the_server(r: int, tmp_path: Path):
    model = wrap(LLAVA, "aurora_mode_approx", r=r, towers=["decoder"])
    export_lora(model, tmp_path, target="vllm")
    written, weights = files(tmp_path)
    assert written["r"] == written["lora_alpha"] == min(n for n in SERVERS["vllm"].ranks if n >= r)
    assert {len(w) for key, w in weights.items() if "lora_A" in key} == {written["r"]}
    renamed = {
        k.replace("model.language_model", "language_model.model"): v for k, v in updates(model, "default").items()
    }
    assert_equal(products(tmp_path), renamed)


def test_names_are_those_of_the_checkpoint(tmp_path: Path):
    """As transformers itself writes them."""
    LLAVA.build().save_pretrained(tmp_path / "base")
    checkpoint = load_file(tmp_path / "base" / "model.safetensors")
    with pytest.warns(UserWarning, match="enable-tower-connector-lora"):
        export_lora(wrap(LLAVA, "aurora_mode_approx"), tmp_path / "lora", target="vllm")
    names = products(tmp_path / "lora")
    assert len(names) == 12
    assert {f"{name}.weight" for name in names} <= checkpoint.keys()
    assert files(tmp_path / "lora")[0]["target_modules"] == ["k_proj", "q_proj", "v_proj"]


def test_weights_that_the_checkpoint_holds_in_another_form_are_refused(tmp_path: Path, monkeypatch):
    import peft_multimodal.files.export as export

    monkeypatch.setattr(export, "released_names", lambda model, paths: dict.fromkeys(paths))
    with pytest.raises(ValueError, match=r"in another form.*target='peft'"):
        export_lora(wrap(LLAVA, "aurora_mode_approx", towers=["decoder"]), tmp_path / "x", target="vllm")


# ----------------------------------------------------------------------------------------- nothing dropped in silence


def test_what_is_no_update_is_refused_and_dropped_by_name(tmp_path: Path):
    family = FAMILIES["blip_retrieval"]
    model = wrap(family, "aurora_mode_approx-fusion")
    with pytest.raises(ValueError, match=r"'gqt'.*'ice'.*drop=\['gqt', 'ice'\]"):
        export_lora(model, tmp_path / "lora")
    with pytest.raises(ValueError, match="'ice'"):
        export_lora(model, tmp_path / "lora", drop=["gqt"])
    assert not (tmp_path / "lora").exists()
    export_lora(model, tmp_path / "lora", drop=["gqt", "ice"])
    assert "gqt, ice" in (tmp_path / "lora" / "README.md").read_text()
    stock = run(family, PeftModel.from_pretrained(family.build(), tmp_path / "lora"))
    model.merge_adapter(cp_only=True)
    assert distance(stock, run(family, model.merge_and_unload(cp_only=True))) < 1e-5


def test_whole_modules_go_along_or_are_dropped_by_name(tmp_path: Path):
    config = AuroraModeApproxConfig(r=4, dropout=0.0, modules_to_save=["multi_modal_projector"])
    model = stir(get_peft_model(LLAVA.build(), config))
    with torch.no_grad():
        for parameter in model.get_base_model().model.multi_modal_projector.modules_to_save.parameters():
            parameter.add_(0.1)
    export_lora(model, tmp_path / "peft")
    stock = PeftModel.from_pretrained(LLAVA.build(), tmp_path / "peft")
    assert distance(run(LLAVA, stock), run(LLAVA, model)) < 1e-5
    with pytest.raises(ValueError, match=r"'modules_to_save': .*multi_modal_projector.*target='peft'"):
        export_lora(model, tmp_path / "vllm", target="vllm")
    export_lora(model, tmp_path / "vllm", target="vllm", drop=["modules_to_save", "vision"])
    assert files(tmp_path / "vllm")[0]["modules_to_save"] is None


def test_a_tower_that_the_server_does_not_take(tmp_path: Path):
    model = wrap(LLAVA, "aurora_mode_approx")
    with pytest.raises(ValueError, match=r"SGLang has no place.*'vision': LoRA in 6 modules.*drop=\['vision'\]"):
        export_lora(model, tmp_path / "lora", target="sglang")
    export_lora(model, tmp_path / "lora", target="sglang", drop=["vision"])
    assert len(products(tmp_path / "lora")) == 6
    with pytest.raises(ValueError, match=r"Nothing of this adapter is in a language model.*[Mm]erge"):
        export_lora(wrap(FAMILIES["clip"], "aurora_mode_approx"), tmp_path / "clip", target="vllm")
    with pytest.raises(ValueError, match="leaves nothing"):
        export_lora(model, tmp_path / "none", drop=["vision", "decoder"])


def test_the_connector_is_none_of_the_language_model_and_the_head_is(tmp_path: Path):
    config = LoraConfig(r=2, target_modules=["linear_1", "lm_head"])
    model = get_peft_model(LLAVA.build(), config)
    with pytest.raises(ValueError, match=r"'connector': LoRA in 1 modules of the connector.*drop=\['connector'\]"):
        export_lora(model, tmp_path / "lora", target="sglang")
    export_lora(model, tmp_path / "lora", target="sglang", drop=["connector"])
    assert files(tmp_path / "lora")[0]["target_modules"] == ["lm_head"]


def test_a_policy_is_told_the_way_out(tmp_path: Path):
    model = TowerPolicy(decoder=AuroraModeApproxConfig(r=4)).apply(LLAVA.build())
    with pytest.raises(ValueError, match=r"is a TowerPolicy.*merge_and_unload"):
        export_lora(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_names_that_are_not_there(tmp_path: Path):
    model = wrap(LLAVA, "aurora_mode_approx")
    with pytest.raises(ValueError, match=r"drop=\['vison'\].*'vision'"):
        export_lora(model, tmp_path / "x", drop=["vison"])
    with pytest.raises(ValueError, match="target must be one of 'peft', 'vllm'"):
        export_lora(model, tmp_path / "x", target="tgi")
    with pytest.raises(ValueError, match=r"No such adapter: \['other'\]"):
        export_lora(model, tmp_path / "x", adapter_name="other")
    with pytest.raises(TypeError, match="PeftModel"):
        export_lora(LLAVA.build(), tmp_path / "x")  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("method", [name for name, case in declared().items() if not case.promises.lora])
def test_methods_that_are_no_lora_say_so(method: str, tmp_path: Path):
    model = wrap(home(method), method)
    with pytest.raises(ValueError, match=r"is no LoRA.*To\s+serve it, run transformers"):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    assert not model.supports_lora_conversion()


@pytest.mark.parametrize("method", METHODS)
def test_layers_give_factors_where_the_method_promises_them(method: str):
    model = wrap(home(method), method)
    layers = [layer for layer in model.base_model.own_layers() if layer.has_adapter("default")]
    gives = any(layer.lora_factors("default") is not None for layer in layers)
    assert gives is declared()[method].promises.lora


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "use_dora"),
        (LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"), "bias"),
        (LoraConfig(r=2, target_modules=["embed_tokens"]), "embed_tokens"),
        (LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (
            LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [4]}),
            "trainable_token_indices",
        ),
    ],
)
def test_kinds_of_lora_that_are_not_written(config: PeftConfig, says: str, tmp_path: Path):
    with pytest.raises(ValueError, match=says):
        export_lora(get_peft_model(LLAVA.build(), config), tmp_path / "x")


# -------------------------------------------------------------------------------------------------------- the folder


def test_the_trained_adapter_is_not_written_over(tmp_path: Path):
    model = wrap(LLAVA, "aurora_mode_approx")
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(AdapterError, match=r"holds an adapter of AURORA_MODE_APPROX.*another folder"):
        export_lora(model, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "other", [TowerPolicy(decoder=AuroraModeApproxConfig(r=4)), LoHaConfig(target_modules=["q_proj"])]
)
def test_no_other_adapter_is_written_over(other: Any, tmp_path: Path):
    get_peft_model(LLAVA.build(), other).save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(AdapterError, match="another folder"):
        export_lora(wrap(LLAVA, "aurora_mode_approx"), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_an_interrupted_export_leaves_the_old_files(tmp_path: Path, monkeypatch):
    model = wrap(LLAVA, "aurora_mode_approx")
    export_lora(model, tmp_path / "lora")
    (tmp_path / "lora" / "notes.txt").write_text("kept")
    before = {p.name: p.read_bytes() for p in (tmp_path / "lora").iterdir()}

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    stir(model, seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(LoraConfig, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_lora(model, tmp_path / "lora")
    assert {p.name: p.read_bytes() for p in (tmp_path / "lora").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]
    export_lora(model, tmp_path / "lora")
    after = {p.name: p.read_bytes() for p in (tmp_path / "lora").iterdir()}
    assert after["notes.txt"] == b"kept"
    assert after["adapter_model.safetensors"] != before["adapter_model.safetensors"]


def test_the_card(tmp_path: Path):
    tmp_path.joinpath("README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    model = wrap(LLAVA, "aurora_mode_approx")
    for _ in range(2):
        export_lora(model, tmp_path, target="sglang", drop="vision")
    card = (tmp_path / "README.md").read_text()
    assert card.count("A LoRA of rank 4, exported by `peft-multimodal`") == 1
    for text in ("license: mit", "library_name: peft", "Mine.", "AuroraModeApprox", "--max-lora-rank 4", "vision"):
        assert text in card
    assert "import peft_multimodal" not in card


def test_auto_classes_know_the_base(tmp_path: Path):
    family = FAMILIES["clip"]
    family.build().save_pretrained(tmp_path / "base")
    model = wrap(family, "aurora_mode_approx", base=hf.CLIPModel.from_pretrained(tmp_path / "base"))
    export_lora(model, tmp_path / "lora")
    from peft import AutoPeftModel

    loaded = AutoPeftModel.from_pretrained(tmp_path / "lora")
    assert isinstance(loaded.get_base_model(), hf.CLIPModel)
    assert distance(run(family, loaded), run(family, model)) < 1e-5


# ---------------------------------------------------------------------------------------------- PEFT's own conversion


def test_peft_asks_whether_it_is_a_lora():
    family = FAMILIES["blip_retrieval"]
    model = wrap(family, "aurora_mode_approx")
    assert model.supports_lora_conversion() is True
    model.add_adapter("fusion", declared()["aurora_mode_approx-fusion"].config(family))  # type: ignore[arg-type]
    assert model.supports_lora_conversion() is True
    assert model.base_model.supports_lora_conversion("fusion") is False
    model.set_adapter("fusion")
    assert model.supports_lora_conversion() is False


def test_peft_converts_it_by_svd(tmp_path: Path):
    """Exact from the adapter's rank on."""
    model = wrap(LLAVA, "aurora_mode_approx", target_modules=["q_proj", "v_proj"])
    save_as_lora(tmp_path, model, rank=4)
    beside = {key: value for key, value in files(tmp_path)[1].items() if "self_attn" not in key}
    assert not any(value.any() for key, value in beside.items() if "lora_B" in key)  # of the shared factors: nothing
    stock = PeftModel.from_pretrained(LLAVA.build(), tmp_path)
    assert distance(run(LLAVA, stock), run(LLAVA, model)) < 1e-4
    assert distance(run(LLAVA, stock), run(LLAVA, LLAVA.build())) > 1e-2


def test_what_peft_cannot_convert_leads_to_the_export():
    with pytest.raises(TypeError, match=r"names its target_modules.*export_lora"):
        convert_to_lora(wrap(LLAVA, "aurora_mode_approx"), rank=4)
    config = hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)
    aurora = AuroraModeApproxConfig(r=4, target_modules=["c_attn"])
    with pytest.raises(TypeError, match=r"do not support LoRA conversion.*AuroraLinear"):
        convert_to_lora(get_peft_model(tiny(hf.GPT2LMHeadModel, config)(), aurora), rank=4)
    fusion = wrap(FAMILIES["blip_retrieval"], "aurora_mode_approx-fusion", target_modules=["query", "value"])
    with pytest.raises(TypeError, match=r"do not support LoRA conversion.*GatedQueryTransformation"):
        convert_to_lora(fusion, rank=4)
