"""Towers, attentions, widths and media tokens are found in every family, without knowing its name."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
import transformers as hf
from families import FAMILIES, IMAGE, Family
from methods import CASES, wrap
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_multimodal import describe
from peft_multimodal.core import anatomy
from peft_multimodal.core.anatomy import SCREEN, TOWERS, is_below

VISUAL = {n: f for n, f in FAMILIES.items() if n != "llama"}  # which is one tower as a whole
EVERY = pytest.mark.parametrize("family", [pytest.param(f, id=n) for n, f in VISUAL.items()])


@EVERY
def test_towers_are_where_the_family_says(family: Family):
    model = family.build()
    found = describe(model)
    for role, path in family.towers.items():
        roots = [t.path for t in found.towers if t.name == role]
        assert any(is_below(root, path) for root in roots), (role, path, roots)
        weights = [m for m in found.matrices if is_below(m.module, path)]
        # Cross-attentions of a text encoder read the image: they are fusion. A fusion encoder's pooler is no layer.
        assert {m.tower for m in weights} <= {role} | {"text": {"fusion"}, "fusion": {"other"}}.get(role, set())
    assert {t.name for t in found.towers if t.attentions} >= set(family.towers)
    assert found.tower_names() == [t for t in TOWERS if any(m.tower == t for m in found.matrices)]


@EVERY
def test_sizes_are_those_of_the_modules(family: Family):
    model = family.build()
    found = describe(model)
    assert found.model_class == type(model).__name__
    for tower in found.towers:
        module = model.get_submodule(tower.path)
        assert tower.class_name == type(module).__name__
        assert tower.parameters == sum(p.numel() for p in module.parameters())
        if tower.attentions:
            queries = {m.d_in for m in found.matrices if m.letter == "q" and is_below(m.module, tower.path)}
            assert tower.hidden_size in queries
    for matrix in found.matrices:
        module = model.get_submodule(matrix.module)
        weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
        assert 0 <= matrix.rows[0] < matrix.rows[1] <= weight.shape[0]
        assert (matrix.rows[1] - matrix.rows[0], matrix.d_in) == (matrix.d_out, weight.shape[1])


@EVERY
def test_every_linear_module_is_found_once(family: Family):
    model = family.build()
    found = describe(model).matrices
    attentions = [p for p, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    linear = {p for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    linear = {p for p in linear if not any(is_below(p, a) for a in attentions)}
    assert {m.module for m in found} == linear | set(attentions)
    for module in {m.module for m in found}:  # the rows of a fused projection cover it without gap or overlap
        rows = sorted(m.rows for m in found if m.module == module)
        assert rows[0][0] == 0
        assert all(a[1] == b[0] for a, b in pairwise(rows))


@EVERY
def test_roles_are_unique_and_counted(family: Family):
    found = describe(family.build()).matrices
    roles = [m.role for m in found]
    assert len(roles) == len(set(roles))
    numbers: dict[str, list[int]] = {}
    for matrix in found:
        tower, letter, index = matrix.role.split(".")
        assert (tower, letter) == (matrix.tower, matrix.letter)
        numbers.setdefault(f"{tower}.{letter}", []).append(int(index))
    for kind, indices in numbers.items():
        assert indices == list(range(len(indices))), kind
    for tower in {m.tower for m in found} - {"other"}:  # as many queries as keys and values
        counts = {letter: len(numbers.get(f"{tower}.{letter}", ())) for letter in "qkv"}
        assert len(set(counts.values())) == 1, (tower, counts)


@EVERY
def test_attention_projections_are_in_a_tower(family: Family):
    for matrix in describe(family.build()).matrices:
        if matrix.letter in ("q", "k", "v"):
            assert matrix.tower in TOWERS, matrix


@EVERY
def test_an_adapter_changes_nothing_in_the_description(family: Family):
    expected = describe(family.build())
    for method in (m for f, m in CASES if f == family.name):
        model = wrap(family, method)
        assert describe(model).matrices == expected.matrices
        assert describe(model).signature() == expected.signature()
        assert [(t.name, t.path, t.class_name) for t in describe(model).towers] == [
            (t.name, t.path, t.class_name) for t in expected.towers
        ]
    lora = get_peft_model(family.build(), LoraConfig(r=2, target_modules=r".*(q_proj|\.query|Attention\.q)"))
    assert [m.role for m in describe(lora).matrices] == [m.role for m in expected.matrices]


@EVERY
def test_the_table_is_readable(family: Family):
    model = family.build()
    found = describe(model)
    lines = str(found).splitlines()
    assert lines[0] == type(model).__name__
    assert lines[1].split() == ["tower", "module", "class", "attentions", "width", "parameters"]
    for tower, line in zip(found.towers, lines[3:], strict=False):
        name, path, class_name = line.split()[:3]
        assert name == tower.name
        assert tower.path.endswith(path.removeprefix("…"))  # what is too long for a screen loses its beginning
        assert tower.class_name.endswith(class_name.removeprefix("…"))
        assert line.endswith(f"{tower.parameters:,}")
    assert max(map(len, lines)) <= SCREEN
    assert not any(line != line.rstrip() for line in lines)


def test_fusion_layers():
    expected = {
        "blip_retrieval": r"text_encoder\.encoder\.layer\.[01]",
        "blip_vqa": r"text_(encoder\.encoder|decoder\.bert\.encoder)\.layer\.[01]",
        "blip_captioning": r"text_decoder\.bert\.encoder\.layer\.[01]",
        "blip_2": r"qformer\.encoder\.layer\.0",
        "bart": r"model\.decoder\.layers\.[01]",
        "bridgetower": r"bridgetower\.cross_modal_(text|image)_layers\.[01]",
        "florence2": r"model\.language_model\.decoder\.layers\.[01]",
    }
    for name, family in FAMILIES.items():
        layers = describe(family.build()).fusion_layers
        assert bool(layers) == (name in expected), name
        assert all(re.fullmatch(expected[name], layer) for layer in layers), layers


def test_media_tokens():
    assert describe(FAMILIES["llava"].build()).media_tokens == {"image_token_id": IMAGE}
    assert describe(FAMILIES["qwen2_5_vl"].build()).media_tokens == {
        "image_token_id": IMAGE,
        "video_token_id": IMAGE + 1,
    }
    assert describe(FAMILIES["clip"].build()).media_tokens == {}
    assert "media tokens: image_token_id=60" in str(describe(FAMILIES["llava"].build()))


# --------------------------------------------------------------------------------------------------- fused projections


class Attention(nn.Module):
    def __init__(self, name: str, projection: nn.Module, **sizes: int) -> None:
        super().__init__()
        self.add_module(name, projection)
        self.__dict__.update(sizes)


def parts(attention: nn.Module) -> list[tuple[str, tuple[int, int], int]]:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"attn": attention})])})
    return [(m.letter, m.rows, m.d_in) for m in describe(model).matrices if m.letter in "qkv"]


@pytest.mark.parametrize("name", ["qkv", "qkv_proj", "in_proj", "Wqkv", "c_attn"])
def test_fused_projections_are_three_matrices(name: str):
    assert parts(Attention(name, nn.Linear(8, 24))) == [("q", (0, 8), 8), ("k", (8, 16), 8), ("v", (16, 24), 8)]


def test_fused_projection_of_a_transposed_module():
    assert parts(Attention("c_attn", Conv1D(24, 8))) == [("q", (0, 8), 8), ("k", (8, 16), 8), ("v", (16, 24), 8)]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 8), (4, 1, 8), (6, 2, 4), (2, 2, 8)])
@pytest.mark.parametrize("where", ["module", "config"])
def test_grouped_query_heads_have_smaller_keys_and_values(heads: int, kv_heads: int, head_dim: int, where: str):
    projection = nn.Linear(32, (heads + 2 * kv_heads) * head_dim)
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    given = sizes if where == "module" else {"config": hf.PreTrainedConfig(**sizes)}
    q, k = heads * head_dim, kv_heads * head_dim
    assert parts(Attention("qkv_proj", projection, **given)) == [
        ("q", (0, q), 32),
        ("k", (q, q + k), 32),
        ("v", (q + k, q + 2 * k), 32),
    ]


def test_fused_rows_of_a_real_grouped_query_model():
    """Phi-3's `qkv_proj`: outputs of the rows that were found are what its attention takes for q, k and v."""
    config = hf.Phi3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    found = describe(hf.Phi3ForCausalLM(config)).matrices
    rows = {m.letter: m.rows for m in found if m.letter in "qkv"}
    assert rows == {"q": (0, 32), "k": (32, 48), "v": (48, 64)}


