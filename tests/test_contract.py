"""What every method promises, on every family of models: `family x method x behaviour`.

The sections follow the promises. Unmarked tests are a pairwise part of the matrix; `full` marks the rest of it.
"""

from __future__ import annotations

import copy
import io
import json
import re
import subprocess
import sys
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers as hf
from case import declared
from families import FAMILIES, IMAGE, Family
from methods import (
    CASES,
    METHODS,
    NO_DECAY,
    TEXT_TOWER,
    adapter,
    adapter_of,
    distance,
    fill,
    gradients,
    home,
    inputs,
    promising,
    run,
    save_all,
    silent,
    stir,
    trace,
    wrap,
)
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from transformers.modeling_layers import GradientCheckpointingLayer

import peft_multimodal
from peft_multimodal import matched_modules
from peft_multimodal.core.anatomy import is_below
from peft_multimodal.core.parts import AttachedPart
from peft_multimodal.core.stand_in import Taken

NOT_IDENTITY = promising(starts_as="images")
WHOLE_TOWER = promising(acts_on="tower")  # have no target_modules, and nothing is recomputed in them
WHOLE_LAYERS = promising(acts_on="decoder")
OWN_LAYERS = promising(acts_on="layers")  # their target_modules are layers
TARGETED = [method for method in METHODS if method in promising(acts_on="matrices")]
MERGE = {name: case.merge for name, case in declared().items() if case.merge is not None}


# One family for each way of building a model: two towers, a fusion encoder, queries, one stream, a decoder, two stacks.
SOME = ("clip", "blip_retrieval", "blip_2", "flava", "vilt", "llava", "qwen2_5_vl", "t5")


def cases(
    *unmarked: str, only: Collection[str] = (), having: str = "name", among: Collection[str] = METHODS
) -> pytest.MarkDecorator:
    """Every (family, method); where families are named, the others are marked `full`."""

    def case(name: str, method: str):
        marks = pytest.mark.full if unmarked and name not in unmarked else ()
        return pytest.param(FAMILIES[name], method, id=f"{name}-{method}", marks=marks)

    found = [c for c in CASES if getattr(FAMILIES[c[0]], having) and (not only or c[0] in only) and c[1] in among]
    return pytest.mark.parametrize(("family", "method"), [case(*c) for c in found])


def each(names: tuple[str, ...], values: list[tuple]) -> pytest.MarkDecorator:
    """`values`, whose first entry names a family, with every method that applies to it."""
    found = [(*value, method) for value in values for method in METHODS if (value[0], method) in CASES]
    return pytest.mark.parametrize((*names, "method"), found)


def frozen(family: Family) -> nn.Module:
    """The base model as it stands under an adapter (`nn.MultiheadAttention` computes otherwise where it trains)."""
    return family.build().requires_grad_(False)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def wrapped(model: PeftModel) -> set[str]:
    """Paths of the wrapped modules, and of those whose `forward` was taken over."""
    modules = list(model.get_base_model().named_modules())
    layers = {path for path, m in modules if isinstance(m, BaseTunerLayer) and hasattr(m, "base_layer")}
    taken = {path for path, m in modules for t in [vars(m).get("forward")] if isinstance(t, Taken) and t.is_answered}
    if taken == {""}:  # the model's own, by a part that hangs below a tower
        taken = {path.rpartition(".")[0] for path, m in modules if isinstance(m, AttachedPart)}
    return layers | taken


