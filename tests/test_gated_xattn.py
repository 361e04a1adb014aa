"""GatedXAttn against its equations, against transformers' own layers, and in every way that a model is called."""

from __future__ import annotations

import atexit
import copy
import functools
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from case import ANY_MARKER, ANY_WIDTH, Case
from families import BOS, VOCAB, Family, text_tower, tiny, vision_tower
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import adapter, distance, stir, trace
from peft import PeftConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

import peft_multimodal
from peft_multimodal import GatedXAttnConfig, InterleavedProcessor, MediaCache
from peft_multimodal.methods.gated_xattn import make_block
from peft_multimodal.methods.gated_xattn.layers import GatedBlock, MarkerEmbedding, SeeingLayer
from peft_multimodal.nn.media import (
    ManyImages,
    OneImage,
    Reading,
    Segments,
    _segments,
    allowed,
    sight_of,
    text_time,
)
from peft_multimodal.nn.media_reader import MediaReader
from peft_multimodal.nn.perceiver import LinearResampler, MeanResampler, PerceiverResampler

M = 59  # the marker
D, R, WIDTH = 20, 3, 32


def lm(cls, config_cls, **fields):
    return tiny(cls, config_cls(**{**text_tower(WIDTH, num_key_value_heads=2), **fields}))


LMS = {
    "llama": lm(hf.LlamaForCausalLM, hf.LlamaConfig),
    "qwen2": lm(hf.Qwen2ForCausalLM, hf.Qwen2Config, use_sliding_window=False),
    "qwen3": lm(hf.Qwen3ForCausalLM, hf.Qwen3Config, head_dim=8),
    "gemma": lm(hf.GemmaForCausalLM, hf.GemmaConfig, head_dim=8),
    "gemma3": lm(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, head_dim=8, sliding_window=4),
    "mistral": lm(hf.MistralForCausalLM, hf.MistralConfig, sliding_window=None),
    "smollm3": lm(hf.SmolLM3ForCausalLM, hf.SmolLM3Config),
    "opt": tiny(
        hf.OPTForCausalLM,
        hf.OPTConfig(**text_tower(WIDTH), ffn_dim=64, word_embed_proj_dim=24),
    ),
    "gpt2": tiny(
        hf.GPT2LMHeadModel,
        hf.GPT2Config(
            vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        ),
    ),
    # Queries, keys and values are fused head by head, or factorised.
    "gpt_neox": tiny(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**text_tower(WIDTH))),
    "bloom": tiny(hf.BloomForCausalLM, hf.BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=2, n_head=4)),
    "falcon": tiny(hf.FalconForCausalLM, hf.FalconConfig(**text_tower(WIDTH))),
    "persimmon": tiny(hf.PersimmonForCausalLM, hf.PersimmonConfig(**text_tower(WIDTH))),
    "deepseek_v3": tiny(
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config(
            **{**text_tower(WIDTH), "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2},
            **{"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4},
            **{"qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        ),
    ),
}
llama = LMS["llama"]


def config(**changes) -> GatedXAttnConfig:
    sizes = {"num_latents": R, "resampler_depth": 1, "resampler_heads": 2, "head_dim": 8, "max_frames": 2}
    sizes |= {"resampler": "perceiver", "ff_mult": 4}
    return GatedXAttnConfig(**{"media_token_id": M, "vision_hidden_size": D, **sizes, **changes})


def wrap(base: nn.Module | None = None, stirred: bool = True, **changes) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(llama() if base is None else base, config(**changes)).eval()
    return stir(model) if stirred else model


def batch(marker: int = M, **changes) -> dict[str, Tensor]:
    """Two rows of two images and one, and one without."""
    ids = torch.tensor([[1, 5, M, 6, 7, M, 8, 9], [1, M, 10, 5, 6, 7, 8, 9], [1, 11, 12, 13, 4, 5, 6, 7]])
    ids = ids.masked_fill(ids == M, marker)
    x = torch.randn(3, 2, 1, 4, D, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "vision_features": x, **changes}


def reader(model: PeftModel) -> MediaReader:
    return model.base_model.reader()


def blocks(model: PeftModel) -> list[GatedBlock]:
    return [m for m in model.modules() if isinstance(m, GatedBlock)]


@torch.no_grad()
def logits(model: nn.Module, **inputs) -> Tensor:
    return model(**inputs).logits


# ------------------------------------------------------------------------------------------------------ the equations


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    x = (x - x.mean()) / (x.var(unbiased=False) + norm.eps).sqrt()
    return x * norm.weight + norm.bias


def attention(query: Tensor, sources: list[Tensor], maps) -> Tensor:
    """One query that reads a list of vectors, head by head."""
    q, outputs = maps.q.weight @ query, []
    keys, values = (maps.kv.weight.chunk(2)[i] for i in (0, 1))
    for head in q.view(maps.heads, -1).split(1):
        h, size = len(outputs), head.shape[1]
        rows = slice(h * size, (h + 1) * size)
        scores = torch.stack([head[0] @ (keys[rows] @ s) / size**0.5 for s in sources])
        outputs.append(sum(w * (values[rows] @ s) for w, s in zip(scores.softmax(0), sources, strict=True)))
    return maps.out.weight @ torch.cat(outputs)


def ffw(x: Tensor, norm: nn.LayerNorm, maps: nn.Sequential) -> Tensor:
    h = maps[0].weight @ layer_norm(x, norm)
    return maps[2].weight @ (h * 0.5 * (1 + torch.erf(h / 2**0.5)))


def slow_resampler(m: PerceiverResampler, X: Tensor) -> Tensor:
    """(F, S, D) of one image -> (R, D)."""
    features = [x + m.frames[f] for f, frame in enumerate(X) for x in frame]
    Z = list(m.latents)
    for layer in m.layers:
        Xn = [layer_norm(x, layer.features_norm) for x in features]
        Zn = [layer_norm(z, layer.latents_norm) for z in Z]
        Z = [z + attention(zn, Xn + Zn, layer.attention) for z, zn in zip(Z, Zn, strict=True)]
        Z = [z + ffw(z, layer.ffw_norm, layer.ffw) for z in Z]
    return torch.stack([layer_norm(z, m.norm) for z in Z])


def slow_block(block: GatedBlock, y: Tensor, m: Tensor, marks: Tensor, attend: str) -> Tensor:
    """y (L, d) and the tokens m (T, R, D) of a row's images."""
    out, t = [], 0
    for token, mark in zip(y, marks, strict=True):
        t += int(mark)
        images = [m[t - 1]] if attend == "last" and t else list(m[:t])
        if images:
            gate = block.attention_gate_norm
            seen = attention(layer_norm(token, block.attention_norm), [r for p in images for r in p], block.attention)
            token = token + (1 if gate is None else gate.tanh()) * seen
        if block.ffw is not None:
            gate = block.ffw_gate_norm
            token = token + (1 if gate is None else gate.tanh()) * ffw(token, block.ffw_norm, block.ffw)
        out.append(token)
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2])
def test_resampler_follows_its_equations(frames: int):
    m = PerceiverResampler(12, 2, num_latents=3, depth=2, heads=2, head_dim=4)
    for p in m.parameters():
        p.add_(0.3 * torch.randn_like(p))
    X = torch.randn(2, frames, 4, 12)
    expected = torch.stack([slow_resampler(m, x) for x in X])
    torch.testing.assert_close(m(X), expected, atol=1e-5, rtol=1e-4)
    longer = torch.cat([X, 100 * torch.randn(2, 1, 4, 12)], dim=1)  # frames that are none
    mask = torch.arange(frames + 1).expand(2, -1) < frames
    if frames == 1:
        torch.testing.assert_close(m(longer, mask), expected, atol=1e-5, rtol=1e-4)
        assert distance(m(longer), expected) > 0.1


@torch.no_grad()
def test_frames_beyond_the_learned_ones_are_interpolated():
    m = PerceiverResampler(4, 3, num_latents=2, depth=1, heads=1, head_dim=4)
    mask = torch.tensor([[True, True, False, False, False], [True] * 5])
    two, five = m.frame_embedding(mask)
    assert torch.equal(two[:2], m.frames[:2])
    learned = m.frames.t()[None]
    torch.testing.assert_close(five.t()[None], F.interpolate(learned, size=5, mode="linear", align_corners=True))
    X = torch.randn(2, 5, 2, 4)
    assert distance(m(X), m(X.flip(1))) > 1e-4, "the order of frames matters"
    out = m(X, mask)  # however far a video is padded
    torch.testing.assert_close(out[:1], m(X[:1, :2]))
    torch.testing.assert_close(out[1:], m(X[1:]))


@torch.no_grad()
def test_resamplers_of_the_ablations():
    X, mask = torch.randn(2, 2, 4, 8), torch.tensor([[True, True], [True, False]])
    for cls, kept in ((LinearResampler, X), (MeanResampler, X.mean(2, keepdim=True))):
        m = cls(8, 2)
        kept = kept + m.frames[:, None]
        for n in (0, 1):
            mean = kept[n, : mask[n].sum()].mean(0)
            expected = torch.stack([m.map.weight @ layer_norm(x, m.norm) for x in mean])
            torch.testing.assert_close(m(X, mask)[n], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(m(X)[0], m(X, mask)[0])


@torch.no_grad()
@pytest.mark.parametrize("attend", ["last", "all_previous"])
@pytest.mark.parametrize(("gate", "ff_mult"), [("scalar", 4), ("vector", 2), ("none", 1), ("scalar", 0)])
def test_block_follows_its_equations(attend: str, gate: str, ff_mult: int):
    block = make_block(config(gate=gate, ff_mult=ff_mult, vision_hidden_size=D), 16)
    for p in block.parameters():
        p.add_(0.3 * torch.randn_like(p))
    marks = torch.tensor([[0, 1, 0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 1, 0, 0], [0] * 8])
    y, m = torch.randn(3, 8, 16), torch.randn(3, 3, R, D)
    cache = MediaCache()
    cache.append(m, marks.sum(1))
    sight = sight_of(text_time(marks), cache.numbers, attend)
    out = block(y, sight, sight.pick(*block.attention.keys_values(m)))
    expected = torch.stack([slow_block(block, y[b], m[b], marks[b], attend) for b in range(3)])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ whose image is seen


def slow_attention(q: Tensor, k: Tensor, v: Tensor, times: Tensor, numbers: Tensor, attend: str) -> Tensor:
    out = torch.zeros_like(q)
    for b, t in ((b, t) for b in range(len(q)) for t in range(q.shape[1])):
        seen = [
            j
            for j, n in enumerate(numbers[b].tolist())
            if n and (n == times[b, t] if attend == "last" else n <= times[b, t])
        ]
        if seen:
            scores = torch.einsum("hd,shd->hs", q[b, t], k[b, seen].flatten(0, 1)) / q.shape[-1] ** 0.5
            out[b, t] = torch.einsum("hs,shd->hd", scores.softmax(1), v[b, seen].flatten(0, 1))
    return out


@st.composite
def conversations(draw):
    """Rows of markers, and the numbers of images as a cache holds them after one or two turns."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    marks = torch.tensor(
        draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows))
    )
    counts = marks.sum(1)
    first = torch.tensor([draw(st.integers(0, int(c))) for c in counts])
    cache = MediaCache()
    for part in (first, counts - first):
        spare = draw(st.integers(0, 1))
        if int(part.max()) + spare:
            cache.append(torch.zeros(rows, int(part.max()) + spare, 1, 1), part)
    return marks, cache


@settings(max_examples=60, deadline=None)
@given(conversations(), st.sampled_from(["last", "all_previous"]))
def test_each_way_of_reading_reads_the_same(conversation, attend: str):
    marks, cache = conversation
    times = text_time(marks)
    running = [[sum(row[: i + 1]) for i in range(len(row))] for row in marks.long().tolist()]
    assert times.tolist() == running
    if cache.numbers is None:
        return
    for row, count in zip(cache.numbers, marks.sum(1), strict=True):
        assert sorted(n for n in row.tolist() if n) == list(range(1, int(count) + 1))
    (b, length), t = times.shape, cache.numbers.shape[1]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(b, length, 2, 4, generator=generator)
    k, v = (torch.randn(b, t, 3, 2, 4, generator=generator) for _ in "kv")
    expected = slow_attention(q, k, v, times, cache.numbers, attend)
    allow = allowed(times, cache.numbers, attend)
    ways = [sight_of(times, cache.numbers, attend), ManyImages(allow)]
    if attend == "last" and allow.any():
        ways.append(_segments(allow))
    for way in ways:
        out = torch.zeros_like(q) if way is None else way.attention(q, *way.pick(k, v))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
        assert not out[times == 0].any(), "exactly zero"


def test_the_cheapest_way_is_taken():
    even = torch.zeros(2, 64, dtype=torch.long)
    even[:, ::8] = 1
    uneven = torch.zeros(2, 64, dtype=torch.long)
    uneven[:, :8] = 1  # seven images of one token and one of 57
    numbers = torch.arange(1, 9).expand(2, -1)
    assert isinstance(sight_of(text_time(even), numbers, "last"), Segments)
    assert isinstance(sight_of(text_time(uneven), numbers, "last"), ManyImages)
    assert isinstance(sight_of(text_time(even), numbers, "all_previous"), ManyImages)
    assert isinstance(sight_of(torch.full((2, 1), 5), numbers, "last"), OneImage)
    assert isinstance(sight_of(text_time(even)[:, :8], numbers[:, :1], "last"), OneImage)
    assert sight_of(torch.zeros(2, 4), numbers, "last") is None


def test_text_reads_the_last_image_before_it():
    model, inputs = wrap(), batch()
    before = logits(model, **inputs)
    other = inputs["vision_features"].clone()
    other[0, 1] = torch.randn(1, 4, D)  # the second image of the first row
    other[1, 1] = torch.randn(1, 4, D)  # padding
    changed = (logits(model, **{**inputs, "vision_features": other}) - before).abs().amax(-1) > 1e-4
    assert changed.tolist() == [[False] * 5 + [True] * 3, [False] * 8, [False] * 8]

    # Inside a block, what stands behind the second marker doesn't read the first image.
    block, y, latents = blocks(model)[0], torch.randn(1, 8, WIDTH), torch.randn(1, 2, R, D)
    sight = sight_of(text_time(inputs["input_ids"][:1] == M), torch.tensor([[1, 2]]), "last")
    outs = []
    for shift in (0.0, 1.0):
        latents[:, 0] += shift * torch.randn(R, D)
        outs.append(block(y, sight, sight.pick(*block.attention.keys_values(latents))))
    changed = (outs[0] - outs[1]).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [False, False, True, True, True, False, False, False]


# --------------------------------------------------------------------------------------------- transformers' own layers


def like(layer, heads: int, head_dim: int, width: int, source: int, gates: tuple[str, str]) -> GatedBlock:
    """Our block with the weights of a layer, and its norms and its MLP."""
    block = make_block(config(resampler_heads=heads, head_dim=head_dim, vision_hidden_size=source), width)
    maps = layer.cross_attn
    block.attention.q.weight.data = maps.q_proj.weight.data
    block.attention.kv.weight.data = torch.cat([maps.k_proj.weight.data, maps.v_proj.weight.data])
    block.attention.out.weight.data = maps.o_proj.weight.data
    block.attention_norm, block.ffw_norm, block.ffw = layer.input_layernorm, layer.post_attention_layernorm, layer.mlp
    for name, theirs in zip(("attention_gate_norm", "ffw_gate_norm"), gates, strict=True):
        gate = getattr(layer, theirs)
        gate.data.normal_()
        setattr(block, name, nn.Parameter(gate.data.flatten()))
    return block


def images_and_text():
    marks = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0]])
    y, m = torch.randn(2, 6, 24), torch.randn(2, 2, R, 16)
    numbers = torch.tensor([[1, 2], [1, 0]])
    allow = allowed(text_time(marks), numbers, "last")
    scores = torch.where(allow, 0.0, torch.finfo(torch.float32).min).repeat_interleave(R, dim=-1)[:, None]
    return y, m, sight_of(text_time(marks), numbers, "last"), allow.any(-1), scores


@torch.no_grad()
@pytest.mark.parametrize("alpha", ["float", "vector"])
def test_mask_attention_and_gates_are_those_of_idefics(alpha: str):
    settings = hf.IdeficsConfig(
        hidden_size=24, intermediate_size=32, num_attention_heads=2, alpha_type=alpha, vision_config={"embed_dim": 16}
    )
    settings._attn_implementation = "eager"
    layer = IdeficsGatedCrossAttentionLayer(settings, layer_idx=0).eval()
    block = like(layer, 2, 12, 24, 16, ("alpha_cross_attn", "alpha_dense"))
    y, m, sight, seen, mask = images_and_text()
    theirs = layer(y, image_hidden_states=m.flatten(1, 2), image_attention_mask=mask, cross_attention_gate=seen.float())
    ours = block(y, sight, sight.pick(*block.attention.keys_values(m)))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert distance(ours, y) > 0.1


@torch.no_grad()
def test_mask_attention_and_gates_are_those_of_mllama():
    settings = hf.models.mllama.configuration_mllama.MllamaTextConfig(
        hidden_size=24, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, dropout=0.0, pad_token_id=0
    )
    settings._attn_implementation = "eager"
    layer = MllamaCrossAttentionDecoderLayer(settings, layer_idx=0).eval()
    block = like(layer, 2, 12, 24, 24, ("cross_attn_attn_gate", "cross_attn_mlp_gate"))
    y, m, sight, seen, mask = images_and_text()
    m = torch.randn(2, 2, R, 24)
    maps, own = layer.cross_attn, block.attention
    queries, keys_values = own.queries, own.keys_values
    own.queries = lambda x: maps.q_norm(queries(x))  # Mllama norms queries and keys as well
    own.keys_values = lambda x: (maps.k_norm(keys_values(x)[0]), keys_values(x)[1])
    theirs = layer(
        y,
        cross_attention_states=m.flatten(1, 2),
        cross_attention_mask=mask,
        attention_mask=None,
        full_text_row_masked_out_mask=None,
    )
    ours = block(y, sight, sight.pick(*own.keys_values(m)))
    torch.testing.assert_close(ours[seen], theirs[seen], atol=1e-5, rtol=1e-4)
    assert distance(ours[~seen], theirs[~seen]) > 1e-3, "Mllama leaves it to its caller to mask what sees nothing"


# -------------------------------------------------------------------------------------------------- models and their parts


@pytest.mark.parametrize("name", LMS)
def test_every_decoder(name: str, tmp_path: Path):
    """Starts as the language model, trains, saves, loads, and is taken out."""
    base, inputs = LMS[name]().requires_grad_(False), batch()
    text = {k: v for k, v in inputs.items() if k != "vision_features"}
    expected, before = logits(base, **text), trace(base)
    torch.manual_seed(0)
    model = get_peft_model(base, config())
    assert torch.equal(logits(model, **inputs), expected)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapter(model))

    start = {n: p.detach().clone() for n, p in adapter(model).items()}
    optimizer = torch.optim.AdamW(adapter(model).values(), lr=0.01, weight_decay=0.0)
    losses = []
    for _ in range(3):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, start[n]) for n, p in adapter(model).items())

    stir(model)
    adapted = logits(model, **inputs)
    assert distance(adapted, expected) > 1e-2
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LMS[name](), tmp_path)
    assert distance(logits(loaded, **inputs), adapted) <= 1e-6
    with model.disable_adapter():
        assert torch.equal(logits(model, **text), expected)
    base = model.unload()
    assert torch.equal(logits(base, **text), expected)
    assert trace(base) == before


@pytest.mark.parametrize("name", LMS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name: str, side: str):
    model, inputs = wrap(LMS[name]()), batch()
    expected = logits(model, **inputs)
    pad = (2, 0) if side == "left" else (0, 2)
    padded = {k: F.pad(inputs[k], pad) for k in ("input_ids", "attention_mask")}
    padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
    if name == "opt":
        del padded["position_ids"]  # it counts them itself
    output = logits(model, **{**inputs, **padded})
    own = padded["attention_mask"].bool()
    torch.testing.assert_close(output[own].view_as(expected), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_block_stands_before_every_nth_layer(n: int):
    base = lm(hf.LlamaForCausalLM, hf.LlamaConfig, num_hidden_layers=5)()
    model = wrap(base, every_n_layers=n)
    layers = model.get_base_model().model.layers
    wrapped = [i for i, layer in enumerate(layers) if isinstance(layer, SeeingLayer)]
    assert wrapped == [i for i in range(5) if (i + 1) % n == 0]
    assert len(layers) == 5
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(5)), "what is asked of a layer reaches it"
    table = peft_multimodal.matched_modules(base, config(every_n_layers=n))
    assert [m.module for m in table][1:] == [f"model.layers.{i}" for i in wrapped]
    assert len(model(**batch(), output_hidden_states=True).hidden_states) == 6


@pytest.mark.parametrize("gate_init", [0.0, 1.0])
@pytest.mark.parametrize("ff_mult", [0, 4])
def test_the_start_is_the_language_model_and_open_gates_learn_at_once(gate_init: float, ff_mult: int):
    model, inputs = wrap(stirred=False, gate_init=gate_init, ff_mult=ff_mult), batch()
    torch.testing.assert_close(
        logits(model, **inputs), logits(llama(), **{k: v for k, v in inputs.items() if k != "vision_features"}),
        atol=1e-6, rtol=0,
    )  # fmt: skip
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for block in blocks(model):
        lasts = [block.attention.out.weight, *([block.ffw[-1].weight] if ff_mult else [])]
        assert [bool(last.grad.any()) for last in lasts] == [gate_init != 0] * len(lasts)
        assert bool(block.attention_gate_norm.grad.any()) == (gate_init == 0)


def test_shared_block_is_stored_and_counted_once(tmp_path: Path):
    model = wrap(share_blocks=True)
    assert len(blocks(model)) == 1
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == model.get_nb_trainable_parameters()[0]
    assert distance(logits(PeftModel.from_pretrained(llama(), tmp_path), **batch()), logits(model, **batch())) <= 1e-6
    model(**batch()).logits.sum().backward()
    assert blocks(model)[0].attention.q.weight.grad.any()


BLOCK = ("attention.q", "attention.kv", "attention.out", "ffw.0", "ffw.2")
NORMS = ("attention_norm.weight", "attention_norm.bias", "ffw_norm.weight", "ffw_norm.bias")
PERCEIVER = (
    *(f"attention.{m}.weight" for m in ("q", "kv", "out")),
    *(f"{norm}_norm.{kind}" for norm in ("features", "latents", "ffw") for kind in ("weight", "bias")),
    *("ffw.0.weight", "ffw.2.weight"),
)


def test_exact_keys_of_the_file(tmp_path: Path):
    wrap().save_pretrained(tmp_path)
    keys = ["decoder.marker.0.gated_xattn_marker_norm"]
    for i in (0, 1):
        block = f"decoder.layer.{i}.gated_xattn_block"
        keys += [f"{block}.{m}.weight" for m in BLOCK] + [f"{block}.{n}" for n in NORMS]
        keys += [f"{block}.{gate}_gate_norm" for gate in ("attention", "ffw")]
    keys += [f"gated_xattn_resampler.{n}" for n in ("frames", "latents", "norm.weight", "norm.bias")]
    keys += [f"gated_xattn_resampler.layers.0.{n}" for n in PERCEIVER]
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {f"base_model.model.{key}" for key in keys}


def test_two_adapters_have_their_own_markers_and_layers():
    model = wrap(every_n_layers=2)
    first = logits(model, **batch())
    model.add_adapter("other", config(media_token_id=VOCAB + 3, num_latents=2, attend="all_previous", gate="vector"))
    stir(model, "other", seed=1)
    assert torch.equal(logits(model, **batch()), first)
    model.set_adapter("other")
    second = logits(model, **batch(VOCAB + 3))
    assert distance(second, first) > 1e-2
    model.delete_adapter("default")
    assert torch.equal(logits(model, **batch(VOCAB + 3)), second)
    assert not any("default" in key for key in model.state_dict())


def test_a_text_model_inside_a_vision_language_model():
    from families import FAMILIES

    model = wrap(FAMILIES["llava"].build().model.language_model)
    with torch.no_grad():
        out = model(**batch()).last_hidden_state
        text = model(input_ids=torch.where(batch()["input_ids"] == M, 5, batch()["input_ids"])).last_hidden_state
    assert distance(out[0, 5:], text[0, 5:]) > 1e-2
    with pytest.raises(ValueError, match="reads pixel_values itself"):
        wrap(FAMILIES["llava"].build(), vision_encoder="nowhere", vision_hidden_size=None)


# --------------------------------------------------------------------------------------------------------- the marker


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("marker", [M, VOCAB, VOCAB + 1000])
def test_only_the_markers_row_trains(name: str, marker: int, tmp_path: Path):
    model = wrap(LMS[name](), stirred=False, media_token_id=marker)
    embedding = model.get_base_model().get_input_embeddings()
    assert isinstance(embedding, MarkerEmbedding)
    row = embedding.gated_xattn_marker_norm["default"]
    if marker < VOCAB:
        assert torch.equal(row, embedding.base_layer(torch.tensor(marker)))
    else:
        assert distance(row, embedding.base_layer(torch.arange(VOCAB)).mean(0)) < 1e-6
    inputs = batch(marker)
    loss = model(**inputs, labels=inputs["input_ids"]).loss  # markers are no targets: one lies beyond the vocabulary
    loss.backward()
    assert row.grad.any()
    assert embedding.base_layer.weight.grad is None
    with torch.no_grad():
        row += 1
    ids = inputs["input_ids"]
    assert torch.equal(embedding(ids)[ids == marker], row.expand(3, -1))
    assert torch.equal(embedding(ids)[ids != marker], embedding.base_layer(ids[ids != marker]))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not any(VOCAB in t.shape for t in saved.values()), "no whole embedding"
    loaded = PeftModel.from_pretrained(LMS[name](), tmp_path)
    assert distance(logits(loaded, **inputs), logits(model, **inputs)) <= 1e-6


def test_saving_asks_no_hub(tmp_path: Path, monkeypatch):
    base = llama()
    base.config._name_or_path = base.name_or_path = "someone/some-model"
    model = wrap(base)

    def ask(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", ask)
    peft_multimodal.save(model, tmp_path / "adapter")
    assert "base_model.model.decoder.marker.0.gated_xattn_marker_norm" in load_file(
        tmp_path / "adapter" / "adapter_model.safetensors"
    )


@pytest.mark.parametrize("whole", [None, ["lm_head"]], ids=["alone", "beside the head"])
def test_the_stock_trainer_saves_no_resized_base(whole: list[str] | None, tmp_path: Path):
    llama().save_pretrained(tmp_path / "base")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(VOCAB + 8)
    model = wrap(base, modules_to_save=whole)
    arguments = hf.TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none")
    hf.Trainer(model, arguments).save_model(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    own = set(type(model.base_model).checkpoint_keys(model, "default"))
    assert set(saved) == own | {f"base_model.model.{name}.weight" for name in whole or ()}


def test_markers_are_no_targets():
    model, inputs = wrap(media_token_id=VOCAB + 3), batch(VOCAB + 3)
    labels = inputs["input_ids"]
    expected = model(**inputs, labels=labels).loss
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(**inputs, labels=labels, shift_labels=shifted).loss, expected)


# ---------------------------------------------------------------------------------------------------------- generation

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 2},
}


def generate(model: nn.Module, inputs: dict, **options) -> list[list[int]]:
    torch.manual_seed(0)
    return model.generate(**inputs, **{**GREEDY, "pad_token_id": 0, **options})[
        :, inputs["input_ids"].shape[1] :
    ].tolist()


def written(model: nn.Module, inputs: dict, **options) -> tuple[list[list[int]], Tensor]:
    """What is generated, and the logits of each token (B, 6, V)."""
    options = {**GREEDY, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True, **options}
    out = model.generate(**inputs, **options)
    return out.sequences[:, inputs["input_ids"].shape[1] :].tolist(), torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("name", LMS)
def test_cached_is_uncached(name: str):
    model, inputs = wrap(LMS[name]()), batch()
    (cached, scores), (uncached, expected) = written(model, inputs), written(model, inputs, use_cache=False)
    assert cached == uncached
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    # Token by token, as one forward pass of the whole text gives them.
    ids = torch.cat([inputs["input_ids"], torch.tensor(cached)], dim=1)
    whole = logits(model, input_ids=ids, vision_features=inputs["vision_features"])[:, 7:-1]
    torch.testing.assert_close(scores, whole, atol=1e-4, rtol=1e-4)
    tokens, other = written(model, {**inputs, "vision_features": -inputs["vision_features"]})
    assert (other - scores)[:, 0].abs().amax(-1).gt(1e-3).tolist() == [True, True, False], "images matter"
    assert tokens[2] == cached[2]


@pytest.mark.parametrize("attend", ["last", "all_previous"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cache", ["dynamic", "static", "chunked"])
def test_ways_of_generating(way: str, attend: str, cache: str):
    model, inputs = wrap(attend=attend), batch()
    expected = generate(model, inputs, use_cache=False, **WAYS[way])
    options = {"dynamic": {}, "static": {"cache_implementation": "static"}, "chunked": {"prefill_chunk_size": 3}}
    if cache == "chunked":
        inputs = {**inputs, "past_key_values": hf.DynamicCache(config=model.config)}
    assert generate(model, inputs, **options[cache], **WAYS[way]) == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_generate_as_they_do_alone(side: str):
    model, inputs = wrap(), batch()
    rows = [[1, 5, M, 6, 7, M, 8, 9], [1, M, 10, 5, 6], [11, 12, 13]]
    pad = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer_object(), pad_token="[PAD]", padding_side=side).pad(
        {"input_ids": rows}, return_tensors="pt"
    )
    together = generate(model, {**inputs, **pad})
    for b, row in enumerate(rows):
        ids = torch.tensor([row])
        alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if M in row:
            alone["vision_features"] = inputs["vision_features"][b : b + 1]
        if side == "left" or b == 0:  # no model continues behind its padding
            assert together[b] == generate(model, alone)[0]
        whole = generate(model, {**alone, **{k: v[b : b + 1] for k, v in pad.items()}})
        assert together[b] == whole[0]


def test_images_are_read_once():
    model, inputs = wrap(), batch()
    calls: dict[str, int] = {"resampler": 0, "keys": 0, "queries": 0}

    def count(name):
        return lambda *_: calls.update({name: calls[name] + 1})

    reader(model).gated_xattn_resampler["default"].register_forward_hook(count("resampler"))
    for block in blocks(model):
        block.attention.kv.register_forward_hook(count("keys"))
        block.attention.q.register_forward_hook(count("queries"))
    for options in ({}, {"num_beams": 3}, {"use_cache": False}):
        calls.update(resampler=0, keys=0, queries=0)
        generate(model, inputs, **options)
        assert calls == {"resampler": 1, "keys": 2, "queries": 12}, options


def test_only_the_images_of_a_row_are_encoded():
    model, inputs = wrap(), batch()
    seen = []
    reader(model).gated_xattn_resampler["default"].register_forward_hook(lambda m, args, out: seen.append(len(out)))
    logits(model, **inputs)
    assert seen == [3], "of six places"


@pytest.mark.parametrize("marker", [M, VOCAB + 3])
def test_the_marker_is_never_written(marker: int):
    base = llama()
    with torch.no_grad():
        base.lm_head.weight[M] = 0
    model = wrap(base, media_token_id=marker)
    with torch.no_grad():  # whatever the state, the marker's logit is the greatest
        model.get_base_model().lm_head.register_forward_hook(
            lambda m, args, out: out.index_fill(-1, torch.tensor(M), 100.0)
        )
    tokens = {token for way in WAYS.values() for row in generate(model, batch(marker), **way) for token in row}
    assert (M in tokens) == (marker != M)
    text = {k: v for k, v in batch(marker).items() if k != "vision_features"}
    text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] == marker, 5)
    with model.disable_adapter():
        assert generate(model, text)[0] == [M] * 6


@pytest.mark.parametrize("way", ["greedy", "beams"])
@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"logits_processor": [lambda ids, s: s - 0 * s.gather(1, ids)[:, :1].clamp_min(0)]}],
    ids=["repetition", "n-grams", "own"],
)  # fmt: skip
def test_logits_processors_meet_a_marker_beyond_the_vocabulary(options: dict, way: str):
    """They look up the prompt's ids among the scores; the outcome is that of a marker within, which no row writes."""
    inside, beyond = wrap(), wrap(media_token_id=VOCAB + 3)
    own = adapter(inside)
    with torch.no_grad():
        for name, parameter in adapter(beyond).items():
            parameter.copy_(own[name])
    expected = generate(inside, batch(), **WAYS[way], **options)
    assert generate(beyond, batch(VOCAB + 3), **WAYS[way], **options) == expected


@pytest.mark.parametrize("negative", [None, [[1, 6, 7], [9, 4, 5], [8, 8, 6]]], ids=["last token", "own prompt"])
def test_guidance_reads_its_own_text_without_images(negative: list | None):
    model, inputs, scale = wrap(), batch(), 1.5
    prompt = None if negative is None else torch.tensor(negative)
    found = generate(model, inputs, guidance_scale=scale, negative_prompt_ids=prompt)
    ids, other = inputs["input_ids"], inputs["input_ids"][:, -1:] if prompt is None else prompt
    for _ in range(6):
        seen = logits(model, input_ids=ids, vision_features=inputs["vision_features"])[:, -1].log_softmax(-1)
        unseen = logits(model, input_ids=other)[:, -1].log_softmax(-1)
        scores = scale * (seen - unseen) + unseen
        scores[:, [2, M]] = -torch.inf  # the end and the marker
        token = scores.argmax(dim=-1, keepdim=True)
        ids, other = torch.cat([ids, token], dim=1), torch.cat([other, token], dim=1)
    assert ids[:, 8:].tolist() == found
    with pytest.raises(ValueError, match="negative_prompt_ids has markers"):
        model.generate(**inputs, guidance_scale=scale, negative_prompt_ids=inputs["input_ids"])


@pytest.mark.parametrize("marker", [M, VOCAB + 3])
def test_assisted_decoding_is_refused(marker: int):
    model, inputs = wrap(media_token_id=marker), batch(marker)
    inputs = {k: v[:1] for k, v in inputs.items()}
    for options in ({"assistant_model": llama()}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="assistant_model=, prompt_lookup_num_tokens="):
            model.generate(**inputs, **options)
    text = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == marker, 5)}
    del text["vision_features"]
    with model.disable_adapter():
        assert generate(model, text, prompt_lookup_num_tokens=2) == generate(model, text)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", ["generate", "forward"])
