"""HardSampleDomainAdapter's maths against slow and obvious versions; its masks; where it goes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from auto_families import auto_cases
from case import Case
from families import FAMILIES, WORDS, Family
from methods import adapter, distance, run, stir, wrap
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from peft_multimodal import HardSampleBank, HardSampleDomainAdapterConfig, matched_modules
from peft_multimodal.methods.hard_sample_domain_adapter import DomainLayer, DomainPart, DomainTower

METHOD = "hard_sample_domain_adapter"
DUAL = [name for name, family in FAMILIES.items() if family.kind == "dual"]


def parts(model: nn.Module) -> dict[str, DomainPart]:
    return {path: m for path, m in model.named_modules() if isinstance(m, DomainPart)}


# ---------------------------------------------------------------------------------------------------------- the maths


def slow_block(block: nn.Module, a: list[Tensor], looks: list[list[int]]) -> list[Tensor]:
    """A pre-LN transformer layer, token by token; token i looks at the tokens of `looks[i]`."""
    width = len(a[0])
    heads = block.heads
    normed = [F.layer_norm(x, (width,), block.norm_attention.weight, block.norm_attention.bias) for x in a]
    qkv = [block.qkv.weight @ x + block.qkv.bias for x in normed]
    out = []
    for i, x in enumerate(a):
        mixed = []
        for h in range(heads):
            size = width // heads
            q, k, v = ([t[part * width + h * size : part * width + (h + 1) * size] for t in qkv] for part in range(3))
            scores = torch.stack([q[i] @ k[j] / math.sqrt(size) for j in looks[i]]).softmax(0)
            mixed.append(sum(s * v[j] for s, j in zip(scores, looks[i], strict=True)))
        x = x + block.out.weight @ torch.cat(mixed) + block.out.bias
        y = F.layer_norm(x, (width,), block.norm_ffn.weight, block.norm_ffn.bias)
        y = F.gelu(block.ffn[0].weight @ y + block.ffn[0].bias)
        out.append(x + block.ffn[2].weight @ y + block.ffn[2].bias)
    return out


def slow_branch(branch: nn.Module, h: Tensor, looks: list[list[int]]) -> list[Tensor]:
    """The tokens a (m) of one sequence h (L, d)."""
    a = [F.layer_norm(x, (len(x),), branch.norm.weight, branch.norm.bias) for x in h]
    a = [branch.down.weight @ x + branch.down.bias for x in a]
    for block in branch.blocks:
        a = slow_block(block, a, looks)
    return a


@torch.no_grad()
def test_a_layer_against_a_slow_version():
    """h' = h + s TF(LN(h) W_down + b) W_up: causal and padded in CLIP's text tower, neither in its vision tower."""
    family = FAMILIES["clip"]
    model = wrap(family, METHOD, num_layers=2)
    states: dict[str, list[Tensor]] = {}
    for path, part in parts(model).items():
        own = part.stand_in.original
        part.stand_in.original = lambda *args, own=own, path=path, **kw: (
            states.setdefault(path, []).append(own(*args, **kw)) or states[path][-1]
        )
        part.host().register_forward_hook(lambda m, a, out, path=path: states[path].append(out))
    run(family, model)
    mask = family.inputs()["attention_mask"].bool()
    assert not mask.all()
    for path, (before, after) in states.items():
        branch = parts(model)[path].hard_sample_domain_adapter_branch["default"]
        for row in range(3):
            length = before.shape[1]
            looks = [list(range(length))] * length
            if "text" in path:
                looks = [[j for j in range(i + 1) if mask[row, j]] for i in range(length)]
            a = slow_branch(branch, before[row], looks)
            expected = torch.stack(
                [before[row, i] + branch.scale_norm * (branch.up.weight @ a[i]) for i in range(length)]
            )
            seen = mask[row] if "text" in path else slice(None)
            torch.testing.assert_close(after[row][seen], expected[seen], atol=1e-5, rtol=1e-5)
    assert len(states) == 4


@torch.no_grad()
@pytest.mark.parametrize("name", DUAL)
def test_the_top_against_a_slow_version(name: str):
    """y' = y + s mean(a) W_up, over the text's own tokens."""
    family = FAMILIES[name]
    model, base = wrap(family, METHOD, placement="top"), family.build()
    assert all(isinstance(part, DomainTower) for part in parts(model).values())
    assert len(parts(model)) == 2
    inputs = family.inputs()
    for path, part in parts(model).items():
        tower = part.host()
        text = "text" in path
        given = {k: v for k, v in inputs.items() if (k != "pixel_values") == text}
        branch = part.hard_sample_domain_adapter_branch["default"]
        before, after = part.stand_in.original(**given), tower(**given)
        h, pooled = before.last_hidden_state, before.pooler_output
        for row in range(3):
            own = inputs["attention_mask"][row].nonzero().flatten().tolist() if text else list(range(h.shape[1]))
            a = slow_branch(branch, h[row], [own] * h.shape[1])
            mean = sum(a[i] for i in own) / len(own)
            added = branch.scale_norm * (branch.up.weight @ mean)
            if pooled is not None:
                torch.testing.assert_close(after.pooler_output[row], pooled[row] + added, atol=1e-5, rtol=1e-5)
            if len(added) == h.shape[-1]:
                torch.testing.assert_close(after.last_hidden_state[row, 0], h[row, 0] + added, atol=1e-5, rtol=1e-5)
            assert torch.equal(after.last_hidden_state[row, 1:], h[row, 1:])
        plain = tower(**given, return_dict=False)
        assert isinstance(plain, tuple)
        assert torch.equal(plain[0], after.last_hidden_state)
    # Both towers' vectors reach the similarities.
    expected = run(family, base)
    for tower in ("vision", "text"):
        assert distance(run(family, wrap(family, METHOD, placement="top", towers=[tower])), expected) > 1e-3


@pytest.mark.parametrize("placement", ["layer", "top"])
def test_the_start(placement: str):
    family = FAMILIES["clip"]
    model = wrap(family, METHOD, stirred=False, placement=placement)
    family.loss(model).backward()
    for name, parameter in adapter(model).items():
        if name.endswith("up.weight"):
            assert not parameter.any()
            assert parameter.grad.any()  # with s = 0 too, nothing would ever move
        if name.endswith("scale_norm"):
            assert parameter.item() == 1
    assert torch.equal(run(family, model), run(family, family.build()))


@pytest.mark.parametrize("name", ["siglip", "altclip"])
def test_the_top_saves_loads_and_comes_off(name: str, tmp_path: Path):
    family = FAMILIES[name]
    base = family.build().requires_grad_(False)  # PyTorch's own attention computes otherwise where it trains
    expected = run(family, base)
    model = wrap(family, METHOD, base=base, placement="top")
    adapted = run(family, model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family.build(), tmp_path)
    assert distance(run(family, loaded), adapted) <= 1e-6
    with model.disable_adapter():
        assert torch.equal(run(family, model), expected)
    assert torch.equal(run(family, model.unload()), expected)
    assert "forward" not in vars(base.text_model)


@pytest.mark.parametrize("name", ["blip_retrieval", "flava", "llava", "vilt"])
def test_the_top_needs_a_dual_encoder(name: str):
    with pytest.raises(ValueError, match=r"placement='top' joins the one vector .* Use placement='layer'"):
        wrap(FAMILIES[name], METHOD, placement="top")
    with pytest.raises(ValueError, match=r"target_modules must be None: placement='top'"):
        HardSampleDomainAdapterConfig(placement="top", target_modules=["layers.1"])


# ---------------------------------------------------------------------------------------------------------- the masks


def changed_inputs(family: Family) -> dict[str, dict[str, Any]]:
    """Batches that differ from the family's in one respect."""
    inputs = family.inputs()
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    changes = {}
    word = (ids >= WORDS[0]) & (ids < WORDS[1])
    last = torch.where(word, torch.arange(ids.shape[1]), -1).argmax(dim=1)
    late = ids.clone()
    late[torch.arange(len(ids)), last] = WORDS[0] + (late[torch.arange(len(ids)), last] - WORDS[0] + 7) % 40
    changes["a later word"] = {**inputs, "input_ids": late}
    if mask is not None and not mask.all():
        changes["padding"] = {**inputs, "input_ids": torch.where(mask.bool(), ids, WORDS[0] + 3)}
    row = {k: v.clone() for k, v in inputs.items()}
    row["input_ids"][0] = torch.where(word[0], WORDS[0] + (ids[0] - WORDS[0] + 11) % 40, ids[0])
    if "pixel_values" in row:
        row["pixel_values"][0] += 1  # the first image's, or one patch of it
    return {**changes, "another row": row}


