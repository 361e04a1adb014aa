"""UniAdapter's maths against slow and obvious versions; what is shared, where it reads and adds, what it costs."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from case import Case
from families import FAMILIES, text_tower, tiny, vision_tower
from methods import adapter, distance, run, wrap
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from peft_multimodal import UniAdapterConfig, matched_modules
from peft_multimodal.methods.uni_adapter import Branch, SharedSite, UniAdapterBranch
from peft_multimodal.methods.uni_adapter.beside import Ear

METHOD = "uni_adapter"
BLIP = FAMILIES["blip_retrieval"]
M = 8


def parts(model: nn.Module, name: str = "default") -> dict[str, Branch]:
    """{role: branch}."""
    found = [m for m in model.modules() if isinstance(m, UniAdapterBranch)]
    return {part.role: part.uni_adapter_branch[name] for part in found if part.has_adapter(name)}


def sites(model: nn.Module) -> dict[str, SharedSite]:
    return {m.role: m for m in model.modules() if isinstance(m, SharedSite)}


# ---------------------------------------------------------------------------------------------------------- the maths


def slow_z(branch: Branch, x: Tensor) -> Tensor:
    """act(LN(x) D + b), and M of it, for one token x (d)."""
    down, *middle = branch.stages()
    x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * down.norm.weight + down.norm.bias
    z = torch.stack([sum(x[i] * row[i] for i in range(len(x))) for row in down.down.weight]) + down.down.bias
    z = z.clamp(min=0)
    return middle[0].weight @ z if middle else z


def slow_up(branch: Branch, z: Tensor) -> Tensor:
    return branch.up.weight @ z + branch.up.bias


class Captured:
    """What chosen modules read and give in one call: {path: (first input, output)}."""

    def __init__(self, model: nn.Module, *paths: str) -> None:
        self.read: dict[str, Tensor] = {}
        self.given: dict[str, Tensor] = {}
        for path in paths:
            model.get_submodule(path).register_forward_hook(lambda m, args, out, path=path: self.keep(path, args, out))

    def keep(self, path: str, args: tuple, out: Any) -> None:
        self.read[path] = args[0] if args else None
        self.given[path] = out[0] if isinstance(out, tuple) else out


LAYER = "text_encoder.encoder.layer.0"


@torch.no_grad()
@pytest.mark.parametrize("share", ["down", "middle", "none"])
@pytest.mark.parametrize("changes", [{}, {"query_residual": False}, {"cross_norm": True}], ids=["", "alone", "normed"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_text_layer_that_fuses_against_a_slow_version(share: str, changes: dict, fused: bool):
    """h' = LN(FFN(c) + c) + s U_t z(a) + s (U_m z(c) + U_t z(c)), and without an image h' = h + s U_t z(a)."""
    model = wrap(BLIP, METHOD, share=share, scale=0.5, **changes)
    base = model.get_base_model()
    seen = Captured(base, f"{LAYER}.attention", f"{LAYER}.crossattention", f"{LAYER}.output", LAYER)
    if fused:
        run(BLIP, model)
    else:
        base.text_encoder(**BLIP.text_inputs())
    text, fusion = (parts(model)[f"{tower}.layer.0"] for tower in ("text", "fusion"))
    a, h, after = seen.given[f"{LAYER}.attention"], seen.given[f"{LAYER}.output"], seen.given[LAYER]
    c = seen.given[f"{LAYER}.crossattention"] if fused else a
    assert fused == (f"{LAYER}.crossattention" in seen.given)
    for row in range(2):
        for i in range(3):
            if fused:
                added = slow_up(fusion, slow_z(fusion, c[row, i])) + slow_up(text, slow_z(text, c[row, i]))
                if changes.get("cross_norm"):
                    added = fusion.gate_norm * F.layer_norm(added, (32,), fusion.norm.weight, fusion.norm.bias)
                if changes.get("query_residual", True):
                    added = added + slow_up(text, slow_z(text, a[row, i]))
            else:
                added = slow_up(text, slow_z(text, a[row, i]))
            torch.testing.assert_close(after[row, i], h[row, i] + 0.5 * added, atol=1e-5, rtol=1e-5)


# The norm before an FFN of pre-LN layers reads the stream; in post-LN layers the FFN's first map does.
STREAMS = {
    "clip": ("vision_model.encoder.layers.1", "layer_norm2", "vision.layer.1"),
    "blip_retrieval": ("vision_model.encoder.layers.0", "layer_norm2", "vision.layer.0"),
    "chinese_clip": ("text_model.encoder.layer.1", "intermediate.dense", "text.layer.1"),
    "llama": ("model.layers.0", "post_attention_layernorm", "decoder.layer.0"),
    "bridgetower": ("bridgetower.vision_model.visual.transformer.resblocks.1", "ln_2", "vision.layer.1"),
    "mllama": ("model.vision_model.transformer.layers.0", "post_attention_layernorm", "vision.layer.0"),
    "blip_2": ("qformer.encoder.layer.0", "intermediate_query.dense", "fusion.layer.0"),
    "qwen2_5_vl": ("model.visual.blocks.1", "norm2", "vision.layer.1"),
    "florence2": ("model.language_model.encoder.layers.1", "fc1", None),
}


@torch.no_grad()
@pytest.mark.parametrize("name", STREAMS)
def test_it_reads_the_stream_before_its_norm(name: str):
    """h' = h + s U z(x) on every token, x as the layer's own norm, or its FFN, reads it."""
    family, (layer, reader, role) = FAMILIES[name], STREAMS[name]
    model = wrap(family, METHOD, share="none")
    if role is None:  # one branch for texts and images: both the same
        for image, text in zip(
            *([b for r, b in parts(model).items() if s in r] for s in ("image", "text.layer")), strict=True
        ):
            image.load_state_dict(text.state_dict())
        role = "text.layer.1"
    seen, stand_in = Captured(model.get_base_model(), f"{layer}.{reader}", layer), None
    stand_in = next(m for m in model.modules() if getattr(m, "role", "") == role).beside.stand_in
    original, before = stand_in.original, []
    stand_in.original = lambda *args, **kw: before.append(original(*args, **kw)) or before[-1]
    run(family, model)
    branch, x, after = parts(model)[role], seen.read[f"{layer}.{reader}"], seen.given[layer]
    h = before[-1][0] if isinstance(before[-1], tuple) else before[-1]
    expected = h + branch.up(branch.down(x)).reshape(h.shape)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)
    assert distance(after, h) > 1e-2


@torch.no_grad()
def test_chunked_and_packed_ffns_are_put_together():
    """`chunk_size_feed_forward` calls an FFN several times a layer."""
    family = FAMILIES["vision_text_dual_encoder"]
    model = wrap(family, METHOD)
    expected = run(family, model)
    for module in model.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 1
    assert distance(run(family, model), expected) <= 1e-5


# ----------------------------------------------------------------------------------------------------- what is shared


def equal_widths(vision: int = 3, text: int = 2) -> nn.Module:
    """A dual encoder of one width whose towers have different depths."""
    config = hf.CLIPConfig(
        text_config=hf.CLIPTextConfig(**text_tower(32, num_hidden_layers=text)),
        vision_config=hf.CLIPVisionConfig(**vision_tower(32, num_hidden_layers=vision)),
        projection_dim=24,
    )
    return tiny(hf.CLIPModel, config)()


def test_layers_are_paired_from_the_first_adapted_one():
    model = get_peft_model(equal_widths(), UniAdapterConfig(bottleneck_dim=M))
    down = {role: branch.stages()[0] for role, branch in parts(model).items()}
    assert down["vision.layer.0"] is down["text.layer.0"] is not down["vision.layer.1"]
    assert down["vision.layer.1"] is down["text.layer.1"]
    assert sorted(sites(model)) == ["shared.site.0", "shared.site.1", "shared.site.2"]  # the third is the images' own
    upper = r"vision_model\.encoder\.layers\.[12]|text_model\.encoder\.layers\.\d"
    model = get_peft_model(equal_widths(), UniAdapterConfig(bottleneck_dim=M, target_modules=upper))
    down = {role: branch.stages()[0] for role, branch in parts(model).items()}
    assert down["vision.layer.1"] is down["text.layer.0"]
    assert down["vision.layer.2"] is down["text.layer.1"]


def test_widths_share_what_they_can():
    clip = FAMILIES["clip"].build
    downs = {r: b.stages()[0] for r, b in parts(get_peft_model(clip(), UniAdapterConfig(bottleneck_dim=M))).items()}
    assert len(set(downs.values())) == 4  # of 48 and of 32
    model = get_peft_model(clip(), UniAdapterConfig(bottleneck_dim=M, share="middle"))
    stages = {role: branch.stages() for role, branch in parts(model).items()}
    assert (
        stages["vision.layer.0"][1]
        is stages["text.layer.0"][1]
        is sites(model)["shared.site.0"].uni_adapter_shared["default"]
    )
    assert len({id(s[0]) for s in stages.values()}) == 4
    assert len(sites(model)) == 2
    model = get_peft_model(clip(), UniAdapterConfig(bottleneck_dim=M, share="none"))
    assert not sites(model)


@pytest.mark.parametrize("name", ["blip_vqa", "flava", "llava"])
def test_a_shared_gradient_is_the_sum_over_modalities(name: str):
    """As if each branch had a D of its own, all equal."""
    family = FAMILIES[name]
    shared, alone = wrap(family, METHOD), wrap(family, METHOD, share="none")
    ours, its = parts(shared), parts(alone)
    for role, branch in its.items():
        branch.up.load_state_dict(ours[role].up.state_dict())
        branch.down.load_state_dict(ours[role].stages()[0].state_dict())
    torch.testing.assert_close(family.loss(shared), family.loss(alone))
    for model in (shared, alone):
        family.loss(model).backward()
    for site in sites(shared).values():
        down = site.uni_adapter_shared["default"]
        sharers = [its[role] for role, branch in ours.items() if branch.stages()[0] is down]
        for key, parameter in down.named_parameters():
            total = sum(b.down.get_parameter(key).grad for b in sharers)
            torch.testing.assert_close(parameter.grad, total, atol=1e-5, rtol=1e-4)
    assert any(
        len([1 for b in ours.values() if b.stages()[0] is s.uni_adapter_shared["default"]]) > 1
        for s in sites(shared).values()
    )


def test_text_alone_leaves_the_fusion_alone():
    model = wrap(BLIP, METHOD)
    model.get_base_model().text_encoder(**BLIP.text_inputs()).last_hidden_state.square().mean().backward()
    for role, branch in parts(model).items():
        assert (branch.up.weight.grad is not None) == role.startswith("text."), role


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "vilt", "flava", "qwen2_5_vl", "florence2"])
def test_in_one_stream_each_modality_has_its_own(name: str):
    """A text call's output doesn't depend on the images' U, and both act on a call with images."""
    family = FAMILIES[name]
    model = wrap(family, METHOD)
    images = [b for role, b in parts(model).items() if ".image." in role]
    assert images
    before = run(family, model)
    alone = family.output(model(**family.text_inputs())) if family.text_only else None
    for branch in images:
        nn.init.normal_(branch.up.weight)  # a constant would vanish in the next norm
    assert distance(run(family, model), before) > 1e-4
    if family.text_only:
        assert torch.equal(family.output(model(**family.text_inputs())), alone)