def test_a_call_that_failed_can_be_made_again(call: str, error: type[BaseException]):
    model, x = wrap(), torch.randn(1, 2, 1, 4, D)
    turn, more = torch.tensor([[1, 5, M, 6]]), torch.tensor([[M, 8, 9]])
    media, past = MediaCache(), hf.DynamicCache(config=model.config)

    def fail(*_):
        raise error("stop")

    def begin(**past):
        return logits(model, input_ids=turn, vision_features=x[:, :1], media=media, **past)

    def go_on():
        mask = torch.ones(1, 7, dtype=torch.long)
        inputs = {"input_ids": more, "attention_mask": mask, "past_key_values": copy.deepcopy(past), "media": media}
        inputs["vision_features"] = x[:, 1:]
        return written(model, inputs)[1][:, 0] if call == "generate" else logits(model, **inputs)[:, -1]

    def interrupted(function):
        hook = model.get_base_model().lm_head.register_forward_hook(fail)
        with pytest.raises(error, match="stop"):
            function()
        hook.remove()

    interrupted(begin)
    begin(past_key_values=past)
    interrupted(go_on)
    found = go_on()
    assert media.numbers.tolist() == [[1, 2]]
    whole = logits(model, input_ids=torch.cat([turn, more], dim=1), vision_features=x)[:, -1]
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)