@torch.no_grad()
def layer_outputs(family: Family, model: PeftModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(path: str):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[path] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [part.host().register_forward_hook(keep(path)) for path, part in parts(model).items()]
    try:
        torch.manual_seed(0)  # ViLT shuffles the patches
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if set(family.towers) != {"decoder"}])
def test_an_adapter_sees_no_token_that_its_host_does_not(name: str, attention: str):
    """Wherever a change of the input leaves the frozen layers' states alone, it leaves the adapted ones' alone.

    Later tokens of a causal tower, padding, other rows of the batch and other images of a packed row: whatever mask
    the host has, a wrong one in the adapter lets one of these through.
    """
    family = FAMILIES[name]
    base = family.build()
    try:
        base.set_attn_implementation(attention)
    except ValueError:
        pytest.skip(f"{type(base).__name__} has no {attention} attention")
    model = wrap(family, METHOD, base=base)
    stir(model, seed=1)
    untouched = 0
    for what, changed in changed_inputs(family).items():
        with model.disable_adapter():
            frozen = [layer_outputs(family, model, inputs) for inputs in (family.inputs(), changed)]
        adapted = [layer_outputs(family, model, inputs) for inputs in (family.inputs(), changed)]
        assert any(distance(frozen[0][p], adapted[0][p]) > 1e-3 for p in frozen[0]), "the adapter does nothing"
        for path in frozen[0]:
            moved = [(pair[0][path] - pair[1][path]).abs().amax(-1) for pair in (frozen, adapted)]
            alone = moved[0] <= 1e-6
            untouched += int(alone.sum())
            if alone.any():
                assert float(moved[1][alone].max()) <= 1e-5, (what, path)
    assert untouched or name == "vilt"