def test_only_towers_that_were_asked_for():
    for tower, roles in (("text", {"text"}), ("fusion", {"fusion"}), ("vision", {"vision"})):
        found = {role.partition(".")[0] for role in parts(wrap(BLIP, METHOD, towers=[tower]))}
        assert found == roles


# ---------------------------------------------------------------------------------------------- the start, and the cost


@pytest.mark.parametrize("name", ["blip_retrieval", "blip_captioning"])
def test_a_normed_fusion_starts_as_nothing_and_grows_slowly(name: str):
    """A norm above zeros would give the first step's small numbers the size of the stream."""
    family = FAMILIES[name]
    base = family.build()
    model = wrap(family, METHOD, stirred=False, cross_norm=True, scale=0.1)
    fusions = [b for role, b in parts(model).items() if role.startswith("fusion.")]
    assert all(b.gate_norm.item() == 0 and b.up.weight.any() for b in fusions)
    assert distance(run(family, model), run(family, base)) <= 1e-6
    optimizer = torch.optim.AdamW(adapter(model).values(), lr=1e-4)
    for step in range(2):
        optimizer.zero_grad()
        family.loss(model).backward()
        if step:  # behind the gate that has opened, everything learns: the norm too
            assert all(p.grad is not None and p.grad.any() for b in fusions for p in b.parameters())
        optimizer.step()
    assert 0 < distance(run(family, model), run(family, base)) < 1e-2