def test_images_that_another_adapter_has_read_are_an_error():
    model, inputs, media = wrap(), batch(), MediaCache()
    model.add_adapter("other", config())
    logits(model, **inputs, media=media)
    text = {k: v for k, v in inputs.items() if k != "vision_features"}
    again = logits(model, **text, media=media)
    model.set_adapter("other")
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"media holds images as another adapter than 'other' has read them"):
            call(**text, media=media)
    with pytest.raises(ValueError, match="another adapter than 'default'"):
        wrap()(**text, media=media.repeat_interleave(1))
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, **text, media=media), again)


@pytest.mark.parametrize("cache", ["past_key_values", "cache"])  # "cache" since transformers 5.24
@pytest.mark.parametrize("whole", [True, False], ids=["whole text", "new text"])
def test_new_images_in_a_conversation(whole: bool, cache: str):
    """The second turn reads its own images and the first one's, which are not read again."""
    model, x = wrap(), torch.randn(2, 3, 1, 4, D)
    turn = torch.tensor([[1, 5, M, 6], [1, M, M, 7]])
    more = torch.tensor([[M, 8, M, 9], [4, 8, 10, 9]])
    second = torch.stack([x[0, 1:], x[1, :2]])  # of the second row nothing is new
    read = []
    reader(model).gated_xattn_resampler["default"].register_forward_hook(lambda m, args, out: read.append(len(out)))
    media = MediaCache()
    options = {**GREEDY, "pad_token_id": 0, "return_dict_in_generate": True, "media": media}
    mask = torch.ones_like(turn)
    out = model.generate(input_ids=turn, attention_mask=mask, vision_features=x[:, :2], **options)
    assert media.numbers.tolist() == [[1, 0], [1, 2]]
    text = torch.cat([out.sequences, more], dim=1)
    # Of what the first turn wrote, the last token isn't in the cache yet.
    given = text if whole else text[:, out.past_key_values.get_seq_length() :]
    again = model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(text),
        vision_features=second,
        **{cache: out.past_key_values},
        **options,
    ).sequences[:, -6:]
    assert read == [3, 2]
    assert media.numbers.tolist() == [[1, 0, 2, 3], [1, 2, 0, 0]]
    every = torch.stack([x[0], torch.stack([x[1, 0], x[1, 1], x[1, 2]])])
    fresh = {"input_ids": text, "attention_mask": torch.ones_like(text), "vision_features": every}
    assert again.tolist() == generate(model, fresh)