def test_gpt2_cross_attention_keys_and_values_are_fused():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, add_cross_attention=True))
    found = {(m.module.rpartition("h.0.")[2], m.letter, m.rows) for m in describe(model).matrices if m.letter in "qkv"}
    assert found == {
        *(("attn.c_attn", letter, (16 * i, 16 * i + 16)) for i, letter in enumerate("qkv")),
        ("crossattention.q_attn", "q", (0, 16)),
        ("crossattention.c_attn", "k", (0, 16)),
        ("crossattention.c_attn", "v", (16, 32)),
    }


def test_a_model_without_attention_is_described_too():
    found = describe(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)))
    assert [(m.module, m.d_in, m.d_out, m.tower) for m in found.matrices] == [
        ("0", 4, 5, "other"),
        ("2", 5, 2, "other"),
    ]
    assert found.tower_names() == []
    assert "Sequential" in str(found)


def test_a_text_model_is_a_decoder():
    model = FAMILIES["llava"].build().model.language_model
    assert describe(model).tower_names() == ["decoder"]
    assert torch.is_tensor(next(model.parameters()))


def test_widths_are_measured_not_read_from_the_config():
    """`vision_config.hidden_size` of Qwen2-VL is the width after the merger."""
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "patch_size": 4}
    text = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    text |= {
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
    }
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=vision))
    widths = {t.name: t.hidden_size for t in describe(model).towers}
    assert widths == {"vision": 32, "decoder": 48}


def test_table_aligns_its_columns():
    text = anatomy.table(("a", "long name"), [("value", 1), ("x", 22)])
    assert text.splitlines() == ["a      long name", "-----  ---------", "value  1", "x      22"]