def test_counts_of_the_paper_s_base():
    """BLIP-base at m = 128: 4,766,208; with the norms and gates of the fusion 4,784,652."""
    with torch.device("meta"):
        config = hf.BlipConfig(
            text_config={
                "hidden_size": 768,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "intermediate_size": 3072,
            },
            vision_config={"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
        )
        base = hf.BlipForImageTextRetrieval(config)
    for changes, expected in (({}, 4_766_208), ({"cross_norm": True}, 4_784_652)):
        with torch.device("meta"):
            model = get_peft_model(base, UniAdapterConfig(**changes))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
        base = model.unload()


def flops(model: nn.Module, family: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(family, model)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("towers", "floor"), [(["vision"], 1 / 4), (["text", "fusion"], 1 / 2)], ids=["vision", "fusion"]
)
def test_it_costs_little_more_than_its_floor(towers: list[str], floor: float):
    """Forward FLOPs over the frozen FFN: m / (4 d) in a tower, m / (2 d) where [a; c] is one product, + 10 %."""
    d, m = 64, 16
    blip = hf.BlipConfig(
        text_config=hf.BlipTextConfig(**text_tower(d, intermediate_size=4 * d, encoder_hidden_size=d)),
        vision_config=hf.BlipVisionConfig(**vision_tower(d, intermediate_size=4 * d)),
        image_text_hidden_size=24,
    )
    base = tiny(hf.BlipForImageTextRetrieval, blip)()
    tokens = {"vision": 3 * 5, "text": BLIP.inputs()["input_ids"].numel()}[towers[0]]
    ffn = 2 * tokens * 2 * d * 4 * d * 2  # two layers, two maps
    before = flops(base, BLIP)
    model = get_peft_model(base, UniAdapterConfig(bottleneck_dim=m, towers=towers))
    share = (flops(model, BLIP) - before) / ffn
    print(f"{towers[0]}: {share:.4f} of the FFN's FLOPs, floor {floor * m / d:.4f}")
    assert 0 < share <= 1.1 * floor * m / d


# ------------------------------------------------------------------------------------------------- beside other things


def test_exact_keys_of_the_file(tmp_path: Path):
    """The format of the file is a promise to every adapter that was ever saved."""
    wrap(BLIP, METHOD, cross_norm=True).save_pretrained(tmp_path)
    branches = [f"{tower}.layer.{i}.uni_adapter_branch.up" for tower in ("vision", "text", "fusion") for i in (0, 1)]
    downs = [f"shared.site.{i}.uni_adapter_shared.{part}" for i in range(4) for part in ("norm", "down")]
    norms = [f"fusion.layer.{i}.uni_adapter_branch.norm" for i in (0, 1)]
    gates = {f"base_model.model.fusion.layer.{i}.uni_adapter_branch.gate_norm" for i in (0, 1)}
    expected = {
        f"base_model.model.{m}.{kind}" for m in (*branches, *downs, *norms) for kind in ("weight", "bias")
    } | gates
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == expected
    assert all(saved[gate].shape == () for gate in gates)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "t5"])