def same(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same tensors under the same names."""
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@torch.no_grad()
def at_start(family: Family, method: str, model: nn.Module) -> Tensor:
    """What an adapter doesn't change before it is trained: the output, or the images' part in it."""
    if method not in NOT_IDENTITY:
        return run(family, model)
    return model.get_image_features(pixel_values=inputs(family, model)["pixel_values"]).pooler_output


# ------------------------------------------------------------------------------------------ 1. the start, off and out


@cases()
def test_starts_as_the_base_model(family: Family, method: str):
    model, base = wrap(family, method, stirred=False), frozen(family)
    for mode in (False, True):
        expected, output = (at_start(family, method, m) for m in (base, model.train(mode)))
        assert distance(output, expected) <= 1e-6
        assert method not in NOT_IDENTITY or torch.equal(output, expected)


@cases(among=NOT_IDENTITY)
def test_images_stay_what_they_were(family: Family, method: str):
    """To the last bit, also after training."""
    expected = at_start(family, method, frozen(family))
    model = wrap(family, method).train()
    family.loss(model).backward()
    assert torch.equal(at_start(family, method, model), expected)
    assert torch.equal(at_start(family, method, model.eval()), expected)


@cases()
def test_disabled_it_is_the_base_model(family: Family, method: str):
    model, expected = wrap(family, method), run(family, frozen(family))
    before = run(family, model)
    assert distance(before, expected) > 1e-3
    learnt = trainable(model)
    with model.disable_adapter():
        assert torch.equal(run(family, model), expected)
    assert torch.equal(run(family, model), before)
    assert trainable(model) == learnt
    model.base_model.disable_adapter_layers()
    assert torch.equal(run(family, model), expected)
    model.base_model.enable_adapter_layers()
    assert trainable(model) == learnt


@cases()
def test_unloaded_it_is_the_base_model(family: Family, method: str):
    base = frozen(family)
    expected = run(family, base)  # before the trace: transformers installs hooks of its own at the first call
    model = wrap(family, method)
    run(family, model)
    unloaded = model.unload()
    assert type(unloaded) is type(base)
    assert torch.equal(run(family, unloaded), expected)
    assert same(unloaded, base)
    assert trace(unloaded) == trace(base)
    assert not trainable(unloaded)
    expected = at_start(family, method, base)
    again = get_peft_model(unloaded, METHODS[method](family))
    assert distance(at_start(family, method, again), expected) <= 1e-6


@cases("clip", "blip_retrieval")
def test_frozen_stays_frozen(family: Family, method: str, tmp_path: Path):
    wrap(family, method).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(family.build(), tmp_path)
    assert not trainable(model)
    with model.disable_adapter():
        assert not trainable(model)
    assert not trainable(model)

    model = PeftModel.from_pretrained(family.build(), tmp_path, is_trainable=True)
    model.load_adapter(tmp_path, "inactive")
    learnt = trainable(model)
    assert learnt == set(adapter(model))
    with model.disable_adapter():
        pass
    assert trainable(model) == learnt


# ----------------------------------------------------------------------------------------------------- 2. training


@cases()
def test_its_parameters_train_and_no_others(family: Family, method: str):
    model = wrap(family, method, stirred=False).train()
    parameters = adapter(model)
    assert trainable(model) == set(parameters)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    losses = []
    for _ in range(4):
        loss = family.loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in parameters if not silent(family, name)}


@cases()
def test_each_tower_trains_alone(family: Family, method: str):
    """`towers=[t]` touches the modules of that tower alone, and all its parameters get a gradient."""
    found = peft_multimodal.describe(family.build())
    for tower in found.tower_names():
        matched = list(matched_modules(family.build(), METHODS[method](family)))
        if tower not in {m.tower for m in matched}:
            continue
        try:
            model = wrap(family, method, towers=[tower])
        except ValueError:
            with pytest.raises(ValueError, match="use_"):  # parts of the method that live in another tower
                wrap(family, method, towers=[tower])
            continue
        modules = {m.module for m in found.matrices if m.tower == tower}
        modules |= {t.path for t in found.towers if t.name == tower} | {m.module for m in matched if m.tower == tower}
        if method in WHOLE_LAYERS:
            modules = {m.module for m in matched}
            assert all(any(is_below(m, t.path) for t in found.towers if t.name == tower) for m in modules)
        assert wrapped(model)
        assert wrapped(model) <= modules, tower
        missing = {n for n, g in gradients(family, model).items() if g is None or not g.any()}
        assert missing == {n for n in adapter(model) if silent(family, n)}, tower


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@cases("clip", "blip_retrieval", "blip_captioning", "blip_2", "llava", "qwen2_5_vl")
def test_gradient_checkpointing(family: Family, method: str, reentrant: bool):
    model = wrap(family, method).train()
    if not model.supports_gradient_checkpointing:
        pytest.skip(f"{type(model.get_base_model()).__name__} doesn't support gradient checkpointing")
    calls = []
    for path in wrapped(model):
        for inner in model.get_base_model().get_submodule(path).modules():  # a layer's own hooks aren't run again
            inner.register_forward_hook(lambda *_: calls.append(1))
    expected, without = gradients(family, model), len(calls)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    actual = gradients(family, model)
    recomputes = any(  # transformers runs Mllama's vision layers once whatever is asked for
        isinstance(module, GradientCheckpointingLayer)
        and any(is_below(path, name) or is_below(name, path) for path in wrapped(model))
        for name, module in model.get_base_model().named_modules()
    )
    assert (len(calls) > 2 * without) == recomputes or method in WHOLE_TOWER, "nothing was recomputed"
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


# ----------------------------------------------------------------------------------------------- 3. saving and loading


def test_a_fresh_process_gives_the_same_outputs(tmp_path: Path):
    """Every method's adapter of every family, saved here and loaded in one fresh process."""
    save_all(tmp_path)
    script = Path(__file__).with_name("methods.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    distances = json.loads(done.stdout.splitlines()[-1])
    assert set(distances) == {f"{method}/{family}" for family, method in CASES}
    for name, (to_saved, to_base) in distances.items():
        assert to_saved <= 1e-6, name
        assert to_base > 1e-3, name


@cases(*SOME)
def test_several_adapters_under_their_own_names(family: Family, method: str, tmp_path: Path):
    """Also under a name that is a part of stored keys."""
    model = wrap(family, method, adapter_name="first")
    model.add_adapter("0", METHODS[method](family))
    stir(model, "0", seed=1)
    outputs = {}
    for name in ("first", "0"):
        model.set_adapter(name)
        outputs[name] = run(family, model)
    assert distance(outputs["first"], outputs["0"]) > 1e-3
    model.save_pretrained(tmp_path)

    for low_cpu_mem_usage in (False, True):
        options = {"low_cpu_mem_usage": low_cpu_mem_usage}
        other = PeftModel.from_pretrained(family.build(), tmp_path / "0", adapter_name="mine", **options)
        assert distance(run(family, other), outputs["0"]) <= 1e-6
        other.load_adapter(tmp_path / "first", adapter_name="yours", **options)
        assert distance(run(family, other), outputs["0"]) <= 1e-6
        other.set_adapter("yours")
        assert distance(run(family, other), outputs["first"]) <= 1e-6
        assert not any(p.is_meta for p in [*other.parameters(), *other.buffers()])


@cases(*SOME)
def test_saves_and_loads_in_bfloat16(family: Family, method: str, tmp_path: Path):
    model = wrap(family, method, base=family.build().bfloat16())
    expected = run(family, model)
    model.save_pretrained(tmp_path)
    for dtype in (True, False):
        loaded = PeftModel.from_pretrained(family.build().bfloat16(), tmp_path, autocast_adapter_dtype=dtype)
        assert {p.dtype for n, p in adapter(loaded).items()} == {torch.float32 if dtype else torch.bfloat16}
        lost = distance(run(family, frozen(family).bfloat16()), run(family, frozen(family)))
        assert distance(run(family, loaded), expected) <= (1e-6 if dtype else 4 * lost)


ROWS_OF_P = {
    "clip": ["text.[qkv].[01]", "vision.[qkv].[01]"],
    "blip_retrieval": ["text.[qkv].[01]", "fusion.[qkv].[01]", "vision.qkv.[01]"],
    "llava": ["decoder.[qkv].[01]", "vision.[qkv].[01]"],
}
GROUPS = {  # by what shares the factors
    "per_shape": {
        "clip": ["32x32", "48x48"],
        "blip_retrieval": ["32x32", "48x32", "48x48"],
        "llava": ["32x16", "32x32", "48x48"],
    },
    "per_letter": {
        "clip": [*(f"text-{letter}-32x32" for letter in "qkv"), *(f"vision-{letter}-48x48" for letter in "qkv")],
        "llava": [
            *("decoder-q-32x32", "decoder-k-32x16", "decoder-v-32x16"),
            *(f"vision-{letter}-48x48" for letter in "qkv"),
        ],
    },
}


@pytest.mark.parametrize(
    ("share", "family"), [(share, family) for share, groups in GROUPS.items() for family in groups]
)
def test_exact_keys_of_the_file(share: str, family: str, tmp_path: Path):
    """The format of the file is a promise to every adapter that was ever saved."""
    prefix = "base_model.model."
    expected = {
        f"{prefix}aurora_mode_approx_{factor}.{group}"
        for factor in ("U", "V", "lambda_norm")
        for group in GROUPS[share][family]
    }
    for role in ROWS_OF_P[family]:
        tower, letters, indices = role.split(".")
        letters = letters.strip("[]") if "[" in letters else [letters]
        expected |= {
            f"{prefix}{tower}.{letter}.{i}.aurora_mode_approx_P_norm" for letter in letters for i in indices.strip("[]")
        }
    wrap(FAMILIES[family], "aurora_mode_approx", share=share).save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == expected


@pytest.mark.parametrize("family", TEXT_TOWER)
def test_exact_keys_of_a_language(family: str, tmp_path: Path):
    wrap(FAMILIES[family], "cross_lingual_adapter", num_layers=2, pool="attention").save_pretrained(tmp_path)
    linear = ("qkv", "out", "norm_attention", "norm_ffn", "ffn.0", "ffn.2")
    modules = ["down", "up", *(f"blocks.{k}.{name}" for k in (0, 1) for name in linear)]
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.text.cross_lingual_adapter_language.{key}"
        for key in ("query", *(f"{module}.{kind}" for module in modules for kind in ("weight", "bias")))
    }


def test_exact_keys_of_the_fusion_parts(tmp_path: Path):
    family = FAMILIES["blip_retrieval"]
    wrap(family, "aurora_mode_approx").save_pretrained(tmp_path / "without")
    wrap(family, "aurora_mode_approx-fusion").save_pretrained(tmp_path / "with")
    without, with_ = (set(load_file(tmp_path / f / "adapter_model.safetensors")) for f in ("without", "with"))
    assert without < with_
    assert with_ - without == {
        f"base_model.model.{key}"
        for key in (
            *(
                f"fusion.gqt.{layer}.aurora_mode_approx_gqt.{branch}_{part}_norm"
                for layer in (0, 1)
                for branch in ("query", "cross")
                for part in ("gate", "scale", "shift")
            ),
            *(f"fusion.ice.aurora_mode_approx_ice.{part}" for part in ("gamma_norm", "texts", "count")),
        )
    }


def rename(model: nn.Module, names: dict[str, str]) -> nn.Module:
    """Rename submodules everywhere, as a release of the library might; the code still reads the old names."""
    for module in list(model.modules()):
        renamed = {old: new for old, new in names.items() if old in module._modules}
        if renamed:
            module._modules = {renamed.get(name, name): child for name, child in module._modules.items()}
            old_names = {o: property(lambda self, n=n: getattr(self, n)) for o, n in renamed.items()}
            module.__class__ = type(type(module).__name__, (type(module),), old_names)
    return model


RENAMED = [
    ("clip", {"vision_model": "vision_tower", "q_proj": "query"}),
    ("clip", {"text_model": "text_encoder", "encoder": "transformer", "self_attn": "attention"}),
    ("blip_retrieval", {"text_encoder": "fusion_encoder", "query": "q_proj", "value": "v_proj"}),
    ("llava", {"language_model": "text_model", "vision_tower": "vision_encoder", "q_proj": "wq"}),
    ("qwen2_5_vl", {"visual": "vision_tower", "qkv": "qkv_proj"}),
]


@each(("name", "names"), RENAMED)
def test_an_adapter_survives_a_rename_of_modules(name: str, names: dict[str, str], method: str, tmp_path: Path):
    family = FAMILIES[name]
    model = wrap(family, method)
    model.save_pretrained(tmp_path)
    base = rename(family.build(), names)
    assert not any(old in path.split(".") for path, _ in base.named_modules() for old in names)
    renamed = PeftModel.from_pretrained(base, tmp_path)
    assert distance(run(family, renamed), run(family, model)) <= 1e-6


def test_named_targets_survive_a_rename_of_modules(tmp_path: Path):
    family, names = FAMILIES["clip"], {"vision_model": "vision_tower", "q_proj": "query"}
    model = wrap(family, "aurora_mode_approx", target_modules=["q_proj", "v_proj"])
    model.save_pretrained(tmp_path)
    renamed = PeftModel.from_pretrained(rename(family.build(), names), tmp_path)
    assert distance(run(family, renamed), run(family, model)) <= 1e-6


# ------------------------------------------------------------------------------------------------------- 4. counting


def frozen_parts(model: PeftModel, method: str) -> int:
    """The parameters that a method brings along and never trains: the encoder of a language or of images, once."""
    field = {"cross_lingual_adapter": "encoder", "gated_xattn-encoder": "vision_encoder"}.get(method)
    if field is None:
        return 0
    encoder = hf.AutoModel.from_pretrained(getattr(model.peft_config["default"], field))
    return sum(p.numel() for p in encoder.parameters())


@cases()
def test_parameter_count(family: Family, method: str, tmp_path: Path, capsys):
    model = wrap(family, method)
    expected = declared()[method].parameters(family.build(), model.peft_config["default"])
    assert sum(p.numel() for p in adapter(model).values()) == expected
    base = sum(p.numel() for n, p in model.named_parameters() if n not in adapter(model))
    assert base == sum(p.numel() for p in family.build().parameters()) + frozen_parts(model, method)
    assert model.get_nb_trainable_parameters() == (expected, base + expected)
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {expected:,d} || all params: {base + expected:,d} ")
    assert model.get_model_status().trainable_params == expected

    prefix = model.base_model.prefix
    buffers = [b for n, b in model.named_buffers() if f".{prefix}" in n and adapter_of(n, prefix) == "default"]
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == expected + sum(b.numel() for b in buffers)


# ------------------------------------------------------------------------------------------------------ 5. targets

CLIP_FORMS = {
    "regex": ({"target_modules": r".*vision_model.*\.q_proj"}, r"vision_model.*q_proj"),
    "list": ({"target_modules": ["q_proj", "v_proj"]}, r".*[qv]_proj"),
    "one full name": (
        {"target_modules": ["text_model.encoder.layers.0.self_attn.k_proj"]},
        r"text_model\.encoder\.layers\.0\.self_attn\.k_proj",
    ),
    "outside of attentions": ({"target_modules": ["fc1", "visual_projection"]}, r".*fc1|visual_projection"),
    "all-linear": ({"target_modules": "all-linear"}, r".*(_proj|_projection|fc[12])"),
    "exclude names": ({"target_modules": "all-linear", "exclude_modules": ["fc1", "fc2"]}, r".*(_proj|_projection)"),
    "exclude regex": ({"exclude_modules": r".*text_model.*"}, r"vision_model.*[qkv]_proj"),
    "one layer": ({"target_modules": ["q_proj"], "layers_to_transform": 1}, r".*layers\.1\..*q_proj"),
    "layers of a list": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        r".*layers\.0\..*q_proj",
    ),
    "tower": ({"towers": ["text"]}, r"text_model.*[qkv]_proj"),
    "tower and list": ({"towers": ["vision"], "target_modules": ["fc1", "q_proj"]}, r"vision_model.*(fc1|q_proj)"),
}