def test_forward_goes_on_with_a_cache():
    model, inputs = wrap(), batch()
    del inputs["attention_mask"]
    expected = logits(model, **inputs)
    media, past = MediaCache(), hf.DynamicCache(config=model.config)
    parts = []
    for piece, images in (
        ((0, 3), inputs["vision_features"][:, :1]),
        ((3, 5), None),
        ((5, 8), inputs["vision_features"][:, 1:]),
    ):
        ids = inputs["input_ids"][:, slice(*piece)]
        parts.append(logits(model, input_ids=ids, vision_features=images, media=media, past_key_values=past))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"past_key_values .*media=MediaCache\(\)"):
        model(input_ids=inputs["input_ids"][:, :1], past_key_values=past)


def test_answers_are_compared_behind_one_prompt():
    """Two answers to each of three prompts, whose images, keys and values are made once."""
    model, inputs = wrap(), batch()
    made = []
    for block in blocks(model):
        block.attention.kv.register_forward_hook(lambda *_: made.append(1))
    answers = torch.randint(4, 40, (6, 3))
    whole = {
        "input_ids": torch.cat([inputs["input_ids"].repeat_interleave(2, dim=0), answers], dim=1),
        "vision_features": inputs["vision_features"].repeat_interleave(2, dim=0),
    }
    expected = logits(model, **whole)[:, 8:]
    made.clear()
    media, past = MediaCache(), hf.DynamicCache(config=model.config)
    logits(model, **inputs, media=media, past_key_values=past)
    past.batch_repeat_interleave(2)
    mask = torch.ones(6, 11, dtype=torch.long)
    more = {"input_ids": answers, "attention_mask": mask, "past_key_values": past}
    found = logits(model, **more, media=media.repeat_interleave(2))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert len(made) == 2, "once a layer"
    assert MediaCache().repeat_interleave(2).latents is None