def test_beams_have_the_adapter_of_their_row(name: str):
    family = FAMILIES[name]
    model = wrap(family, METHOD, scale=1.0, modules_to_save=["lm_head"])
    model.add_adapter("second", UniAdapterConfig(bottleneck_dim=4, scale=1.0, share="none"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in adapter(model, "second").values():
            parameter.add_(torch.randn_like(parameter))
        model.get_base_model().lm_head.modules_to_save["default"].weight.normal_()
    options = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}

    def written(**rows: Any) -> Tensor:
        return model.generate(**family.generate_inputs(model), **options, **rows)

    alone = {}
    for known in ("default", "second"):
        model.set_adapter(known)
        alone[known] = written()
    with model.disable_adapter():
        alone["__base__"] = written()
    assert not torch.equal(alone["default"], alone["second"])
    rows = ["second", "__base__", "default"]
    expected = torch.cat([alone[row][2 * i : 2 * i + 2] for i, row in enumerate(rows)])
    assert torch.equal(written(adapter_names=rows), expected)


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("clip", "fc1"),
        ("clip", "mlp"),
        ("clip", "layer_norm2"),
        ("blip_retrieval", "query"),
        ("blip_retrieval", "dense"),
    ],
)
def test_modules_that_are_trained_as_a_whole_are_heard(name: str, saved: str):
    family = FAMILIES[name]
    alone, beside = wrap(family, METHOD, scale=1.0), wrap(family, METHOD, scale=1.0, modules_to_save=[saved])
    with torch.no_grad():
        for parameter, value in zip(adapter(beside).values(), adapter(alone).values(), strict=True):
            parameter.copy_(value)
    assert distance(run(family, beside), run(family, alone)) == 0
    assert distance(run(family, deepcopy(beside)), run(family, alone)) == 0
    base = beside.unload()
    assert distance(run(family, base), run(family, family.build())) == 0
    assert not any(isinstance(hook, Ear) for m in base.modules() for hook in hooks_of(m))