@pytest.mark.parametrize("form", CLIP_FORMS)
@pytest.mark.parametrize("method", [m for m in TARGETED if ("clip", m) in CASES])
def test_forms_of_target_modules(form: str, method: str, tmp_path: Path):
    family, (options, pattern) = FAMILIES["clip"], CLIP_FORMS[form]
    linear = {path for path, module in family.build().named_modules() if isinstance(module, nn.Linear)}
    model = wrap(family, method, **options)
    assert wrapped(model) == {path for path in linear if re.fullmatch(pattern, path)}
    assert model.peft_config["default"].target_modules == options.get("target_modules")
    assert distance(run(family, model), run(family, frozen(family))) > 1e-3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family.build(), tmp_path)
    assert distance(run(family, loaded), run(family, model)) <= 1e-6


def test_all_linear_leaves_the_output_head_alone():
    family = FAMILIES["llava"]
    linear = {path for path, module in family.build().named_modules() if isinstance(module, nn.Linear)}
    for method in (m for m in TARGETED if ("llava", m) in CASES):
        assert wrapped(wrap(family, method, target_modules="all-linear")) == linear - {"lm_head"}


@pytest.mark.parametrize("targets", [None, "all-linear", r".*q_proj"])
def test_layers_to_transform_is_never_ignored(targets):
    family = FAMILIES["clip"]
    for method in (m for m in TARGETED if ("clip", m) in CASES):
        try:
            config = METHODS[method](family, target_modules=targets, layers_to_transform=[1])
            found = {m.module for m in matched_modules(family.build(), config)}
        except ValueError as error:
            assert "layers_to_transform" in str(error)  # noqa: PT017
            continue
        assert found
        assert all(".layers.1." in path for path in found)