def test_two_threads_share_a_model():
    model, results = wrap(), {}
    inputs = [batch(vision_features=torch.randn(3, 2, 1, 4, D)) for _ in range(2)]
    expected = [written(model, i)[1] for i in inputs]
    assert distance(*expected) > 0.1

    def work(index: int) -> None:
        results[index] = [written(model, inputs[index])[1] for _ in range(4)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, scores in enumerate(expected):
        assert [distance(found, scores) <= 1e-5 for found in results[index]] == [True] * 4


def test_nothing_is_left_after_a_call():
    model, inputs = wrap(), batch()
    logits(model, **inputs)
    before = trace(model)
    generate(model, inputs, num_beams=2)
    logits(model, **inputs)
    with pytest.raises(RuntimeError, match="stop"):
        model.generate(**inputs, logits_processor=[lambda ids, scores: (_ for _ in ()).throw(RuntimeError("stop"))])
    with pytest.raises(ValueError, match="markers"):
        model(input_ids=inputs["input_ids"])
    assert trace(model) == before
    scope = reader(model).scope
    assert (scope.is_open, scope.seen, scope.values) == (False, None, {})
    held = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    assert held == []


def test_signatures_are_the_models_own():
    """But for the names of what the adapter reads, without which Trainer would take those columns out."""
    base = llama()
    before = inspect.signature(base.forward)
    model = wrap(base)
    named = inspect.signature(base.forward)
    added = ["pixel_values", "vision_features", "frame_mask", "media"]
    assert [n for n in named.parameters if n not in before.parameters] == added
    kept = [p for n, p in named.parameters.items() if n not in added]
    assert named.replace(parameters=kept) == before
    assert inspect.signature(copy.deepcopy(base).forward) == named
    text = {k: v for k, v in batch().items() if k != "vision_features"}
    text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] == M, 5)
    model.generate(text["input_ids"], max_new_tokens=2, pad_token_id=0)
    model.unload()
    assert not {"generate", "forward"} & set(vars(base))


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_task_types(task_type: str | None, tmp_path: Path):
    model, inputs = wrap(task_type=task_type), batch()
    assert type(model).__name__ == ("PeftModel" if task_type is None else "PeftModelForCausalLM")
    plain = wrap()
    assert distance(logits(model, **inputs), logits(plain, **inputs)) <= 1e-6
    assert generate(model, inputs, num_beams=2) == generate(plain, inputs, num_beams=2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert type(loaded) is type(model)
    assert generate(loaded, inputs) == generate(plain, inputs)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gemma3"])
@pytest.mark.parametrize("attend", ["last", "all_previous"])
def test_gradient_checkpointing(name: str, reentrant: bool, attend: str):
    model, inputs = wrap(LMS[name](), attend=attend).train(), batch()
    runs = []
    blocks(model)[0].register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {n: p.grad.clone() for n, p in adapter(model).items()}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    actual = gradients()
    assert len(runs) == 3, "the block is recomputed"
    for n, gradient in expected.items():
        torch.testing.assert_close(actual[n], gradient, atol=1e-5, rtol=1e-4, msg=n)


DDP = """
import copy, sys, torch
sys.path.insert(0, {tests!r})
import torch.distributed as dist
from test_gated_xattn import batch, wrap
dist.init_process_group("gloo")
rank = dist.get_rank()
for share, checkpointing in ((False, False), (True, False), (False, True)):
    case = f"share={{share}}, checkpointing={{checkpointing}}"
    model = wrap(share_blocks=share).train()
    if checkpointing:
        model.gradient_checkpointing_enable({{"use_reentrant": False}})
    text = {{"input_ids": torch.tensor([[1, 11, 12, 13, 4, 5, 6, 7]] * 3)}}
    calls = [{{**inputs, "labels": inputs["input_ids"]}} for inputs in (batch(), text)]
    own = []
    trained = {{n: p for n, p in model.named_parameters() if p.requires_grad}}
    for call in calls:
        model.zero_grad()
        model(**call).loss.backward()
        own.append({{n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}})
        model.zero_grad()
    assert not any(g.abs().sum() for n, g in own[1].items() if "resampler" in n or "attention." in n), case
    wrapper = torch.nn.parallel.DistributedDataParallel(model)
    for step in range(2):  # a second one sees what the first left unfinished
        model.zero_grad()
        wrapper(**calls[(rank + step) % 2]).loss.backward()
        for n, p in trained.items():
            torch.testing.assert_close(p.grad, (own[0][n] + own[1][n]) / 2, msg=f"{{case}}: {{n}}")
dist.destroy_process_group()
"""


def test_a_process_without_images_takes_part(tmp_path: Path):
    """With blocks of their own, with shared ones, and under gradient checkpointing."""
    tests = Path(__file__).parent
    (tmp_path / "run.py").write_text(DDP.format(tests=str(tests)))
    path = os.pathsep.join([str(tests.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, str(tmp_path / "run.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]


def test_text_alone_trains_nothing_of_what_sees():
    model = wrap().train()
    ids = torch.tensor([[1, 11, 12, 13, 4, 5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in adapter(model).items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum()) == ("ffw" in name and "resampler" not in name), name
    with torch.no_grad():
        next(iter(reader(model).gated_xattn_resampler["default"].parameters())).fill_(torch.nan)
    assert logits(model, input_ids=ids).isfinite().all(), "what isn't used isn't looked at"


def test_segments_train_as_the_mask_does():
    ids = torch.full((2, 24), 5)
    ids[:, ::4] = M
    inputs = {"input_ids": ids, "vision_features": torch.randn(2, 6, 1, 4, D)}
    model = wrap()
    assert isinstance(sight_of(text_time(ids == M), torch.arange(1, 7).expand(2, -1), "last"), Segments)
    found = []
    for forced in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if forced:
                patch.setattr("peft_multimodal.nn.media.sight_of", lambda t, n, a: ManyImages(allowed(t, n, a)))
            model.zero_grad()
            loss = model(**inputs, labels=ids).loss
            loss.backward()
            found.append({"loss": loss, **{n: p.grad.clone() for n, p in adapter(model).items()}})
    for n, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][n], atol=1e-5, rtol=1e-4, msg=n)


def test_bfloat16_and_autocast():
    inputs = batch()
    start, model = wrap(llama().bfloat16(), stirred=False), wrap(llama().bfloat16())
    expected = logits(llama().bfloat16(), input_ids=inputs["input_ids"])
    assert torch.equal(logits(start, **inputs), expected)
    assert {p.dtype for p in adapter(model).values()} == {torch.float32}
    lost = distance(expected, logits(llama(), input_ids=inputs["input_ids"]))
    assert distance(logits(model, **inputs), logits(wrap(), **inputs)) <= 4 * lost
    with torch.autocast("cpu", torch.bfloat16):
        model = wrap()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        assert generate(model, inputs) == generate(model, inputs, use_cache=False)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in adapter(model).values())


def test_low_cpu_mem_usage_and_copies(tmp_path: Path):
    model = wrap(media_token_id=VOCAB)
    expected = logits(model, **batch(VOCAB))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    assert distance(logits(loaded, **batch(VOCAB)), expected) <= 1e-6
    other = copy.deepcopy(model)
    stir(other, seed=5)
    assert distance(logits(other, **batch(VOCAB)), expected) > 1e-3
    assert torch.equal(logits(model, **batch(VOCAB)), expected)
    assert generate(other, batch(VOCAB)) != generate(model, batch(VOCAB))


# ----------------------------------------------------------------------------------------- vision encoders and images


def dinov2(folder: Path) -> Path:
    vision = hf.Dinov2Config(**vision_tower(D, num_attention_heads=4))
    tiny(hf.Dinov2Model, vision)().save_pretrained(folder)
    return folder


VISION = {
    "dinov2": (lambda: tiny(hf.Dinov2Model, hf.Dinov2Config(**vision_tower(D)))(), 5),
    "clip": (
        lambda: tiny(
            hf.CLIPModel,
            hf.CLIPConfig(
                text_config=hf.CLIPTextConfig(**text_tower(32)), vision_config=hf.CLIPVisionConfig(**vision_tower(D))
            ),
        )(),
        5,
    ),
    "siglip": (lambda: tiny(hf.SiglipVisionModel, hf.SiglipVisionConfig(**vision_tower(D)))(), 4),
    "resnet": (
        lambda: tiny(
            hf.ResNetModel, hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, D], depths=[1, 1], layer_type="basic")
        )(),
        4,
    ),
}


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("given", [True, False], ids=["module", "folder"])
def test_vision_encoders(name: str, given: bool, tmp_path: Path):
    build, places = VISION[name]
    encoder = build()
    changes = {"vision_hidden_size": None}
    if given:
        settings = config(**changes).with_vision_encoder(encoder)
    else:
        encoder.save_pretrained(tmp_path / "eyes")
        settings = config(**changes, vision_encoder=str(tmp_path / "eyes"))
    torch.manual_seed(0)
    model = stir(get_peft_model(llama(), settings).eval())
    assert model.peft_config["default"].vision_hidden_size == D
    assert not any(p.requires_grad for p in reader(model).encoders.parameters())
    model.train()
    assert not any(m.training for m in reader(model).encoders.modules())
    inputs = batch(vision_features=None, pixel_values=torch.randn(3, 2, 3, 16, 16))
    out = logits(model.eval(), **inputs)
    tower = getattr(encoder, "vision_model", encoder)
    with torch.no_grad():
        states = tower(pixel_values=inputs["pixel_values"].flatten(0, 1)).last_hidden_state
    if states.ndim == 4:
        states = states.flatten(2).transpose(1, 2)
    assert states.shape == (6, places, D)
    features = {**inputs, "pixel_values": None, "vision_features": states.view(3, 2, 1, places, D)}
    torch.testing.assert_close(logits(model, **features), out)
    assert generate(model, inputs) == generate(model, features)
    model.save_pretrained(tmp_path / "adapter")
    assert (
        tmp_path / "adapter" / "adapter_model.safetensors"
    ).stat().st_size < 4 * model.get_nb_trainable_parameters()[0] + 9000
    if not given:
        for options in ({}, {"low_cpu_mem_usage": True}):
            loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter", **options)
            assert distance(logits(loaded, **inputs), out) <= 1e-6


PATCHES = {**vision_tower(D), "image_size": 32}


def test_an_encoder_that_hides_patches_is_refused():
    encoder = tiny(hf.ViTMAEModel, hf.ViTMAEConfig(**PATCHES, mask_ratio=0.5))()
    base = llama()
    before = trace(base)
    with pytest.raises(ValueError, match=r"\(ViTMAEModel\) gives other features each time .*mask_ratio to 0"):
        get_peft_model(base, config(vision_hidden_size=None).with_vision_encoder(encoder))
    assert trace(base) == before
    encoder.config.mask_ratio = 0.0
    get_peft_model(base, config(vision_hidden_size=None).with_vision_encoder(encoder))


@pytest.mark.parametrize("alone", [True, False])
def test_an_encoder_of_padded_patches_is_refused(alone: bool):
    vision = {**vision_tower(D), "num_patches": 16}
    if alone:
        encoder = tiny(hf.Siglip2VisionModel, hf.Siglip2VisionConfig(**vision))()
    else:
        encoder = tiny(hf.Siglip2Model, hf.Siglip2Config(text_config=text_tower(32), vision_config=vision))()
    base = llama()
    before = trace(base)
    with pytest.raises(ValueError, match=r"\(Siglip2VisionModel\) needs pixel_attention_mask, spatial_shapes"):
        get_peft_model(base, config(vision_hidden_size=None).with_vision_encoder(encoder))
    assert trace(base) == before


def test_videos(tmp_path: Path):
    model = stir(get_peft_model(llama(), config(vision_encoder=str(dinov2(tmp_path)), vision_hidden_size=None)).eval())
    video = torch.randn(3, 2, 4, 3, 16, 16)  # more frames than are learned
    inputs = batch(vision_features=None, pixel_values=video)
    out = logits(model, **inputs)
    assert distance(logits(model, **{**inputs, "pixel_values": video.flip(2)}), out) > 1e-4, "time matters"
    image = logits(model, **{**inputs, "pixel_values": video[:, :, 0]})
    torch.testing.assert_close(image, logits(model, **{**inputs, "pixel_values": video[:, :, :1]}))
    mask = (torch.arange(4) < 3).expand(3, 2, -1)
    three = logits(model, **{**inputs, "pixel_values": video[:, :, :3]})
    torch.testing.assert_close(logits(model, **{**inputs, "frame_mask": mask}), three)
    assert distance(three, out) > 1e-3


def test_saving_warns_that_a_local_encoder_stays_behind(tmp_path: Path):
    eyes = dinov2(tmp_path / "eyes")
    model = get_peft_model(llama(), config(vision_encoder=str(eyes), vision_hidden_size=None))
    with pytest.warns(UserWarning, match="eyes.* holds no copy of it.* config.vision_encoder"):
        model.save_pretrained(tmp_path / "adapter")
    eyes.rename(tmp_path / "elsewhere")
    found = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    found.vision_encoder = str(tmp_path / "elsewhere")
    PeftModel.from_pretrained(llama(), tmp_path / "adapter", config=found)
    given = config(vision_hidden_size=None).with_vision_encoder(hf.AutoModel.from_pretrained(tmp_path / "elsewhere"))
    with pytest.warns(UserWarning, match="holds no copy of it"):
        get_peft_model(llama(), given).save_pretrained(tmp_path / "other")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*holds no copy of it")
        wrap().save_pretrained(tmp_path / "features")


def test_given_encoders_are_called_alike_in_every_process(tmp_path: Path):
    """Their names are keys of the model's state: what one process has written another must read."""
    eyes = dinov2(tmp_path / "eyes")
    one, other = (
        get_peft_model(llama(), config(vision_hidden_size=None).with_vision_encoder(hf.AutoModel.from_pretrained(eyes)))
        for _ in range(2)
    )
    other.load_state_dict(one.state_dict())


@pytest.mark.parametrize("older", [False, True])
def test_a_base_of_another_vocabulary_is_refused(older: bool, tmp_path: Path):
    model = wrap()
    peft_multimodal.save(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    assert written["base_signature"]["vocabulary"] == VOCAB
    base = llama()
    base.resize_token_embeddings(VOCAB + 8)
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(ValueError, match=rf"embedding of {VOCAB} tokens, this LlamaForCausalLM has {VOCAB + 8}"):
        PeftModel.from_pretrained(base, tmp_path)
    assert {name: type(module) for name, module in base.named_modules()} == before
    base.resize_token_embeddings(VOCAB)
    if older:
        del written["base_signature"]["vocabulary"]
        file.write_text(json.dumps(written))
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base, tmp_path).eval(), **batch()), logits(model, **batch())
    )


