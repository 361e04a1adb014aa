"""FFNs and the ends of sub-layers are found in every family by shape, without a table of names."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from families import FAMILIES, VOCAB, text_tower, tiny
from torch import nn

from peft_multimodal.core.sites import decoder, ends, ffns, layers, towers

HALVES = {f"{half}_{part}": size for half in ("encoder", "decoder") for part, size in
          (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
LM = text_tower(32)
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: family.build for name, family in FAMILIES.items()},
    "t5": tiny(hf.T5ForConditionalGeneration, hf.T5Config(vocab_size=VOCAB, d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8)),
    "bart": tiny(hf.BartForConditionalGeneration, hf.BartConfig(vocab_size=VOCAB, d_model=32, **HALVES)),
    "mixtral": tiny(hf.MixtralForCausalLM, hf.MixtralConfig(**LM, num_key_value_heads=2, num_local_experts=4)),
    "phi3": tiny(hf.Phi3ForCausalLM, hf.Phi3Config(**LM)),
    "gpt2": tiny(hf.GPT2LMHeadModel, hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4)),
}  # fmt: skip
# What the library calls the last map of an FFN, and that of an attention.
LAST = re.compile(r"(mlp|DenseReluDense|ffn)\.(fc2|c_proj|down_proj|wo)$|output(_query)?\.dense$|layers\.\d+\.fc2$")
END = re.compile(r"(out_proj|o_proj|projection|proj|c_proj|\.o)$|(attention|crossattention)\.output\.dense$")
FFNS = {
    **{"clip": 4, "siglip": 4, "chinese_clip": 4, "altclip": 4, "vision_text_dual_encoder": 4, "blip_retrieval": 4},
    **{"flava": 6, "vilt": 2, "bridgetower": 8, "blip_vqa": 6, "blip_captioning": 4, "blip_2": 6, "llava": 5},
    **{"qwen2_5_vl": 4, "paligemma": 4, "idefics3": 4, "mllama": 5, "florence2": 8, "t5": 4, "bart": 4, "mixtral": 0},
    **{"phi3": 2, "gpt2": 2, "llama": 2},
}
each_model = pytest.mark.parametrize("name", MODELS)


@each_model
def test_every_ffn_is_found_once(name: str):
    model = MODELS[name]()
    found = ffns(model)
    assert len(found) == FFNS[name]
    assert len({f.role for f in found}) == len({f.module for f in found}) == len(found)
    gated = {"llama": 2, "llava": 2, "qwen2_5_vl": 4, "paligemma": 2, "idefics3": 2, "mllama": 2}
    assert sum(len(f.first) == 2 for f in found) == gated.get(name, 0)
    for ffn in found:
        assert LAST.search(ffn.module)
        assert "attention.output" not in ffn.module
        weight = model.get_submodule(ffn.module).weight
        assert sorted(weight.shape) == sorted((ffn.hidden, ffn.d_out))
        assert all(sorted(model.get_submodule(f).weight.shape)[0] == ffn.d_in for f in ffn.first)


@each_model
def test_every_end_of_a_sub_layer_is_found_once(name: str):
    model = MODELS[name]()
    found = ends(model)
    assert len({e.role for e in found}) == len({e.module for e in found}) == len(found)
    assert {e.module for e in found if e.kind == "ffn"} == {f.module for f in ffns(model)}
    for end in found:
        assert end.kind == "ffn" or END.search(end.module)
        assert (end.kind == "cross") == bool(re.search("crossatt|cross_attn|encoder_attn|EncDec", end.module))
    queries = [p for p, _ in model.named_modules() if re.search(r"(^|\.)(q_proj|query|q|qkv|c_attn|qkv_proj)$", p)]
    assert sum(e.kind != "ffn" for e in found) == len(queries)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_what_ends_a_sub_layer_is_what_the_stream_gets(name: str):
    """With every end giving 0, no layer changes the stream: the output no longer depends on what the FFNs hold."""
    family = FAMILIES[name]
    model = family.build()
    places = ends(model)

    def silence(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(output)

    for place in places:
        model.get_submodule(place.module).register_forward_hook(silence)
    before = family.output(model(**family.inputs(model)))
    for ffn in ffns(model):
        for path in ffn.first:
            model.get_submodule(path).weight.add_(1.0)
    assert torch.equal(family.output(model(**family.inputs(model))), before)


DECODERS = {
    "llama": ("model", "model.layers", "model.embed_tokens", True),
    "llava": ("model.language_model", "model.language_model.layers", "model.language_model.embed_tokens", True),
    "gpt2": ("transformer", "transformer.h", "transformer.wte", True),
    "mixtral": ("model", "model.layers", "model.embed_tokens", True),
    "t5": ("decoder", "decoder.block", "decoder.embed_tokens", False),
    "bart": ("model.decoder", "model.decoder.layers", "model.decoder.embed_tokens", False),
    **dict.fromkeys(("clip", "flava", "vilt", "vision_text_dual_encoder"), None),
}


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_found_inside_and_behind_others(name: str):
    model, expected = MODELS[name](), DECODERS[name]
    stack = decoder(model)
    if expected is None:
        assert stack is None
        return
    assert stack is not None
    layers = [f"{expected[1]}.{i}" for i in range(len(model.get_submodule(expected[1])))]
    assert (stack.stack, list(stack.layers), stack.embedding, stack.is_alone) == (expected[0], layers, *expected[2:])
    assert stack.width == model.get_submodule(stack.embedding).embedding_dim == 32


def test_layers_and_towers_know_their_widths():
    model = FAMILIES["clip"].build()
    assert [(s.module, s.role, s.d_in) for s in layers(model)][1:3] == [
        ("text_model.encoder.layers.1", "text.layer.1", 32),
        ("vision_model.encoder.layers.0", "vision.layer.0", 48),
    ]
    assert [(s.module, s.role, s.d_in, s.d_out) for s in towers(model)] == [
        ("vision_model", "vision.tower.0", 48, 48),
        ("text_model", "text.tower.0", 32, 32),
    ]
    last = layers(model, None, ("vision",), lambda layer: layer is model.vision_model.encoder.layers[1])
    assert [(s.module, s.role) for s in last] == [("vision_model.encoder.layers.1", "vision.layer.0")]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_layers_of_an_encoder_and_a_decoder(name: str):
    """T5's blocks number their sub-layers; adapters at a layer read what leaves its FFN."""
    model = FAMILIES[name].build()
    paths = {"t5": "{}.block.{}", "bart": "model.{}.layers.{}"}[name]
    halves = (("encoder", "text"), ("decoder", "decoder"))
    expected = [(paths.format(half, i), f"{tower}.layer.{i}") for half, tower in halves for i in (0, 1)]
    assert [(s.module, s.role) for s in layers(model)] == expected
    assert not decoder(model).is_alone