@pytest.mark.parametrize("name", ["clip", "siglip", "chinese_clip", "blip_retrieval", "vision_text_dual_encoder"])
@pytest.mark.parametrize("padded", [True, False])
def test_all_kinds_of_attention_agree(name: str, padded: bool):
    """The eager kernel gets its mask written out; without padding sdpa gets none, and `is_causal` where it matters."""
    family, outputs = FAMILIES[name], []
    for attention in ("eager", "sdpa"):
        base = family.build()
        base.set_attn_implementation(attention)
        changes = {} if padded else {"attention_mask": torch.ones_like(family.inputs()["attention_mask"])}
        outputs.append(run(family, stir(wrap(family, METHOD, base=base), seed=2), **changes))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)


def test_a_causal_tower_stays_causal_and_another_does_not_become_it():
    """The hidden state at position t doesn't change when later tokens do; BERT's does."""
    for name, causal in (("clip", True), ("siglip", False), ("chinese_clip", False)):
        family = FAMILIES[name]
        model = stir(wrap(family, METHOD), seed=3)
        tower = model.get_base_model().text_model
        ids = torch.tensor([[1, 11, 12, 13, 14, 2]])
        with torch.no_grad():
            before = tower(input_ids=ids).last_hidden_state
            for t in range(1, 5):
                changed = ids.clone()
                changed[0, t:5] = torch.tensor([31, 32, 33, 34])[: 5 - t]
                after = tower(input_ids=changed).last_hidden_state
                assert torch.equal(before[0, :t], after[0, :t]) == causal, (name, t)


def test_padding_on_either_side_changes_nothing():
    family = FAMILIES["vision_text_dual_encoder"]  # BERT; positions are given, so the left side can be padded too
    model = stir(wrap(family, METHOD), seed=3)
    tower = model.get_base_model().text_model
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        alone = tower(input_ids=ids).last_hidden_state[0]
        for left in (0, 3):
            right = 3 - left
            padded = F.pad(ids, (left, right), value=9)
            mask = F.pad(torch.ones_like(ids), (left, right))
            places = torch.arange(7).sub(left).clamp(0)[None]
            out = tower(input_ids=padded, attention_mask=mask, position_ids=places).last_hidden_state[0]
            torch.testing.assert_close(out[left : left + 4], alone, atol=1e-5, rtol=1e-5)
            assert out.isfinite().all()


class Host(nn.Module):
    """A frozen layer that hands its input through."""

    def __init__(self, causal: bool | None = None) -> None:
        super().__init__()
        if causal is not None:
            self.is_causal = causal

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        return hidden_states