@cases()
def test_matched_modules_is_a_dry_run(family: Family, method: str):
    model = frozen(family)
    config = METHODS[method](family)
    before = copy.deepcopy(config.to_dict()), trace(model)
    table = matched_modules(model, config)
    assert (config.to_dict(), trace(model)) == before
    assert same(model, family.build())
    assert {m.module for m in table} == wrapped(wrap(family, method))
    assert len(table) == len(list(table)) == len({m.role for m in table})
    printed = str(table)
    assert max(map(len, printed.splitlines())) <= 100
    for matrix in table if method in TARGETED else ():
        module = model.get_submodule(matrix.module)
        weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
        assert matrix.d_in == weight.shape[1]
        assert matrix.d_out == matrix.rows[1] - matrix.rows[0]
        assert matrix.rows[1] <= weight.shape[0]
        # paths differ at their ends, which are shown
        assert all(text[-24:] in printed for text in (matrix.module, matrix.role, f"{matrix.d_out} x {matrix.d_in}"))


@cases(among={"cross_lingual_adapter"})
def test_a_whole_tower_is_one_row(family: Family, method: str):
    config = METHODS[method](family)
    (row,) = matched_modules(frozen(family), config)
    assert (row.module, row.tower, row.role) == (family.towers["text"], "text", "text.tower.0")
    model = get_peft_model(frozen(family), config)
    adapters = model.peft_config["default"]
    for described in (frozen(family), model):
        (row,) = matched_modules(described, adapters)
        assert (row.d_in, row.d_out) == (adapters.encoder_width, adapters.output_dim)
        assert all(text in str(matched_modules(described, config)) for text in (row.module, row.role))


@pytest.mark.parametrize("form", [f for f in CLIP_FORMS if f != "tower"])
@pytest.mark.parametrize("method", sorted(WHOLE_TOWER))
def test_a_whole_tower_has_no_targets(form: str, method: str):
    with pytest.raises(ValueError, match=r"must be None(: the text tower .* as a whole| or \['text'\]), got"):
        METHODS[method](FAMILIES["clip"], **CLIP_FORMS[form][0])


@cases("clip", "mllama", among=TARGETED)
def test_nothing_matched_names_what_exists(family: Family, method: str):
    model = frozen(family)
    before = trace(model)
    leaf = next(iter(matched_modules(model, METHODS[method](family)))).module.rpartition(".")[2]
    for options in ({"target_modules": ["nonsense"]}, {"target_modules": "nonsense.*"}, {"exclude_modules": ".*"}):
        config = METHODS[method](family, **options)
        for call in (matched_modules, get_peft_model):
            with pytest.raises(ValueError, match=rf"No module of {type(model).__name__} matches (?s:.)*{leaf}"):
                call(model, config)
    assert trace(model) == before


def test_a_tower_that_the_model_lacks_is_named():
    with pytest.raises(ValueError, match=r"No module of CLIPModel .*towers=\['decoder'\](?=.*vision: ).*text: "):
        wrap(FAMILIES["clip"], "aurora_mode_approx", towers=["decoder"])


WHOLE = [("clip", "visual_projection"), ("llava", "multi_modal_projector"), ("blip_retrieval", "itm_head")]