def test_another_vision_encoder_is_refused(tmp_path: Path):
    model = get_peft_model(llama(), config(vision_encoder=str(dinov2(tmp_path / "eyes")), vision_hidden_size=None))
    model.save_pretrained(tmp_path / "adapter")
    base = llama()
    tiny(hf.ViTModel, hf.ViTConfig(**vision_tower(D)))().save_pretrained(tmp_path / "eyes")
    for message in (
        "trained on another encoder.*vision_encoder_type 'vit' now, then it was 'dinov2'",
        "can't be found",
    ):
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, tmp_path / "adapter")
        (tmp_path / "eyes").rename(tmp_path / "moved") if (tmp_path / "eyes").exists() else None


# ------------------------------------------------------------------------------------------------------- the processor


def tokenizer_object() -> Tokenizer:
    words = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "[UNK]": 3, **{f"w{i}": i for i in range(4, VOCAB)}}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def processor(**changes) -> InterleavedProcessor:
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_object(),
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        padding_side="left",
    )
    images = hf.ViTImageProcessor(size={"height": 16, "width": 16})
    return InterleavedProcessor(tokenizer, images, **changes)


def image(red: int, mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (20, 24), (red, 10, 200 - red)).convert(mode)


def test_processor(tmp_path: Path):
    made = processor()
    assert made.media_token_id == VOCAB
    one, two = image(10), image(200)
    found = made(["<image>w4 w5 <image> w6", "w7"], images=[[one, two], []])
    assert found["input_ids"].tolist() == [[VOCAB, 4, 5, VOCAB, 6], [0, 0, 0, 0, 7]]
    assert found["attention_mask"].tolist() == [[1] * 5, [0, 0, 0, 0, 1]]
    assert found["pixel_values"].shape == (2, 2, 3, 16, 16)
    expected = made.image_processor([one, two], return_tensors="pt")["pixel_values"]
    assert torch.equal(found["pixel_values"][0], expected)
    assert not found["pixel_values"][1].any()
    assert set(made("w7")) == {"input_ids", "attention_mask"}
    assert made.batch_decode(found["input_ids"])[0] == "<image> w4 w5 <image> w6"
    made(["<image>"], images=[[image(3, "L")]])
    made.save_pretrained(tmp_path)
    again = InterleavedProcessor.from_pretrained(tmp_path)
    for key, value in again(["<image>w4 w5 <image> w6", "w7"], images=[[one, two], []]).items():
        assert torch.equal(value, found[key])
    assert again.media_token_id == VOCAB
    assert processor(media_token="w8").media_token_id == 8, "a token that is known keeps its id"