def mask_of(*args: Any, host: nn.Module | None = None, length: int = 4, rows: int = 2, **kwargs: Any) -> Any:
    part = DomainLayer(host or Host(), "text.layer.0")
    h = torch.zeros(rows, length, 8)
    return part._mask(h, (h, *args), kwargs)


TRIANGLE = torch.ones(4, 4, dtype=torch.bool).tril()
PADDING = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])


def test_every_form_of_mask():
    both = TRIANGLE[None, None] & PADDING.bool()[:, None, None]
    assert mask_of() is None
    assert mask_of(None) is None
    assert torch.equal(mask_of(both), both)
    assert torch.equal(mask_of(attention_mask=both), both)
    for low in (torch.finfo(torch.float32).min, float("-inf"), -10000.0):
        additive = torch.zeros(2, 1, 4, 4).masked_fill(~both, low)
        assert torch.equal(mask_of(additive), both)
        assert torch.equal(mask_of(additive.expand(2, 3, 4, 4)), both)  # of several heads
        assert torch.equal(mask_of(additive[:, 0]), both)
    assert torch.equal(mask_of(PADDING).expand(2, 1, 4, 4), PADDING.bool()[:, None, None].expand(2, 1, 4, 4))
    # Causality that is left to the kernel: only where there is no whole mask.
    assert torch.equal(mask_of(is_causal=True)[0, 0], TRIANGLE)
    assert torch.equal(mask_of(host=Host(causal=True))[0, 0], TRIANGLE)
    assert mask_of(host=Host(causal=True), is_causal=False) is None
    assert mask_of(host=Host(causal=False)) is None
    assert torch.equal(mask_of(PADDING, is_causal=True), both)
    whole = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    assert torch.equal(mask_of(whole, is_causal=True), whole)
    # Several sequences in one row.
    packed = mask_of(cu_seqlens=torch.tensor([0, 1, 4]), rows=1)[0, 0]
    assert torch.equal(packed, torch.block_diag(torch.ones(1, 1), torch.ones(3, 3)).bool())
    # A query that may look at nothing is finite.
    nothing = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    assert mask_of(nothing).all()


def test_masks_that_cannot_be_read_are_refused():
    for mask in (object(), torch.ones(2, 1, 1, 7), torch.ones(7)):
        with pytest.raises(ValueError, match="got an attention mask that the adapter can't read"):
            mask_of(mask)
    sequence_first = Host()
    sequence_first.attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="can't read"):
        mask_of(PADDING, host=sequence_first)


def test_it_generates_without_a_cache_alone():
    """A layer that reads past tokens from a cache would be given the new one alone."""
    case = next(c for c in auto_cases() if str(c) == "GitForCausalLM")
    base = case.build()
    inputs = case.inputs(base)
    config = HardSampleDomainAdapterConfig(bottleneck_dim=8, num_heads=2, towers=["fusion"])
    model = stir(get_peft_model(base, config))
    kept = {name: inputs[name] for name in ("input_ids", "pixel_values") if name in inputs}
    with torch.no_grad():
        model(**inputs)  # filling the cache is no use of it
        assert model.generate(**kept, max_new_tokens=3, use_cache=False).shape[1] > inputs["input_ids"].shape[1]
        with pytest.raises(ValueError, match=r"use_cache=False"):
            model.generate(**kept, max_new_tokens=3, use_cache=True)


# ---------------------------------------------------------------------------------------------------------- the places

CLIP_LAYERS = {
    "all": ({"last_layers": None}, r"(text|vision)_model.*layers.[01]"),
    "last": ({"last_layers": 1}, r"(text|vision)_model.*layers.1"),
    "index": ({"layers_to_transform": 0}, r"(text|vision)_model.*layers.0"),
    "indices": ({"layers_to_transform": [1], "layers_pattern": "layers"}, r"(text|vision)_model.*layers.1"),
    "names": ({"target_modules": ["layers.0"]}, r"(text|vision)_model.*layers.0"),
    "regex": ({"target_modules": r".*vision_model.*\.1"}, r"vision_model.*layers.1"),
    "tower": ({"towers": ["text"]}, r"text_model.*layers.[01]"),
    "tower as a string": ({"towers": "text", "last_layers": 1}, r"text_model.*layers.1"),
    "excluded": ({"exclude_modules": r".*layers\.0"}, r"(text|vision)_model.*layers.1"),
}