def hooks_of(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def test_patches_in_one_list_are_no_rows():
    family = FAMILIES["qwen2_5_vl"]
    model = wrap(family, METHOD, towers=["vision"])
    inputs = family.inputs(model)
    with pytest.raises(ValueError, match="row by row"):
        model(**inputs, adapter_names=["default"] * len(inputs["pixel_values"]))


@torch.no_grad()
def test_it_stands_beside_a_lora_of_the_same_ffn():
    family = FAMILIES["clip"]
    model = wrap(family, METHOD)
    alone = run(family, model)
    lora = LoraConfig(r=2, target_modules=["fc1", "q_proj"])
    other = get_peft_model(model.base_model.model, lora, adapter_name="lora")
    assert distance(run(family, other), alone) <= 1e-6  # LoRA's B is 0
    for name, parameter in other.named_parameters():
        if "lora_B" in name:
            parameter.add_(0.1)
    assert distance(run(family, other), alone) > 1e-3


def test_without_a_layer_that_has_both_it_says_where_it_stands():
    with pytest.raises(ValueError, match=r"Nothing in Linear can be adapted: UniAdapter stands beside the FFNs"):
        get_peft_model(nn.Linear(3, 3), UniAdapterConfig())


# --------------------------------------------------------------------------------------------------- the contract


def config(family: Any, **changes: Any) -> PeftConfig:
    return UniAdapterConfig(**{"bottleneck_dim": M, "scale": 1.0, **changes})


def count(base: nn.Module, config: UniAdapterConfig) -> int:
    """2 d + d m + m a shared D, m d + d a branch; D a branch's own where it shares none, m^2 a map in the middle."""
    m, total = config.bottleneck_dim, 0
    table = list(matched_modules(base, config))
    ranks: dict[str, dict[str, int]] = {}  # {list of layers: {layer: n}}
    for site in table:
        stack = ranks.setdefault(re.sub(r"\.\d+$", "", site.module), {})
        stack.setdefault(site.module, len(stack))
    n_and_width = {(ranks[re.sub(r"\.\d+$", "", s.module)][s.module], s.d_in) for s in table}
    down = lambda d: (2 * d if config.norm else 0) + d * m + m  # noqa: E731
    if config.share == "down":
        total += sum(down(d) for _, d in n_and_width)
    else:
        total += sum(down(s.d_in) for s in table)
    if config.share == "middle":
        total += len({n for n, _ in n_and_width}) * m * m
    total += sum(m * s.d_in + s.d_in for s in table)
    return total + sum(2 * s.d_in + 1 for s in table if s.kind == "fusion" and config.cross_norm)


CASES = [
    Case(
        METHOD,
        config,
        count,
        anywhere=lambda: UniAdapterConfig(bottleneck_dim=M, scale=1.0),
        refusal="can be adapted",
        bad=(
            *(("bottleneck_dim", value) for value in (0, -1, "8", 8.0, True, None)),
            *(("scale", value) for value in (0, -0.1, "1", True, float("nan"), float("inf"))),
            *(("activation", value) for value in ("tanh", None, ["relu"])),
            *(("share", value) for value in ("up", None, ["down"])),
            *((name, value) for name in ("query_residual", "cross_norm", "norm") for value in (1, "no", None)),
            ("target_modules", "all-linear"),
        ),
        other={"bottleneck_dim": 3, "share": "none", "norm": False, "layers_to_transform": [1]},
    )
]