def test_processor_of_videos():
    found = processor()(["<image> w4 <image>", "<image>"], images=[[image(9), [image(20), image(30)]], [image(40)]])
    assert found["pixel_values"].shape == (2, 2, 2, 3, 16, 16)
    assert found["frame_mask"].tolist() == [[[True, False], [True, True]], [[True, False], [False, False]]]


@pytest.mark.parametrize(("side", "kept"), [("left", [1, 2]), ("right", [0])])
def test_images_are_cut_off_with_their_markers(side: str, kept: list[int]):
    made, images = processor(), [image(10), image(100), image(200)]
    made.tokenizer.truncation_side = side
    texts = ["<image> w4 w5 <image> w6 <image>", "w4 w5 w6"]
    found = made(texts, images=[images, []], truncation=True, max_length=3)
    expected = made.image_processor([images[i] for i in kept], return_tensors="pt")["pixel_values"]
    assert (found["input_ids"] == VOCAB).sum(dim=1).tolist() == [len(kept), 0]
    assert torch.equal(found["pixel_values"][0], expected)
    if side == "left":
        assert "pixel_values" not in made(["<image> w4"], images=[images[:1]], truncation=True, max_length=1)
    several = {"truncation": True, "max_length": 3, "return_overflowing_tokens": True}
    with pytest.raises(ValueError, match=r"made 2 rows of 1 texts"):
        made(texts[:1], images=[images], **several)


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [
        (["<image> w4"], [[]], "Row 0 has 1 markers '<image>' but 0 images"),
        (["w4"], [[image(1)]], "0 markers .* but 1 images"),
        (["w4", "w5"], [[]], "1 lists of images for 2 texts"),
        (["<image>"], [image(1)], "a list of images for each text"),
        (["<image>"], [["a.png"]], "Row 0: image 0 holds the path 'a.png', which can't be read"),
        (["<image>"], [[[]]], "no frames"),
        ([3], None, "strings, got int"),
    ],
)
def test_processor_refuses(texts, images, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        processor()(texts, images=images)


def test_processor_without_what_it_needs():
    bare = InterleavedProcessor(processor().tokenizer)
    with pytest.raises(ValueError, match="has no image_processor"):
        bare(["<image>"], images=[[image(1)]])
    bare.tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"no padding token: set tokenizer.pad_token"):
        bare(["w4"])
    with pytest.raises(ValueError, match=r"no column 'images' .*remove_unused_columns=False"):
        processor().collate([{"text": "w4"}])