@pytest.mark.parametrize("form", CLIP_LAYERS)
def test_forms_of_places(form: str, tmp_path: Path):
    import re

    family, (options, pattern) = FAMILIES["clip"], CLIP_LAYERS[form]
    layers = [f"{tower}_model.encoder.layers.{i}" for tower in ("vision", "text") for i in (0, 1)]
    expected = {layer for layer in layers if re.fullmatch(pattern, layer)}
    assert expected
    model = wrap(family, METHOD, **options)
    found = {path.rpartition(".")[0].removeprefix("base_model.model.") for path in parts(model)}
    assert found == expected == {m.module for m in matched_modules(family.build(), model.peft_config["default"])}
    model.save_pretrained(tmp_path)
    assert distance(run(family, PeftModel.from_pretrained(family.build(), tmp_path)), run(family, model)) <= 1e-6


def test_the_default_is_the_last_four_of_each_stack():
    import transformers as hf
    from families import text_tower, tiny, vision_tower

    text = hf.CLIPTextConfig(**text_tower(16, num_hidden_layers=6))
    vision = hf.CLIPVisionConfig(**vision_tower(16, num_hidden_layers=3))
    base = tiny(hf.CLIPModel, hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))()
    found = matched_modules(base, HardSampleDomainAdapterConfig(bottleneck_dim=8))
    names = [m.module.replace("_model.encoder.layers", "") for m in found]
    assert sorted(names) == [*(f"text.{i}" for i in (2, 3, 4, 5)), *(f"vision.{i}" for i in (0, 1, 2))]
    assert [m.role for m in found if m.tower == "text"] == [f"text.layer.{i}" for i in (2, 3, 4, 5)]


def test_what_it_does_not_adapt_is_said():
    base = FAMILIES["llava"].build()
    with pytest.raises(ValueError, match=r"A decoder generates from a cache .* AuroraModeApprox"):
        matched_modules(base, HardSampleDomainAdapterConfig(towers=["vision", "decoder"]))
    with pytest.raises(ValueError, match=r"No module of Florence2.*towers=\['vision'\].*text: .*layers\.N \(2\)"):
        matched_modules(FAMILIES["florence2"].build(), HardSampleDomainAdapterConfig(towers=["vision"]))
    with pytest.raises(ValueError, match=r"No module of CLIPModel matches target_modules=\['q_proj'\]"):
        matched_modules(FAMILIES["clip"].build(), HardSampleDomainAdapterConfig(target_modules=["q_proj"]))


def test_layer_and_top_live_together():
    family = FAMILIES["clip"]
    model = wrap(family, METHOD)
    layers = run(family, model)
    model.add_adapter("top", HardSampleDomainAdapterConfig(bottleneck_dim=8, num_heads=2, placement="top"))
    stir(model, "top", seed=4)
    assert torch.equal(run(family, model), layers)
    model.set_adapter("top")
    top = run(family, model)
    assert distance(top, layers) > 1e-3
    model.base_model.set_adapter(["default", "top"])
    assert distance(run(family, model), top) > 1e-3
    with torch.no_grad():
        names = ["top", "__base__", "default"]
        mixed = model(**family.inputs(), adapter_names=names).text_embeds
        for row, name in enumerate(names):
            with model.disable_adapter() if name == "__base__" else torch.no_grad():
                model.set_adapter(name if name in model.peft_config else "top")
                alone = model(**family.inputs()).text_embeds
            torch.testing.assert_close(mixed[row], alone[row], atol=1e-5, rtol=1e-5)


def test_rows_by_name_are_for_inference():
    family = FAMILIES["clip"]
    model = wrap(family, METHOD)
    with pytest.raises(ValueError, match=r"No adapter for \['other'\]; there are \['__base__', 'default'\]"):
        model(**family.inputs(), adapter_names=["other"] * 3)
    with pytest.raises(ValueError, match="2 adapter_names for 3 rows"):
        model(**family.inputs(), adapter_names=["default"] * 2)
    model.train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)|training mode"):
        model(**family.inputs(), adapter_names=["default"] * 3)


# --------------------------------------------------------------------------------------------------------- the files