@each(("name", "module"), WHOLE)
def test_modules_to_save(name: str, module: str, method: str, tmp_path: Path):
    family = FAMILIES[name]
    expected = run(family, frozen(family))
    targets = {"target_modules": "all-linear"} if method in TARGETED else {}
    model = wrap(family, method, modules_to_save=[module], **targets)
    assert not any(module in path for path in wrapped(model))
    whole = [n for n in trainable(model) if module in n]
    assert whole
    with torch.no_grad():
        for parameter in whole:
            model.get_parameter(parameter).add_(0.1)
    adapted = run(family, model)
    model.save_pretrained(tmp_path)
    assert any(module in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(family.build(), tmp_path)
    assert distance(run(family, loaded), adapted) <= 1e-6
    with model.disable_adapter():
        assert torch.equal(run(family, model), expected)
    assert torch.equal(run(family, model), adapted)


# ------------------------------------------------------------------------------------------------------ 6. bad input

COMMON_BAD_VALUES = [
    *(("towers", value) for value in (["audio"], "audio", [], 3, ["vision", 1])),
    *(("target_modules", value) for value in (7, [1], {"q_proj": 1})),
    *(("exclude_modules", value) for value in (True, [None])),
    *(("layers_to_transform", value) for value in (-1, ["0"], 1.0, True)),
    *(("modules_to_save", value) for value in (3, [3])),
    *(("format_version", value) for value in (0, "1", 1.0)),
    ("layers_pattern", "layers"),  # without layers_to_transform
    ("base_signature", "clip"),
]
BAD_VALUES = {
    "aurora_mode_approx": [
        *(("r", value) for value in (0, -1, "8", True, 2.0, None)),
        *(("alpha", value) for value in (0, -1.0, "1", True, float("nan"), float("inf"))),
        *(("dropout", value) for value in (1.0, -0.1, "0", True, float("nan"))),
        *(("share", value) for value in ("everything", None, ["none"])),
        *(("core", value) for value in ("dense", 1)),
        *(("init_weights", value) for value in ("zeros", True)),
        *(("use_gqt", value) for value in (1, "no")),
        ("use_ice", "yes"),
        *(("gqt_branches", value) for value in (["self"], "query", [1])),
        *(("ice_bank_size", value) for value in (0, "256", True)),
    ],
    "cross_lingual_adapter": [
        *((name, value) for name in ("bottleneck_dim", "num_heads", "ff_mult") for value in (0, -1, "8", 8.0, True)),
        *((name, None) for name in ("bottleneck_dim", "ff_mult")),  # num_heads follows the width then
        *(("num_layers", value) for value in (-1, "1", 1.0, True)),
        ("num_heads", 3),  # of a width of 16
        *(("dropout", value) for value in (1.0, -0.1, "0", True, float("nan"))),
        *(("pool", value) for value in ("max", None, ["mean"], 0)),
        *(("level", value) for value in ("token", "", 1, ["tokens"])),
        *(("save_encoder", value) for value in (1, "yes", None)),
        *(
            (name, v)
            for name in ("encoder", "encoder_revision", "encoder_type", "tokenizer_hash")
            for v in ("", 3, ["a"])
        ),
        *((n, v) for n in ("encoder_width", "encoder_vocab_size", "output_dim") for v in (0, -1, "8", 8.0, True)),
        *(("towers", value) for value in (["vision"], ["text", "vision"], ["decoder"])),
        *((n, v) for n in ("target_modules", "exclude_modules") for v in (["q_proj"], "all-linear", [])),
        *(("layers_to_transform", value) for value in (0, [1])),
    ],
    "gated_xattn": [
        *(("media_token_id", value) for value in (-1, "7", 7.0, True, None)),
        *(
            (name, value)
            for name in (
                "num_latents",
                "resampler_depth",
                "resampler_heads",
                "head_dim",
                "max_frames",
            )
            for value in (0, -1, "8", 8.0, True, None)
        ),
        *(("every_n_layers", value) for value in (0, -1, "8", 8.0, True)),
        *(("ff_mult", value) for value in (-1, "4", 4.0, True, None)),
        *(("vision_hidden_size", value) for value in (0, -1, "8", 8.0, True)),
        *(("resampler", value) for value in ("attention", None, ["mean"], 0)),
        *(("gate", value) for value in ("tanh", None, ["none"], 0)),
        *(("gate_init", value) for value in ("0", None, True, 11, float("nan"))),
        *(("attend", value) for value in ("next", None, ["last"], 0)),
        *(("share_blocks", value) for value in (1, "yes", None)),
        *(
            (name, v)
            for name in ("vision_encoder", "vision_encoder_revision", "vision_encoder_type")
            for v in ("", 3, ["a"])
        ),
        *(("towers", value) for value in (["vision"], ["decoder", "vision"])),
        *((n, v) for n in ("target_modules", "exclude_modules") for v in (["q_proj"], "all-linear", [])),
        *(("layers_to_transform", value) for value in (0, [1])),
    ],
    "hard_sample_domain_adapter": [
        *((name, value) for name in ("bottleneck_dim", "num_heads", "ff_mult") for value in (0, -1, "8", 8.0, True)),
        *((name, None) for name in ("bottleneck_dim", "ff_mult")),  # num_heads follows the width then
        *(("num_layers", value) for value in (-1, "1", 1.0, True)),
        ("num_heads", 3),  # of a width of 8
        *(("dropout", value) for value in (1.0, -0.1, "0", True, float("nan"))),
        *(("placement", value) for value in ("side", None, ["layer"])),
        *(("last_layers", value) for value in (0, -1, "4", 4.0, True)),
        ("target_modules", "all-linear"),
    ],
    "structured_prompt": [
        *((n, v) for n in ("num_general", "num_instance", "num_domain") for v in (-1, "4", 4.0, True, None)),
        *((n, v) for n in ("num_domains", "num_heads", "chunk_size") for v in (0, -1, "8", 8.0, True)),
        *((name, None) for name in ("num_domains", "chunk_size")),
        *(("attention_dim", value) for value in (0, "128", None)),
        ("num_heads", 3),  # of a width of 16
        *(("order", value) for value in ("DGI", "gdi", None, ["GDI"])),
        *(("domain", value) for value in ("two", None, 1)),
        ("num_domains", 2),  # with domain="one"
        *(("mode", value) for value in ("late", None)),
        *(("general_init", value) for value in ("", " ", 3, ["a"])),
        *((n, "w3") for n in ("domain_init", "instance_init")),  # earlier versions had them
        ("domain", "per_group"),
        *(("shortlist", value) for value in (0, -1, 2.0, "5", True)),
        *(("text_anchor", value) for value in (-0.1, "1", True, float("nan"), float("inf"))),
        *(("anchor_template", value) for value in ("a photo", None, 3)),
        *(("output_dim", value) for value in (0, -1, "8", 8.0, True)),
        *(("towers", value) for value in (["vision"], ["text", "vision"], ["decoder"])),
        *((n, v) for n in ("target_modules", "exclude_modules") for v in (["q_proj"], "all-linear", [])),
        *(("layers_to_transform", value) for value in (0, [1])),
    ],
}
BAD_VALUES |= {name: list(case.bad) for name, case in declared().items() if case.bad}


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [(m, *bad) for m, values in BAD_VALUES.items() for bad in [*COMMON_BAD_VALUES, *values]],
)
def test_config_values_are_checked_where_they_are_set(method: str, field: str, value):
    with pytest.raises(ValueError, match=rf"\b{field} must be .*got "):
        METHODS[method](home(method), **{field: value})


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")
@cases("clip", "blip_retrieval")
def test_config_round_trip(family: Family, method: str, tmp_path: Path):
    left_out = {"exclude_modules": ["nonsense"]} if method in TARGETED else {}
    config = wrap(family, method, towers=None, **left_out).peft_config["default"]
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.to_dict() | {"auto_mapping": None} == config.to_dict() | {"auto_mapping": None}


OPENED: list[str] = []
MARKER = "peft_multimodal_marker"


@pytest.fixture
def audit():
    """Whatever the interpreter opens, imports, runs or starts while the test runs (audit hooks can't be taken out)."""
    OPENED[:] = [""]
    if not hasattr(sys, MARKER):
        setattr(sys, MARKER, True)
        events = (
            "open",
            "import",
            "exec",
            "compile",
            "os.system",
            "subprocess.Popen",
            "socket.getaddrinfo",
            "os.listdir",
        )
        sys.addaudithook(lambda event, args: OPENED and event in events and OPENED.append(f"{event} {args}"))
    yield OPENED
    OPENED.clear()


LOADED = {  # documented to go to AutoModel, checked after it
    "cross_lingual_adapter": {"encoder", "encoder_revision"},
    "gated_xattn": {"vision_encoder", "vision_encoder_revision"},
    "gated_xattn-encoder": {"vision_encoder", "vision_encoder_revision"},
}


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")
@pytest.mark.parametrize("method", METHODS)
def test_no_config_value_reaches_a_loader(method: str, tmp_path: Path, audit: list[str]):
    """Values that look like modules, paths or code are refused or stay what they are: text."""
    family = home(method)
    config = METHODS[method](family)
    own = {f.name for f in fields(config)} - {f.name for f in fields(PeftConfig)} - LOADED.get(method, set())
    assert own
    refused = 0
    for field in sorted(own):
        for text in (MARKER, f"/tmp/{MARKER}.py", f"__import__('{MARKER}')"):
            for value in (text, [text], {text: text}):
                try:
                    model = get_peft_model(family.build(), METHODS[method](family, **{field: value}))
                except ValueError:
                    refused += 1
                    continue
                model.save_pretrained(tmp_path / field)
                PeftModel.from_pretrained(family.build(), tmp_path / field)
    assert refused > 4 * len(own)
    open(tmp_path / MARKER, "w").close()  # the audit works
    assert [event for event in audit if MARKER in event and str(tmp_path) not in event] == []
    assert any(MARKER in event for event in audit)