def test_trainer(tmp_path: Path):
    made = processor()
    rows = [
        {
            "text": f"<image> w{4 + i % 2} <image> w{5 - i % 2} [EOS]",
            "images": [image(250 * (i % 2)), image(250 - 250 * (i % 2))],
        }
        for i in range(8)
    ] + [{"text": "w9 w10", "images": []}]
    found = made.collate(rows[-2:])
    assert found["labels"].tolist() == [[-100, 5, -100, 4, 2], [9, 10, -100, -100, -100]]
    settings = config(
        vision_encoder=str(dinov2(tmp_path / "eyes")), vision_hidden_size=None, media_token_id=made.media_token_id
    )
    torch.manual_seed(0)
    model = get_peft_model(llama(), settings)
    arguments = hf.TrainingArguments(
        **{
            "output_dir": str(tmp_path / "run"),
            "max_steps": 6,
            "learning_rate": 0.03,
            "use_cpu": True,
            "report_to": "none",
        },
        **{"remove_unused_columns": False, "per_device_train_batch_size": 3, "weight_decay": 0.1, "disable_tqdm": True},
        **{"eval_strategy": "steps", "eval_steps": 3, "save_steps": 6, "label_names": ["labels"]},
    )
    trainer = hf.Trainer(model, arguments, data_collator=made.collate, train_dataset=rows, eval_dataset=rows)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * start
    inputs = made([rows[0]["text"]], images=[rows[0]["images"]])
    checkpoint = PeftModel.from_pretrained(llama(), tmp_path / "run" / "checkpoint-6")
    assert distance(logits(checkpoint, **inputs), logits(trainer.model.eval(), **inputs)) <= 1e-6
    files = {f.name for f in (tmp_path / "run" / "checkpoint-6").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert "model.safetensors" not in files
    groups = trainer.optimizer.param_groups
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    for n, p in adapter(trainer.model).items():
        assert (id(p) in decayed) != ("norm" in n), n


# ------------------------------------------------------------------------------------------------------------ bad input

X = torch.randn(3, 2, 1, 4, D)
BAD_CALLS = {
    "no images": ({"vision_features": None}, r"Row 0 has 2 markers but 0 images"),
    "too few": ({"vision_features": X[:, :1]}, r"Row 0 has 2 markers but 1 images"),
    "other rows": ({"vision_features": X[:2]}, r"Images of 2 rows were given for 3 rows"),
    "four axes": ({"vision_features": X[:, :, 0]}, r"shape \(3, 2, 4, 20\), not \(B, T, F, S, 20\)"),
    "another width": ({"vision_features": X[..., :8]}, r"not \(B, T, F, S, 20\)"),
    "pixels": ({"vision_features": None, "pixel_values": torch.zeros(3, 2, 3, 16, 16)}, r"no vision_encoder: pass"),
    "both": ({"pixel_values": torch.zeros(3, 2, 3, 16, 16)}, r"both given"),
    "frame mask": (
        {"frame_mask": torch.ones(3, 2, 5)},
        r"frame_mask has shape \(3, 2, 5\), the frames have .*\(3, 2, 1\)",
    ),
    "media": ({"media": X}, r"media must be a MediaCache, got Tensor"),
    "no ids": ({"input_ids": None, "inputs_embeds": torch.zeros(3, 8, WIDTH)}, r"without input_ids"),
}


@pytest.mark.parametrize("bad", BAD_CALLS)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_bad_calls(bad: str, call: str):
    changes, message = BAD_CALLS[bad]
    model, inputs = wrap(), batch(vision_features=X)
    inputs = {k: v for k, v in {**inputs, **changes}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        model(**inputs) if call == "forward" else model.generate(**inputs, **GREEDY)


def test_images_of_a_disabled_adapter_are_an_error():
    model, inputs = wrap(), batch()
    with model.disable_adapter():
        for call in (model, model.generate, model.get_base_model()):
            with pytest.raises(ValueError, match=r"vision_features reached .* disabled"):
                call(**inputs)
    model.delete_adapter("default") if len(model.peft_config) > 1 else None
    model.add_adapter("other", config(num_latents=2))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"one GatedXAttn adapter can be active"):
        model(**inputs)


def test_a_model_that_puts_something_beside_the_text_is_an_error():
    media = MediaCache()
    media.append(torch.zeros(1, 1, R, D), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"reads 6 positions where input_ids has 4"):
        Reading(media, torch.ones(1, 4, dtype=torch.long), "last").sight(torch.zeros(1, 6, WIDTH))


def test_a_part_of_the_model_alone_is_an_error():
    model, inputs = wrap(), batch()
    with pytest.raises(RuntimeError, match="Call the model that the adapter was made for"):
        model.get_base_model().model(input_ids=inputs["input_ids"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_hidden_size": None}, r"needs vision_encoder=.* or the width vision_hidden_size="),
        ({"every_n_layers": 3}, r"every_n_layers=3, but the decoder of LlamaForCausalLM has 2 layers"),
        ({"vision_encoder": "/no/such/folder"}, r"vision encoder '/no/such/folder' can't be found"),
    ],
)
def test_what_cannot_be_done_leaves_the_model_as_it_was(changes: dict, message: str):
    base = llama()
    before = trace(base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config(**changes))
    assert trace(base) == before


def test_a_width_that_is_not_the_encoders_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"vision_hidden_size=24, but .* width 20"):
        get_peft_model(llama(), config(vision_encoder=str(dinov2(tmp_path)), vision_hidden_size=24))


@pytest.mark.parametrize("name", ["clip", "blip_vqa", "florence2", "vilt"])
def test_models_without_a_decoder_of_their_own_are_refused(name: str):
    from families import FAMILIES

    base = FAMILIES[name].build()
    before = trace(base)
    with pytest.raises(ValueError, match=r"Use a decoder-only language model"):
        get_peft_model(base, config())
    assert trace(base) == before


@pytest.mark.parametrize("name", ["mamba", "rwkv"])
def test_models_without_attention_are_refused(name: str):
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2}
    base = {
        "mamba": lambda: tiny(hf.MambaForCausalLM, hf.MambaConfig(**sizes, state_size=4))(),
        "rwkv": lambda: tiny(hf.RwkvForCausalLM, hf.RwkvConfig(**sizes, attention_hidden_size=WIDTH))(),
    }[name]()
    before = trace(base)
    with pytest.raises(ValueError, match=r"keeps a recurrent state .* Use a decoder-only language model"):
        get_peft_model(base, config())
    assert trace(base) == before


def test_an_encoder_of_images_with_a_decoder_is_refused():
    """It is given `decoder_input_ids`, and its layers read images already."""
    text = hf.BertConfig(**text_tower(WIDTH), is_decoder=True, add_cross_attention=True)
    both = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**vision_tower(WIDTH)), text)
    with pytest.raises(ValueError, match=r"an encoder and a decoder.* Use a decoder-only language model"):
        get_peft_model(tiny(hf.VisionEncoderDecoderModel, both)(), config())


def test_a_decoder_of_several_streams_is_refused():
    base = llama()
    base.config.hc_mult = 4  # as DeepSeek-V4 and GLM-5 call it
    with pytest.raises(ValueError, match=r"several streams .* Use a decoder-only language model"):
        get_peft_model(base, config())


class Around(nn.Module):
    """A model without a config of transformers, around one of theirs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> object:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


def test_a_base_without_a_config():
    model = get_peft_model(Around(llama()), config())
    assert any("gated_xattn" in name for name, _ in model.named_parameters())


# --------------------------------------------------------------------------------------------------- the contract


# Families whose text is read by one decoder.
DECODER = ("blip_2", "llava", "qwen2_5_vl", "paligemma", "idefics3", "mllama")


def gated_xattn(family: Family, **changes: Any) -> PeftConfig | None:
    """The images are the families' `media`."""
    if family.name not in DECODER:
        return None
    sizes = {"num_latents": 3, "resampler_depth": 1, "resampler_heads": 2, "head_dim": 8, "max_frames": 2}
    sizes |= {"resampler": "perceiver", "ff_mult": 4}
    return GatedXAttnConfig(**{"media_token_id": BOS, "vision_hidden_size": 20, **sizes, **changes})


@functools.cache
def eyes() -> str:
    """A folder with a tiny vision encoder."""
    folder = tempfile.mkdtemp(prefix="vision-encoder-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tiny(hf.CLIPVisionModel, hf.CLIPVisionConfig(**vision_tower(20)))().save_pretrained(folder)
    return folder


def gated_xattn_encoder(family: Family, **changes: Any) -> PeftConfig | None:
    """With eyes of its own and the default parts, for a language model that has none."""
    if family.name != "llama":
        return None
    own = {"vision_encoder": eyes(), "resampler_heads": 2, "head_dim": 8, "max_frames": 2}
    return GatedXAttnConfig(**{"media_token_id": BOS, **own, **changes})


def gated_xattn_parameters(base: nn.Module, config: GatedXAttnConfig) -> int:
    """R D + F D + depth (4 D + 4 D I + 2 D + 8 D^2) + 2 D, or linear F D + 2 D + D^2; a layer has
    2 d + d I + 2 D I + I d + 1 + 2 d + 2 ff_mult d^2 + 1; the marker a row."""
    D, R, F, depth = config.vision_hidden_size, config.num_latents, config.max_frames, config.resampler_depth
    I, d = config.resampler_heads * config.head_dim, base.get_input_embeddings().embedding_dim  # noqa: E741
    perceiver = R * D + depth * (4 * D + 4 * D * I + 2 * D + 8 * D**2)
    resampler = F * D + 2 * D + (perceiver if config.resampler == "perceiver" else D**2)
    block = 2 * d + d * I + 2 * D * I + I * d + 1 + 2 * d + 2 * config.ff_mult * d**2 + 1
    return resampler + 2 * block + d


def gated_xattn_anywhere() -> GatedXAttnConfig:
    """The marker and the width are those of the tests of the auto mappings."""
    sizes = {"num_latents": 2, "resampler_depth": 1, "resampler_heads": 2, "head_dim": 4, "max_frames": 2}
    return GatedXAttnConfig(media_token_id=ANY_MARKER, vision_hidden_size=ANY_WIDTH, **sizes)


CASES = [
    Case(
        "gated_xattn",
        gated_xattn,
        gated_xattn_parameters,
        anywhere=gated_xattn_anywhere,
        whole=lambda: GatedXAttnConfig(
            media_token_id=ANY_MARKER, vision_hidden_size=ANY_WIDTH, every_n_layers=2, resampler_depth=2
        ),
        refusal="Use a decoder-only language model",
    ),
    Case("gated_xattn-encoder", gated_xattn_encoder, gated_xattn_parameters),
]