def test_exact_keys_of_the_file(tmp_path: Path):
    linear = ("down", "blocks.0.qkv", "blocks.0.out", "blocks.0.ffn.0", "blocks.0.ffn.2")
    norms = ("norm", "blocks.0.norm_attention", "blocks.0.norm_ffn")
    inside = {f"{name}.{kind}" for name in (*linear, *norms) for kind in ("weight", "bias")} | {
        "up.weight",
        "scale_norm",
    }
    for placement, sites in (
        ("layer", [f"{tower}.layer.{i}" for tower in ("vision", "text") for i in (0, 1)]),
        ("top", ["vision.tower.0", "text.tower.0"]),
    ):
        wrap(FAMILIES["clip"], METHOD, placement=placement).save_pretrained(tmp_path / placement)
        stored = load_file(tmp_path / placement / "adapter_model.safetensors")
        assert {value.ndim for key, value in stored.items() if key.endswith("scale_norm")} == {0}  # as in format 1
        assert set(stored) == {
            f"base_model.model.{site}.hard_sample_domain_adapter_branch.{name}" for site in sites for name in inside
        }


def test_the_bank_is_saved_with_the_adapter(tmp_path: Path):
    model = wrap(FAMILIES["clip"], METHOD)
    model.save_pretrained(tmp_path / "without")
    model.base_model.banks["default"] = bank = HardSampleBank(["a", "b"])
    bank.update(bank.keys[:1], np.array([0.3]), 1)
    model.save_pretrained(tmp_path / "with")
    files = [{p.name for p in (tmp_path / name).iterdir()} for name in ("without", "with")]
    assert files[1] - files[0] == {"hard_sample_bank.safetensors"}
    assert HardSampleBank.load(tmp_path / "with").visits.tolist() == bank.visits.tolist()
    for name in ("without", "with"):  # inference doesn't need it
        loaded = PeftModel.from_pretrained(FAMILIES["clip"].build(), tmp_path / name)
        assert distance(run(FAMILIES["clip"], loaded), run(FAMILIES["clip"], model)) <= 1e-6


# --------------------------------------------------------------------------------------------------- the contract


def domain(family: Family, **changes: Any) -> PeftConfig | None:
    if family.name == "llama":  # decoders alone are among the auto mappings
        return None
    return HardSampleDomainAdapterConfig(**{"bottleneck_dim": 8, "num_heads": 2, **changes})


# Widths of the layers of each family's encoders that attend to their own sequence through a known mask.
SELF_ATTENDING = {
    "CLIPModel": [48, 48, 32, 32],
    "SiglipModel": [48, 48, 32, 32],
    "ChineseCLIPModel": [48, 48, 32, 32],
    "AltCLIPModel": [48, 48, 32, 32],
    "VisionTextDualEncoderModel": [48, 48, 32, 32],
    "BlipForImageTextRetrieval": [48, 48, 32, 32],
    "FlavaModel": [48, 48, 32, 32, 40, 40],
    "ViltForQuestionAnswering": [32, 32],
    "BridgeTowerForImageAndTextRetrieval": [64, 64, 32, 32, 32, 32, 32, 32],  # both streams of the fusion
    "BlipForQuestionAnswering": [32, 32, 32, 32],
    "BlipForConditionalGeneration": [48, 48],
    "Blip2ForConditionalGeneration": [48, 48, 32, 32],
    "LlavaForConditionalGeneration": [48, 48],  # of three the last is read by nobody
    "Qwen2_5_VLForConditionalGeneration": [48, 48],
    "PaliGemmaForConditionalGeneration": [48, 48],
    "Idefics3ForConditionalGeneration": [48, 48],
    "MllamaForConditionalGeneration": [16, 16, 16],  # local and global
    "T5ForConditionalGeneration": [32, 32],  # the encoder's
    "BartForConditionalGeneration": [32, 32],
    "Florence2ForConditionalGeneration": [32, 32],  # the text's: the images' convolve
}


def domain_parameters(base: nn.Module, config: HardSampleDomainAdapterConfig) -> int:
    """2 d + (d m + m) + n (12 m^2 + 13 m) + m d + 1 a layer."""
    m, n = config.bottleneck_dim, config.num_layers
    widths = SELF_ATTENDING[type(base).__name__]
    return sum(2 * d + (d * m + m) + n * (12 * m**2 + 13 * m) + m * d + 1 for d in widths)


CASES = [
    Case(
        "hard_sample_domain_adapter",
        domain,
        domain_parameters,
        anywhere=lambda: HardSampleDomainAdapterConfig(bottleneck_dim=8, num_heads=2),
        whole=HardSampleDomainAdapterConfig,
        refusal="can be adapted",
    )
]