def change_weights(change):
    def damage(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        weights = load_file(path)
        change(weights, min(name for name in weights if weights[name].ndim))
        save_file(weights, path)

    return damage


def change_config(**values):
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def poison(weights: dict, key: str) -> None:
    weights[key].view(-1)[-1] = float("nan")


DAMAGE = {  # damage, whether PEFT's own loading reaches our code, message
    "missing": (change_weights(lambda w, k: w.pop(k)), True, "don't fit adapter .*missing: "),
    "extra": (
        change_weights(lambda w, k: w.update({f"{k}.extra": w[k].clone()})),
        True,
        "not of this adapter: .*extra",
    ),
    "misshapen": (
        change_weights(lambda w, k: w.update({k: w[k][..., :-1].clone()})),
        True,
        "has shape .*the model needs",
    ),
    "NaN": (change_weights(poison), True, "holds NaN"),
    "newer format": (change_config(format_version=99), True, "format 99.*Upgrade"),
    "bad value": (change_config(modules_to_save="audio"), True, "modules_to_save must be a list of strings"),
    "unknown method": (change_config(peft_type="NO_SUCH_METHOD"), False, "names the method 'NO_SUCH_METHOD'"),
    "truncated": (truncate, False, "damaged or truncated"),
    "config is a list": (lambda f: (f / "adapter_config.json").write_text("[1]"), False, "must hold a JSON object"),
    "config is no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), False, "is no JSON file"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), False, "has no adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), False, "has no adapter_model.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_adapter_is_one_clear_error(damage: str, method: str, tmp_path: Path):
    family = home(method)
    expected, (spoil, by_peft, message) = run(family, frozen(family)), DAMAGE[damage]
    wrap(family, method).save_pretrained(tmp_path)
    spoil(tmp_path)
    model = frozen(family)
    with pytest.raises(ValueError, match=message):
        peft_multimodal.load(model, tmp_path)
    assert distance(run(family, model), expected) <= 1e-6
    for options in ({}, {"low_cpu_mem_usage": True}) if by_peft else ():
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(frozen(family), tmp_path, **options)
    if by_peft:
        model = wrap(family, method, adapter_name="good")
        before = run(family, model)
        with pytest.raises(ValueError, match=message):
            model.load_adapter(tmp_path, "damaged")
        assert list(model.peft_config) == model.active_adapters == ["good"]
        assert torch.equal(run(family, model), before)


STRANGERS = [("clip", "siglip"), ("clip", "llava"), ("blip_retrieval", "blip_captioning"), ("llava", "mllama")]


@each(("name", "other"), STRANGERS)
def test_an_adapter_of_another_base(name: str, other: str, method: str, tmp_path: Path):
    if method in WHOLE_LAYERS and other == "mllama":
        other = (
            "blip_2"  # Mllama's decoder has the size of Llava's, and is another base only to what is inside its layers
        )
    wrap(FAMILIES[name], method).save_pretrained(tmp_path)
    base = frozen(FAMILIES[other])
    expected, before = run(FAMILIES[other], base), trace(base)
    with pytest.raises(ValueError, match=r"another base|don't fit|needs|has no text encoder"):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(run(FAMILIES[other], base), expected)
    assert trace(base) == before


def test_a_wider_model_of_the_same_class_is_another_base(tmp_path: Path):
    family = FAMILIES["clip"]
    wrap(family, "aurora_mode_approx").save_pretrained(tmp_path)
    config = copy.deepcopy(family.build().config)
    config.vision_config.hidden_size = 64
    with pytest.raises(ValueError, match=r"another base: .*vision tower: .*width 48 then, .*width 64 now"):
        PeftModel.from_pretrained(hf.CLIPModel(config), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_gqt": True}, r"use_gqt=True needs .*CLIPModel has none"),
        ({"use_ice": True}, r"use_ice=True needs .*CLIPModel has none"),
    ],
)
def test_what_a_model_cannot_do_leaves_it_as_it_was(options: dict, message: str):
    model = frozen(FAMILIES["clip"])
    before = trace(model)
    with pytest.raises(ValueError, match=message):
        wrap(FAMILIES["clip"], "aurora_mode_approx", base=model, **options)
    assert trace(model) == before


# -------------------------------------------------------------------------------------------------------- 7. Trainer


class Rows(torch.utils.data.Dataset):
    """A family's batch as rows, several times with different images."""

    def __init__(self, family: Family, model: nn.Module, copies: int = 4, seed: int = 3) -> None:
        batch = family.train_inputs(model)
        self.rest = {k: v for k, v in batch.items() if not isinstance(v, torch.Tensor)}
        generator = torch.Generator().manual_seed(seed)
        tensors = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}
        self.rows = [
            {
                k: v[i]
                + (torch.randn(v[i].shape, generator=generator) if v[i].is_floating_point() and v.ndim > 3 else 0)
                for k, v in tensors.items()
            }
            for _ in range(copies)
            for i in range(len(batch["input_ids"]))
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]

    def collate(self, rows: list[dict]) -> dict:
        return {**{k: torch.stack([row[k] for row in rows]) for k in rows[0]}, **self.rest}


def trainer_for(family: Family, method: str, folder: Path, **options) -> hf.Trainer:
    model = wrap(family, method, stirred=False)
    rows = Rows(family, model)
    arguments = hf.TrainingArguments(
        **{
            **{"output_dir": str(folder), "max_steps": 4, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps"},
            **{"per_device_train_batch_size": 3, "learning_rate": 0.02, "weight_decay": 0.1, "use_cpu": True},
            **{"report_to": "none", "remove_unused_columns": False, "disable_tqdm": True, "seed": 0, **options},
        },
    )
    return hf.Trainer(model, arguments, rows.collate, train_dataset=rows, eval_dataset=Rows(family, model, 2, seed=4))


@cases("clip", "blip_captioning", only=("clip", "blip_captioning", "llava", "blip_vqa", "vilt"))
def test_transformers_trainer(family: Family, method: str, tmp_path: Path):
    trainer = trainer_for(family, method, tmp_path / "whole")
    trainer.train()
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2
    assert evaluations[0] != evaluations[1]
    assert "eval_loss" in trainer.evaluate()

    checkpoint = tmp_path / "whole" / "checkpoint-2"
    files = {file.relative_to(checkpoint).as_posix() for file in checkpoint.rglob("*") if file.is_file()}
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
    adapter_files = {"adapter_model.safetensors", "adapter_config.json", "README.md"} | declared()[
        method
    ].promises.companions
    assert files == adapter_files | state
    count = trainer.model.get_nb_trainable_parameters()[0]
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 4 * count + 12_000

    resumed = trainer_for(family, method, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    for name, parameter in adapter(trainer.model).items():
        torch.testing.assert_close(adapter(resumed.model)[name], parameter, atol=1e-6, rtol=0, msg=name)


@cases("clip", only=("clip", "llava"))
def test_trainer_loads_the_best_model_at_its_end(family: Family, method: str, tmp_path: Path):
    # With a higher loss for the better one, the best is the first checkpoint where training lowers the loss.
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = trainer_for(family, method, tmp_path, **options)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best, other = sorted((2, 4), key=losses.__getitem__, reverse=True)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    saved = {
        step: run(family, PeftModel.from_pretrained(family.build(), tmp_path / f"checkpoint-{step}")) for step in (2, 4)
    }
    assert distance(run(family, trainer.model), saved[best]) <= 1e-6
    assert distance(run(family, trainer.model), saved[other]) > 1e-4


@cases("clip", "blip_retrieval")
def test_what_the_stock_trainer_decays(family: Family, method: str, tmp_path: Path):
    arguments = hf.TrainingArguments(output_dir=str(tmp_path), weight_decay=0.1, use_cpu=True, report_to="none")
    trainer = hf.Trainer(wrap(family, method), arguments)
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    decayed = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"]}
    assert {names[id(p)] for group in groups for p in group["params"]} == set(adapter(trainer.model))
    assert decayed
    assert decayed == {
        n for n in adapter(trainer.model) if not NO_DECAY.search(n.split(trainer.model.base_model.prefix)[-1])
    }


@cases("clip", only=("clip", "llava"))
def test_trainer_with_gradient_checkpointing(family: Family, method: str, tmp_path: Path):
    states = []
    for reentrant in (None, False, True):
        options = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        trainer = trainer_for(
            family,
            method,
            tmp_path,
            eval_strategy="no",
            save_strategy="no",
            gradient_checkpointing=bool(options),
            **options,
        )
        trainer.train()
        states.append(adapter(trainer.model))
    for other in states[1:]:
        for name, parameter in states[0].items():
            torch.testing.assert_close(other[name], parameter, atol=1e-4, rtol=1e-3, msg=name)


# -------------------------------------------------------------------------- 8. dtypes, compilation, copies, generation


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
@cases("clip", "siglip", "blip_retrieval", "llava", "qwen2_5_vl", "florence2")
def test_half_precision(family: Family, method: str, mode: str):
    def context():
        return torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else nullcontext()

    def base() -> nn.Module:
        return frozen(family).bfloat16() if mode == "bfloat16" else frozen(family)

    start_model = wrap(family, method, base=base(), stirred=False)
    model = wrap(family, method, base=base())  # outside: autocast keeps the weights that it has seen
    with context():
        expected = run(family, base())
        start = run(family, start_model)
        output = run(family, model)
        batch = {**(family.train_inputs(model) or {}), **inputs(family, model)}
        out = model(**batch)
        loss = out.loss if family.targets else family.output(out).square().mean()
    assert start.dtype == output.dtype == expected.dtype
    exact = run(family, wrap(family, method))
    lost = distance(expected, run(family, frozen(family)))  # by the base model alone
    assert distance(start, expected) <= 2 * lost or method in NOT_IDENTITY
    assert distance(output, exact) <= 4 * lost
    loss.backward()
    for name, parameter in adapter(model).items():
        if not silent(family, name):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.dtype == parameter.dtype


DO_NOT_COMPILE = {"vilt", "qwen2_5_vl"}  # their own code branches on the values of tensors


@cases("clip", "blip_retrieval", "llava")
def test_compiles_without_graph_breaks(family: Family, method: str):
    torch._dynamo.reset()
    if family.name in DO_NOT_COMPILE:
        with pytest.raises((TorchDynamoException, GuardOnDataDependentSymNode)) as error:
            run(family, torch.compile(frozen(family), fullgraph=True, backend="eager"))
        pytest.skip(f"the base model doesn't compile: {str(error.value).splitlines()[0]}")
    model = wrap(family, method)
    eager = run(family, model)  # before: transformers installs hooks at the first call, which can't be traced
    assert distance(run(family, torch.compile(model, fullgraph=True, backend="eager")), eager) <= 1e-5


def test_most_families_compile():
    assert len(DO_NOT_COMPILE) <= 2 < len(FAMILIES) / 6


@pytest.mark.full
@pytest.mark.parametrize("method", [m for m in METHODS if ("clip", m) in CASES])
def test_inductor(method: str):
    torch._dynamo.reset()
    family = FAMILIES["clip"]
    model = wrap(family, method)
    expected, output = gradients(family, model), run(family, model)
    out = torch.compile(model)(**family.train_inputs(model))
    assert distance(family.output(out), output) <= 1e-4
    model.zero_grad()
    out.loss.backward()
    for name, parameter in adapter(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-3, msg=name)


@cases("blip_captioning", "llava", "qwen2_5_vl", "florence2", "t5", "llama", having="generates")
def test_generates_alike_with_and_without_the_cache(family: Family, method: str):
    def generate(model: nn.Module, use_cache: bool) -> list[list[int]]:
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
        options["suppress_tokens"] = [IMAGE, IMAGE + 1]  # a model that has learnt its language doesn't say them
        return model.generate(**family.generate_inputs(model), **options).tolist()

    base = frozen(family)
    assert generate(base, True) == generate(base, False)
    model = wrap(family, method)
    for seed in range(1, 5):  # small changes of the image may leave the most likely words what they are
        if generate(model, True) == generate(base, True):
            stir(model, seed=seed)
    cached = generate(model, True)
    assert cached == generate(model, False)
    assert cached != generate(base, True)
    with model.disable_adapter():
        assert generate(model, True) == generate(base, True)


@cases(*SOME)
def test_copies_and_pickles(family: Family, method: str):
    model = wrap(family, method)
    buffer = io.BytesIO()
    torch.save(model, buffer)  # before the first call: transformers then installs hooks that no pickle takes
    buffer.seek(0)
    expected = run(family, model)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(run(family, other), expected)
        stir(other, seed=5)
        assert distance(run(family, other), expected) > 1e-4
        assert torch.equal(run(family, model), expected), "the copy shares parameters with the original"
        assert torch.equal(run(family, other.unload()), run(family, frozen(family)))


# ------------------------------------------------------------------------------------- several adapters, and merging


@cases(*SOME)
def test_adding_switching_and_deleting_adapters(family: Family, method: str):
    base = run(family, frozen(family))
    model = wrap(family, method)
    first = run(family, model)
    model.add_adapter("other", METHODS[method](family))
    assert trainable(model) == set(adapter(model)), "a new adapter is not active yet"
    assert torch.equal(run(family, model), first)
    stir(model, "other", seed=1)
    model.set_adapter("other")
    fill(family, model)
    assert torch.equal(run(family, model), run(family, model))
    assert trainable(model) == set(adapter(model, "other"))
    second = run(family, model)
    assert distance(second, first) > 1e-3
    assert distance(second, base) > 1e-3

    status = model.get_model_status()
    assert status.available_adapters == ["default", "other"]
    assert status.active_adapters == ["other"]
    assert status.enabled is True
    assert status.merged_adapters == []
    assert status.requires_grad == {"default": False, "other": True}
    assert status.num_adapter_layers == len(model.get_layer_status())

    with pytest.warns(UserWarning, match="active"):
        model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert torch.equal(run(family, model), first)
    assert not any(".other" in key for key in model.state_dict())
    assert list(model.peft_config) == ["default"]
    model.add_adapter("other", METHODS[method](family))  # the name is free again
    model.set_adapter("other")
    assert distance(at_start(family, method, model), at_start(family, method, frozen(family))) <= 1e-6
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(run(family, model), first)
    assert torch.equal(run(family, model.unload()), base)


def other_shape(family: Family, method: str) -> dict:
    """Changes of a config that give an adapter other sizes."""
    if (changes := declared()[method].other) is not None:
        return changes
    if method in WHOLE_LAYERS:
        return {"num_latents": 2, "head_dim": 4, "every_n_layers": 2, "ff_mult": 0, "gate": "vector"}
    if method == "structured_prompt":
        return {"num_general": 2, "num_instance": 1, "num_domain": 0, "order": "GID", "attention_dim": 8}
    if method in WHOLE_TOWER:
        return {"bottleneck_dim": 8, "num_layers": 2, "pool": "cls"}
    if method in OWN_LAYERS:
        return {"bottleneck_dim": 4, "num_heads": 1, "num_layers": 2, "last_layers": 1}
    towers = peft_multimodal.describe(family.build()).tower_names()
    return {"r": 2, "towers": ["fusion" if "fusion" in towers else towers[-1]], "share": "none"}


@cases("clip", "blip_retrieval", "llava")
def test_adapters_of_different_shape_live_together(family: Family, method: str):
    model = wrap(family, method)
    first = run(family, model)
    changes = other_shape(family, method)
    torch.manual_seed(0)
    model.add_adapter("other", METHODS[method](family, **changes))
    stir(model, "other")
    assert torch.equal(run(family, model), first)
    model.set_adapter("other")
    fill(family, model)
    alone = wrap(family, method, **changes)
    assert distance(run(family, model), run(family, alone)) <= 1e-5
    model.delete_adapter("default")
    assert distance(run(family, model), run(family, alone)) <= 1e-5


@cases("clip", only=("clip", "siglip", "flava"))
def test_adapter_names_of_rows(family: Family, method: str):
    """Each row by its own adapter, as if it stood among rows of that adapter; or one adapter for the whole batch."""
    model, names = wrap(family, method), ["other", "__base__", "default"]
    model.add_adapter("other", METHODS[method](family))
    stir(model, "other", seed=1)
    with torch.no_grad():
        if not declared()[method].promises.rows:
            with pytest.raises(ValueError, match=r"adapter_names.*set_adapter"):
                model(**family.inputs(model), adapter_names=names)
            return
        # Texts are compared by the column of a dual encoder's logits, or by the row of a fusion encoder's states.
        mixed = family.output(model(**family.inputs(model), adapter_names=names))
    for row, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else nullcontext():
            model.set_adapter(name if name in model.peft_config else "default")
            alone = run(family, model)
        images = slice(None) if method in WHOLE_TOWER else row  # which the row's adapter may change too
        mine, its = (t[images, row] if family.kind == "dual" else t[row] for t in (mixed, alone))
        seen = family.inputs()["attention_mask"][row].bool()
        if family.kind == "fusion":  # the last states are those of the text
            mine, its = (torch.cat([t[: -len(seen)], t[-len(seen) :][seen]]) for t in (mine, its))
        torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5, msg=name)


@cases(among=set(METHODS) - set(MERGE))
def test_what_is_no_weight_update_is_not_merged(family: Family, method: str):
    model = wrap(family, method)
    expected = run(family, model)
    for call in (model.merge_adapter, model.merge_and_unload):
        for options in ({}, {"safe_merge": True}, {"adapter_names": ["default"]}):
            with pytest.raises(ValueError, match=r"no weight update.*can't be merged.*unload\(\)"):
                call(**options)
    assert torch.equal(run(family, model), expected)
    assert model.get_model_status().merged_adapters == []


@cases(among=MERGE)
def test_merges(family: Family, method: str):
    base = frozen(family)
    model, options = wrap(family, method), MERGE[method]
    expected = run(family, model)
    tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
    assert model.get_model_status().merged_adapters == []
    model.merge_adapter(**options)
    assert distance(run(family, model), expected) <= tolerance
    assert model.get_model_status().merged_adapters == ["default"]
    model.unmerge_adapter()
    assert model.get_model_status().merged_adapters == []
    assert distance(run(family, model), expected) <= tolerance
    with model.disable_adapter():
        assert distance(run(family, model), run(family, base)) <= tolerance
    model.merge_adapter(**options)
    with model.disable_adapter():
        assert distance(run(family, model), run(family, base)) <= tolerance

    model = wrap(family, method)
    merged = model.merge_and_unload(safe_merge=True, **options)
    assert type(merged) is type(base)
    if not options:
        assert distance(run(family, merged), expected) <= tolerance
    assert distance(run(family, merged), run(family, base)) > 1e-4
    assert trace(merged) == trace(base)


@pytest.mark.parametrize("method", [m for m, options in MERGE.items() if options])
def test_parts_that_are_no_weight_update_are_not_merged(method: str):
    family = FAMILIES["blip_retrieval"]
    model = wrap(family, method)
    expected = run(family, model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"can't be merged.*cp_only=True"):
            call()
    assert torch.equal(run(family, model), expected)


@cases("clip", "siglip", "blip_retrieval", "llava", "qwen2_5_vl", among=MERGE)
@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
def test_safe_merge_refuses_infinite_weights(family: Family, method: str, which: int):
    base = frozen(family)
    paths = [m.module for m in matched_modules(base, METHODS[method](family))]
    for call in ("merge_adapter", "merge_and_unload"):
        model = wrap(family, method)
        with torch.no_grad():
            layer = model.get_base_model().get_submodule(paths[which])
            next(p for n, p in layer.named_parameters() if model.base_model.prefix in n).fill_(float("inf"))
        with pytest.raises(ValueError, match=r"NaN or inf"):
            getattr(model, call)(safe_merge=True, **MERGE[method])
        with model.disable_adapter():
            assert torch.equal(run(family, model), run(family, base))
        assert same(model.unload(), base)


@cases("clip", "blip_retrieval", "llava", among=MERGE)
def test_merges_in_float16(family: Family, method: str):
    expected = wrap(family, method, stirred=True)
    exact = expected.merge_and_unload(**MERGE[method]).state_dict()
    merged = wrap(family, method, base=frozen(family).half()).merge_and_unload(**MERGE[method])
    assert {p.dtype for p in merged.parameters()} == {torch.float16}
    for name, weight in merged.state_dict().items():
        if weight.is_floating_point():
            torch.testing.assert_close(weight.float(), exact[name], atol=5e-3, rtol=2e-3, msg=name)


@pytest.mark.parametrize("method", [m for m, options in MERGE.items() if not options])
@pytest.mark.parametrize("family", ["clip", "llava", "florence2"])
def test_two_active_adapters_add_up(family: str, method: str):
    family = FAMILIES[family]
    model = wrap(family, method)
    model.add_adapter("other", METHODS[method](family))
    stir(model, "other", seed=1)
    model.base_model.set_adapter(["default", "other"])
    expected = run(family, model)
    merged = model.merge_and_unload()
    assert distance(run(family, merged), expected) <= 1e-4 * max(1.0, float(expected.abs().max()))
    one = wrap(family, method).merge_and_unload()
    assert distance(run(family, one), expected) > 1e-3
