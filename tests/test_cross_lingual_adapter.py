"""CrossLingualAdapter against a slow oracle; languages in a batch, in threads and beside each other; its encoder's life."""

from __future__ import annotations

import copy
import functools
import io
import json
import math
import shutil
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from case import Case
from families import BOS, EOS, FAMILIES, PAD, VOCAB, WORDS, Family, text_tower, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import ENCODER_WIDTH, TEXT_TOWER, adapter, distance, inputs, language, run, save_encoder, stir, trace, wrap
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_multimodal
from peft_multimodal import CrossLingualAdapterConfig, describe
from peft_multimodal.encoders.language import vocabulary_hash
from peft_multimodal.methods.cross_lingual_adapter import LanguageAdapter, LanguageTower

METHOD = "cross_lingual_adapter"
CLIP, FLAVA = FAMILIES["clip"], FAMILIES["flava"]
close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


def adapt(family: Family = CLIP, **changes: Any) -> PeftModel:
    return wrap(family, METHOD, **changes)


def config(**changes: Any) -> CrossLingualAdapterConfig:
    return CrossLingualAdapterConfig(**{"encoder": language(), "bottleneck_dim": 16, "num_heads": 2, **changes})


def language_adapter(options: CrossLingualAdapterConfig, width: int, output_dim: int) -> LanguageAdapter:
    n, heads = options.num_layers, options.num_heads
    sizes = (width, options.bottleneck_dim, n, output_dim, heads, options.ff_mult)
    return LanguageAdapter(*sizes, options.dropout, options.pool)


def part(model: PeftModel) -> LanguageTower:
    return model.base_model.language_tower()


def texts(*lengths: int, seed: int = 0, left: bool = False, longest: int = 0) -> dict[str, Tensor]:
    """Texts of these lengths, padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(*lengths, longest)), PAD)
    for row, length in zip(ids, lengths, strict=True):
        words = torch.randint(*WORDS, (length,), generator=generator)
        words[0], words[-1] = BOS, EOS
        row[slice(-length, None) if left else slice(length)] = words
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


@torch.no_grad()
def features(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    return model.get_text_features(**batch, **options).pooler_output


def second_language() -> str:
    """The folder of an encoder of another width and vocabulary."""
    return language(20, "x")


def bilingual(family: Family = CLIP, base: nn.Module | None = None) -> PeftModel:
    """English, "zh", and "ja" by an encoder of its own."""
    model = wrap(family, METHOD, adapter_name="zh", base=base)
    model.add_adapter("ja", config(encoder=second_language(), bottleneck_dim=8, num_layers=2, pool="cls"))
    return stir(model, "ja", seed=1)


# ------------------------------------------------------------------------------------------------------- the equation


def oracle(model: PeftModel, ids: Tensor, name: str = "default") -> tuple[Tensor, Tensor]:
    """Y (L, d_t) and y (d_t) of one text without padding: the equation, written out in float64."""
    options, tower = model.peft_config[name], part(model)
    encoder = tower.encoders[tower.encoder_of[name]]
    W = {k: v.double() for k, v in tower.cross_lingual_adapter_language[name].state_dict().items()}
    m, heads = options.bottleneck_dim, options.num_heads

    def normed(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    def linear(x: Tensor, layer: str) -> Tensor:
        return x @ W[f"{layer}.weight"].T + W[f"{layer}.bias"]

    def norm(x: Tensor, layer: str) -> Tensor:
        return normed(x) * W[f"{layer}.weight"] + W[f"{layer}.bias"]

    A = linear(normed(encoder(input_ids=ids[None]).last_hidden_state[0].double()), "down")
    for k in range(options.num_layers):
        block, d = f"blocks.{k}", m // heads
        q, keys, v = linear(norm(A, f"{block}.norm_attention"), f"{block}.qkv").split(m, dim=-1)
        attended = torch.zeros_like(A)
        for h in range(heads):
            own = slice(h * d, h * d + d)
            for i in range(len(A)):
                weights = torch.stack([q[i, own] @ keys[j, own] / math.sqrt(d) for j in range(len(A))]).softmax(0)
                attended[i, own] = sum(w * v[j, own] for j, w in enumerate(weights))
        A = A + linear(attended, f"{block}.out")
        x = linear(norm(A, f"{block}.norm_ffn"), f"{block}.ffn.0")
        A = A + linear(x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), f"{block}.ffn.2")
    Y = linear(A, "up")
    if options.pool == "cls":
        return Y, Y[0]
    if options.pool == "mean":
        return Y, sum(Y) / len(Y)
    return Y, sum(w * row for w, row in zip((A @ W["query"]).softmax(0), Y, strict=True))


@pytest.mark.parametrize("pool", ["mean", "cls", "attention"])
@pytest.mark.parametrize("layers", [0, 1, 2])
@torch.no_grad()
def test_equation(layers: int, pool: str):
    model = adapt(num_layers=layers, pool=pool, num_heads=4)
    batch = texts(7, 3, 5)
    out = model.text_model(**batch)
    got = features(model, batch)
    for row, (ids, mask) in enumerate(zip(*batch.values(), strict=True)):
        Y, y = oracle(model, ids[mask.bool()])
        close(out.pooler_output[row].double(), y)
        close(out.last_hidden_state[row, 1 : len(Y)].double(), Y[1:])
        close(out.last_hidden_state[row, 0].double(), y)  # who reads token states reads the pooled output as the first
        close(got[row], model.text_projection(y.float()))


@torch.no_grad()
def test_a_feed_forward_width_and_the_start_of_attention_pooling():
    model = adapt(ff_mult=2, pool="attention")
    batch = texts(6)
    _, y = oracle(model, batch["input_ids"][0])
    close(model.text_model(**batch).pooler_output[0].double(), y)
    fresh = adapt(pool="attention", stirred=False)
    mean = adapt(pool="mean", stirred=False)
    close(features(fresh, batch), features(mean, batch))


@pytest.mark.parametrize(
    ("m", "layers", "millions"),
    [(64, 1, 0.13), (64, 2, 0.18), (128, 1, 0.36), (256, 1, 1.12), (256, 2, 1.91), (384, 2, 4.04), (512, 1, 3.81)],
)
def test_counts_at_full_size(m: int, layers: int, millions: float):
    options = CrossLingualAdapterConfig(bottleneck_dim=m, num_layers=layers)
    for pool, more in (("mean", 0), ("cls", 0), ("attention", m)):
        options.pool = pool
        with torch.device("meta"):
            count = sum(p.numel() for p in language_adapter(options, 768, 512).parameters())
        assert count == (768 * m + m) + layers * (12 * m**2 + 13 * m) + (m * 512 + 512) + more
        assert abs(count - more - millions * 1e6) <= 5_100


@pytest.mark.parametrize("pool", ["mean", "cls", "attention"])
def test_gradients_in_float64_against_finite_differences(pool: str):
    options = config(bottleneck_dim=4, pool=pool, ff_mult=2)
    module = stir_module(language_adapter(options, 5, 3).double())
    H = torch.randn(2, 4, 5, dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    names, values = zip(*module.named_parameters(), strict=True)

    def call(*parameters: Tensor) -> tuple[Tensor, Tensor]:
        Y, y = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (H, mask))
        return Y[mask], y

    assert torch.autograd.gradcheck(call, values)


@torch.no_grad()
def stir_module(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def test_dropout_is_of_the_adapter_in_training():
    model, batch = adapt(dropout=0.5), texts(5, 7)
    expected = features(model, batch)
    assert torch.equal(features(adapt(), batch), expected)
    model.train()
    assert distance(features(model, batch), features(model, batch)) > 1e-3
    assert torch.equal(features(model.eval(), batch), expected)


# ------------------------------------------------------------------------------------------------------------ padding


@pytest.mark.parametrize("pool", ["mean", "cls", "attention"])
def test_padding_changes_nothing(pool: str):
    model = adapt(pool=pool, num_layers=2)
    short, long = texts(4, 6), texts(4, 6, longest=20)
    expected = features(model, short)
    close(features(model, long), expected)
    spoiled = long["input_ids"].masked_fill(long["attention_mask"] == 0, WORDS[0])
    for dtype in (torch.long, torch.bool, torch.float32):
        close(features(model, {"input_ids": spoiled, "attention_mask": long["attention_mask"].to(dtype)}), expected)
    close(features(model, {"input_ids": long["input_ids"]}), expected)  # by the encoder's padding id


@pytest.mark.parametrize("pool", ["mean", "cls", "attention"])
@torch.no_grad()
def test_the_adapter_reads_texts_padded_on_the_left(pool: str):
    module = stir_module(language_adapter(config(pool=pool), ENCODER_WIDTH, 32))
    H = torch.randn(1, 5, ENCODER_WIDTH)
    Y, y = module(H, torch.ones(1, 5, dtype=torch.bool))
    mask = torch.tensor([[False] * 3 + [True] * 5])
    padded_Y, padded_y = module(torch.cat([torch.randn(1, 3, ENCODER_WIDTH), H], dim=1), mask)
    close(padded_y, y)
    close(padded_Y[:, 4:], Y[:, 1:])
    close(padded_Y[:, 0], y)
    assert module(H, mask[:, 3:], tokens=False)[0] is None


def test_texts_padded_on_the_left(tmp_path: Path):
    """As far as the encoder counts its positions from the first token, as XLM-R does."""
    tiny(hf.XLMRobertaModel, hf.XLMRobertaConfig(**text_tower(ENCODER_WIDTH)))().save_pretrained(tmp_path)
    for pool in ("mean", "cls", "attention"):
        model = adapt(encoder=str(tmp_path), pool=pool)
        close(features(model, texts(3, 6, left=True)), features(model, texts(3, 6)))
        model.add_adapter("other", config(pool=pool))  # its rows lie in the last columns
        for names in (["default", "default"], ["default", "other"], ["other", "default"]):
            mixed = features(model, texts(3, 6, left=True), adapter_names=names)
            for row, name in enumerate(names):
                if name == "default":
                    close(mixed[row], features(model, texts(3, 6))[row])


@pytest.mark.parametrize("pool", ["mean", "cls", "attention"])
def test_a_row_of_padding_alone_is_finite(pool: str):
    model, batch = adapt(pool=pool), texts(5, 3)
    expected = features(model, batch)
    batch["attention_mask"][1] = 0
    result = features(model, batch)
    assert result.isfinite().all()
    close(result[0], expected[0])


@pytest.mark.parametrize("name", TEXT_TOWER)
@torch.no_grad()
def test_whatever_the_languages_tokenizer_gives(name: str):
    """Its `token_type_ids` too, and by every way into the tower."""
    family = FAMILIES[name]
    model, tokenizer = adapt(family), hf.AutoTokenizer.from_pretrained(language())
    batch = tokenizer(["w7 w9 w30", "w8 w12 w13 w14 w49"], padding=True, return_tensors="pt")
    assert {"input_ids", "token_type_ids", "attention_mask"} == set(batch)
    plain = {k: v for k, v in batch.items() if k != "token_type_ids"}
    expected = features(model, plain)
    assert torch.equal(features(model, batch), expected)
    images = inputs(family, model)["pixel_values"][:2]
    outputs = [family.output(model(**tokens, pixel_values=images)) for tokens in (plain, batch)]
    assert torch.equal(*outputs)
    tower = model.get_submodule(f"base_model.model.{family.towers['text']}")
    assert torch.equal(tower(*plain.values()).pooler_output, tower(**plain).pooler_output)


@pytest.mark.parametrize("name", TEXT_TOWER)
@torch.no_grad()
def test_return_dict(name: str):
    family = FAMILIES[name]
    model = adapt(family)
    tower = model.get_submodule(f"base_model.model.{family.towers['text']}")
    out = tower(**texts(4, 6), return_dict=True)
    first, pooled, *_ = tower(**texts(4, 6), return_dict=False)
    assert torch.equal(first, out.last_hidden_state)
    assert torch.equal(pooled, out.pooler_output)
    whole = model(**inputs(family, model), return_dict=False)
    assert isinstance(whole, tuple)
    assert any(isinstance(t, Tensor) and torch.equal(t, run(family, model)) for t in whole)


# ----------------------------------------------------------------------------------------- several languages at a time

NAMES = ("__base__", "zh", "ja")


@functools.cache
def polyglot(name: str) -> PeftModel:
    return bilingual(FAMILIES[name])


def alone(model: PeftModel, name: str, batch: dict[str, Tensor]) -> Tensor:
    """The text features of one language's batch."""
    with model.disable_adapter() if name == "__base__" else nullcontext():
        model.set_adapter("zh" if name == "__base__" else name)
        return features(model, batch)


rows = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(2, 9)), min_size=1, max_size=7)


@pytest.mark.parametrize("name", ["clip", "chinese_clip", "altclip", "vision_text_dual_encoder", "flava"])
@settings(max_examples=12, deadline=None)
@given(rows=rows, seed=st.integers(0, 99), spare=st.integers(0, 4))
def test_a_mixed_batch_is_each_languages_own(name: str, rows: list, seed: int, spare: int):
    model = polyglot(name)
    names, lengths = [n for n, _ in rows], [length for _, length in rows]
    batch = texts(*lengths, seed=seed, longest=max(lengths) + spare)
    mixed = features(model, batch, adapter_names=names)
    for language_name in set(names):
        own = [i for i, n in enumerate(names) if n == language_name]
        longest = max(lengths[i] for i in own)
        expected = alone(model, language_name, {k: v[own, :longest] for k, v in batch.items()})
        for i, features_alone in zip(own, expected, strict=True):
            seen = slice(lengths[i]) if mixed.ndim == 3 else slice(None)
            close(mixed[i][seen], features_alone[seen])


@pytest.mark.parametrize("name", ["clip", "siglip", "flava"])
@torch.no_grad()
def test_one_language_in_every_row(name: str):
    family = FAMILIES[name]
    model = polyglot(name)
    for language_name in NAMES:
        batch = family.inputs(model)
        got = family.output(model(**batch, adapter_names=[language_name] * 3))
        with model.disable_adapter() if language_name == "__base__" else nullcontext():
            model.set_adapter("zh" if language_name == "__base__" else language_name)
            expected = run(family, model)
        seen = torch.ones_like(batch["attention_mask"]).bool()
        if name == "flava":
            seen = torch.cat([torch.ones(3, got.shape[1] - seen.shape[1]), batch["attention_mask"]], dim=1).bool()
            got, expected = got[seen], expected[seen]
        close(got, expected)


def test_rows_train_their_own_adapters():
    lengths, names, targets = (5, 6, 4), ["zh", "__base__", "ja"], torch.randn(3, 24)
    model, batch = bilingual(), texts(*lengths)
    mixed = {}
    for name in ("zh", "ja"):
        model.set_adapter(name)  # gradients are of the active adapter, rows of any
        model.zero_grad()
        (model.get_text_features(**batch, adapter_names=names).pooler_output * targets).sum().backward()
        mixed |= {n: p.grad.clone() for n, p in adapter(model, name).items()}
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(adapter(model, name))
    for row, name in ((0, "zh"), (2, "ja")):
        model.set_adapter(name)
        model.zero_grad()
        own = {k: v[row : row + 1, : lengths[row]] for k, v in batch.items()}
        (model.get_text_features(**own).pooler_output * targets[row]).sum().backward()
        for n, p in adapter(model, name).items():
            assert p.grad.any() or n.endswith("qkv.bias"), n
            close(mixed[n], p.grad, msg=n)


def test_two_threads_do_not_meet():
    model, batch = bilingual(), texts(5, 3, 7, 4)
    orders = (["zh", "__base__", "ja", "zh"], ["ja", "ja", "zh", "__base__"], None)
    expected = [features(model, batch, adapter_names=names) for names in orders]
    assert distance(expected[0], expected[1]) > 1e-2
    start, wrong = threading.Barrier(len(orders)), []

    def work(names: list[str] | None, result: Tensor) -> None:
        start.wait()
        for _ in range(25):
            difference = distance(features(model, batch, adapter_names=names), result)
            if difference > 1e-5:
                wrong.append((names, difference))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(orders, expected, strict=True)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_outlives_a_call_that_fails(error: type[BaseException]):
    model, batch = bilingual(), texts(5, 3)
    expected = features(model, batch)

    def fail(*_):
        raise error

    handle = part(model).cross_lingual_adapter_language["ja"].register_forward_hook(fail)
    for call in (model.get_text_features, functools.partial(model, pixel_values=torch.randn(2, 3, 16, 16))):
        with pytest.raises(error):
            call(**batch, adapter_names=["zh", "ja"])
        scope = part(model).scope
        assert (scope.is_open, scope.values) == (False, {})
    handle.remove()
    assert torch.equal(features(model, batch), expected)


CALLS = {
    "model(...)": lambda model, **options: model(pixel_values=torch.randn(2, 3, 16, 16), **options),
    "get_text_features(...)": lambda model, **options: model.get_text_features(**options),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_rows_cannot_be(call: str):
    model, batch = bilingual(), texts(5, 3)
    expected = features(model, batch)
    for options, message in (
        ({**batch, "adapter_names": ["zh", "de"]}, r"No adapter for \['de'\]; there are .*'zh', 'ja'.*load_adapter"),
        ({**batch, "adapter_names": ["zh"]}, "1 adapter_names for 2 rows"),
        ({**batch, "adapter_names": ["zh"] * 3}, "3 adapter_names for 2 rows"),
        ({**batch, "adapter_names": []}, "0 adapter_names for 2 rows"),
        ({"input_ids": batch["input_ids"], "adapter_names": ["zh", "ja"]}, "attention_mask"),
    ):
        with pytest.raises(ValueError, match=message):
            CALLS[call](model, **options)
    assert torch.equal(features(model, batch), expected)


def test_rows_while_the_adapters_are_disabled():
    """`PeftModel.forward` drops the names before any code of ours could see them."""
    model = bilingual()
    with model.disable_adapter():
        with pytest.raises(ValueError, match="disabled"):
            features(model, texts(5, 3), adapter_names=["zh", "__base__"])
        assert torch.equal(run(CLIP, model, adapter_names=["zh", "__base__", "ja"]), run(CLIP, CLIP.build()))


def test_two_active_languages_are_an_error():
    model, batch = bilingual(), texts(5, 3)
    model.base_model.set_adapter(["zh", "ja"])
    with pytest.raises(ValueError, match=r"\['zh', 'ja'\] are languages.*adapter_names="):
        features(model, batch)
    assert features(model, batch, adapter_names=["zh", "ja"]).isfinite().all()
    with model.disable_adapter():
        close(features(model, batch), features(CLIP.build(), batch))


@pytest.mark.parametrize("token", [VOCAB, 40_000, -1])
def test_tokens_of_another_tokenizer(token: int):
    model, batch = adapt(), texts(5, 3)
    batch["input_ids"][0, 2] = token
    with pytest.raises(ValueError, match=rf"Token {token} is outside the {VOCAB} tokens of adapter 'default'.*tokenis"):
        features(model, batch)
    with pytest.raises(ValueError, match=f"Token {token}"):
        features(model, batch, adapter_names=["default", "__base__"])


LIMITED = {
    "bert": (hf.BertModel, hf.BertConfig(**text_tower(28, max_position_embeddings=12)), 12),
    "xlm-roberta": (  # its positions begin behind the padding id
        *(hf.XLMRobertaModel, hf.XLMRobertaConfig(**text_tower(28, max_position_embeddings=12, pad_token_id=1)), 10),
    ),
    "distilbert": (
        *(hf.DistilBertModel, hf.DistilBertConfig(vocab_size=VOCAB, dim=28, n_layers=1, n_heads=2, hidden_dim=56)),
        512,
    ),
}


@pytest.mark.parametrize("kind", LIMITED)
def test_texts_that_are_too_long(kind: str, tmp_path: Path):
    model_class, options, limit = LIMITED[kind]
    tiny(model_class, options)().save_pretrained(tmp_path)
    model = adapt(encoder=str(tmp_path))
    assert features(model, texts(limit, 4)).isfinite().all()
    with pytest.raises(
        ValueError, match=rf"{limit + 1} tokens, .* reads {limit}: .*truncation=True, max_length={limit}"
    ):
        features(model, texts(limit + 1, 4))
    names = ["default", "__base__"]  # padding for the sake of another row doesn't count
    assert features(model, texts(3, 40), adapter_names=names).isfinite().all()


def test_a_long_text_beside_short_english_ones(tmp_path: Path):
    """Longer than the English tower could read."""
    options = hf.BertConfig(**text_tower(28, max_position_embeddings=128))
    tiny(hf.BertModel, options)().save_pretrained(tmp_path)
    model, names = adapt(encoder=str(tmp_path)), ["default", "__base__", "__base__"]
    batch = texts(100, 5, 7)
    mixed = features(model, batch, adapter_names=names)
    close(mixed[:1], features(model, {k: v[:1] for k, v in batch.items()}))
    close(mixed[1:], features(CLIP.build(), {k: v[1:, :7] for k, v in batch.items()}))


def test_inputs_without_tokens():
    model = adapt()
    with pytest.raises(ValueError, match="reads input_ids"):
        model.text_model(inputs_embeds=torch.randn(1, 4, 32))


# ------------------------------------------------------------------------------------------------- the shared encoders


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_languages_share_one_encoder(tmp_path: Path):
    model = adapt(adapter_name="zh")
    before, grown = size(model), sum(p.numel() for p in adapter(model, "zh").values())
    for i, name in enumerate(("ja", "de"), start=1):
        model.add_adapter(name, config())
        assert size(model) == before + i * grown
    assert len(part(model).encoders) == 1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(CLIP.build(), tmp_path / "zh", adapter_name="zh")
    for name in ("ja", "de"):
        loaded.load_adapter(tmp_path / name, name)
    assert size(loaded) == before + 2 * grown
    module = hf.BertModel.from_pretrained(language())
    for name in ("hi", "fa"):  # one module given twice is one encoder
        loaded.add_adapter(name, config().with_encoder(module))
    assert size(loaded) == before + 4 * grown + size(module)
    assert len(part(loaded).encoders) == 2


def test_an_encoder_goes_with_its_last_adapter():
    model = bilingual()
    model.add_adapter("de", config())
    expected = features(model, texts(5, 3), adapter_names=["de", "ja"])
    assert len(part(model).encoders) == 2
    model.delete_adapter("zh")
    assert len(part(model).encoders) == 2
    assert torch.equal(features(model, texts(5, 3), adapter_names=["de", "ja"]), expected)
    model.delete_adapter("ja")
    assert len(part(model).encoders) == 1
    model.delete_adapter("de")
    assert len(part(model).encoders) == 0
    assert not any(METHOD in name for name, _ in model.named_parameters())
    close(features(model, texts(5, 3)), features(CLIP.build(), texts(5, 3)))


def test_the_encoder_is_frozen_and_in_eval_mode(tmp_path: Path):
    dropping = hf.BertConfig(**text_tower(ENCODER_WIDTH), hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    encoder = hf.BertModel(dropping).train()
    options = config(encoder=None).with_encoder(encoder)
    model, batch = get_peft_model(CLIP.build().train(), options), texts(5, 3)
    model.add_adapter("other", config().with_encoder(encoder))

    def check(mode: bool) -> None:
        assert not any(m.training for m in part(model).encoders.modules())
        assert not any(p.requires_grad for p in part(model).encoders.parameters())
        assert part(model).cross_lingual_adapter_language.training is mode
        assert torch.equal(features(model, batch), expected)

    expected = features(model, batch)
    check(True)
    check_after = (
        (model.eval, False),
        (model.train, True),
        (model.get_base_model().text_model.train, True),
        (lambda: model.set_adapter("default"), True),
        (model.base_model.enable_adapter_layers, True),
        (copy.deepcopy(model).train, True),
    )
    for change, mode in check_after:
        change()
        check(mode)
    model.get_text_features(**batch).pooler_output.sum().backward()
    assert all(p.grad is None for p in encoder.parameters())


def test_unload_takes_everything_out():
    base = CLIP.build()
    own = base.text_model.forward

    def hooked(*args: Any, **kwargs: Any) -> Any:  # what accelerate does to a module
        return own(*args, **kwargs)

    base.text_model.forward = hooked
    expected, before = features(base, texts(5, 3)), trace(base)
    model = bilingual(base=base)
    assert distance(features(model, texts(5, 3)), expected) > 1e-2
    with model.disable_adapter():
        assert torch.equal(features(model, texts(5, 3)), expected)
    unloaded = model.unload()
    assert unloaded.text_model.forward is hooked
    assert "get_text_features" not in vars(unloaded)
    assert trace(unloaded) == before
    assert torch.equal(features(unloaded, texts(5, 3)), expected)
    del unloaded.text_model.forward
    unloaded = get_peft_model(unloaded, config()).unload()
    assert "forward" not in vars(unloaded.text_model)


@torch.no_grad()
def test_teacher_is_the_tower_itself():
    batch = texts(5, 3, 7)
    expected = CLIP.build().text_model(**batch).pooler_output
    model = bilingual().train()
    teaching = part(model).teach(**batch)
    assert torch.equal(teaching.pooled, expected)
    assert teaching.states is None
    assert model.get_base_model().text_model.training
    assert part(model).cross_lingual_adapter_language.training
    model = bilingual(FLAVA)
    out = FLAVA.build().text_model(**batch, output_hidden_states=True)
    teaching = part(model).teach(**batch)
    assert torch.equal(teaching.states, out.hidden_states[-1])
    assert torch.equal(teaching.pooled, out.hidden_states[-1][:, 0])


def test_start_at():
    model, mean = adapt(stirred=False), torch.randn(32)
    before = {n: p.detach().clone() for n, p in adapter(model).items()}
    part(model).start_at(mean, "default")
    for name, parameter in adapter(model).items():
        assert torch.equal(parameter, mean if name.endswith("up.bias") else before[name]), name
    up = part(model).cross_lingual_adapter_language["default"].to("meta").up
    part(model).start_at(mean, "default")  # weights are yet to be loaded
    assert up.bias.is_meta


# --------------------------------------------------------------------------------------------------- the text side alone


def text_side(name: str) -> tuple[nn.Module, Any]:
    """A family's text model by itself, with the same weights, and what of its output is the whole model's feature."""
    whole = FAMILIES[name].build()
    if name == "clip":
        options = copy.deepcopy(whole.config.text_config)
        options.projection_dim = whole.config.projection_dim
        side = hf.CLIPTextModelWithProjection(options)
        side.load_state_dict({k: v for k, v in whole.state_dict().items() if k.startswith("text_")}, strict=True)
        return side.eval(), lambda whole, out: out.text_embeds
    kinds = {"siglip": hf.SiglipTextModel, "vision_text_dual_encoder": hf.BertModel, "flava": hf.FlavaTextModel}
    side = kinds[name](whole.text_model.config)
    side.load_state_dict(whole.text_model.state_dict(), strict=True)
    projections = {
        "siglip": lambda whole, out: out.pooler_output,
        "vision_text_dual_encoder": lambda whole, out: whole.text_projection(out.pooler_output),
        "flava": lambda whole, out: whole.text_projection(out.last_hidden_state),
    }
    return side.eval(), projections[name]


@pytest.mark.parametrize("name", ["clip", "siglip", "vision_text_dual_encoder", "flava"])
def test_the_text_side_alone_is_trained_for_the_whole_model(name: str, tmp_path: Path):
    side, feature = text_side(name)
    batch, family = texts(5, 3, 7), FAMILIES[name]
    found = describe(side)
    english = features(family.build(), batch)
    with torch.no_grad():
        close(feature(family.build(), side(**batch, output_hidden_states=True)), english)
    before = trace(side)  # after such a call: transformers has installed its hooks
    model = get_peft_model(side, config(level="tokens" if name == "flava" else None), adapter_name="zh")
    assert (describe(model).matrices, describe(model).signature()) == (found.matrices, found.signature())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapter(model, "zh"))
    start = {n: p.detach().clone() for n, p in adapter(model, "zh").items()}
    optimizer = torch.optim.AdamW(adapter(model, "zh").values(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = feature(family.build(), model(**batch)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, start[n]) for n, p in adapter(model, "zh").items())
    model.save_pretrained(tmp_path)

    whole = PeftModel.from_pretrained(family.build(), tmp_path / "zh", adapter_name="zh")
    seen = batch["attention_mask"].bool() if name == "flava" else slice(None)
    with torch.no_grad():
        close(features(whole, batch)[seen], feature(family.build(), model(**batch))[seen])
        with model.disable_adapter():
            close(feature(family.build(), model(**batch)), english)
        close(  # rows of several languages
            feature(family.build(), model(**batch, adapter_names=["zh", "__base__", "zh"]))[seen],
            features(whole, batch, adapter_names=["zh", "__base__", "zh"])[seen],
        )
    whole.save_pretrained(tmp_path / "back")  # and the other way round
    again = PeftModel.from_pretrained(text_side(name)[0], tmp_path / "back" / "zh", adapter_name="zh")
    with torch.no_grad():
        close(feature(family.build(), again(**batch)), feature(family.build(), model(**batch)))
    assert trace(model.unload()) == before


# ------------------------------------------------------------------------------------------------------ token states


@torch.no_grad()
def test_token_states_go_through_what_stands_behind_the_towers_layers():
    model, batch = adapt(FLAVA), inputs(FLAVA, FLAVA.build())
    assert model.peft_config["default"].level == "tokens"
    base, text = model.get_base_model(), {k: batch[k] for k in ("input_ids", "attention_mask")}
    tower = base.text_model
    out = tower(**text, output_hidden_states=True)
    Y = out.hidden_states[-1]
    for row, (ids, mask) in enumerate(zip(*text.values(), strict=True)):
        expected, y = oracle(model, ids[mask.bool()])
        close(Y[row, 1 : len(expected)].double(), expected[1:])
        close(Y[row, 0].double(), y)
    # The same relations as in the tower itself.
    with model.disable_adapter():
        own = tower(**text, output_hidden_states=True)
    for o in (own, out):
        close(o.last_hidden_state, tower.layernorm(o.hidden_states[-1]))
        close(o.pooler_output, tower.pooler(o.last_hidden_state))

    whole = model(**batch)
    assert torch.equal(whole.text_embeddings, out.last_hidden_state)
    states = base.image_model(batch["pixel_values"], output_hidden_states=True).hidden_states[-1]
    parts = [base.image_to_mm_projection(states), base.text_to_mm_projection(Y)]
    mask = torch.cat([torch.ones(3, parts[0].shape[1] + 1), text["attention_mask"]], dim=1)
    expected = base.multimodal_model(torch.cat(parts, dim=1), attention_mask=mask).last_hidden_state
    close(whole.multimodal_embeddings, expected)
    close(features(model, text), base.text_projection(out.last_hidden_state))


@torch.no_grad()
def test_other_states_can_stand_in_for_the_towers():
    model, batch = adapt(FLAVA), texts(5, 3)
    states = torch.randn(2, 5, 32)
    tower = model.get_base_model().text_model
    with part(model).standing_in(states):
        out = tower(**batch)
        with model.disable_adapter():
            assert torch.equal(tower(**batch).last_hidden_state, out.last_hidden_state)
    assert torch.equal(out.last_hidden_state, tower.layernorm(states))
    assert distance(tower(**batch).last_hidden_state, out.last_hidden_state) > 1e-2


def test_levels_do_not_mix():
    model = adapt(FLAVA)
    with pytest.raises(ValueError, match="level='tokens'; one with 'pooled' can't join"):
        model.add_adapter("other", config(level="pooled"))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("other", config())
    assert model.peft_config["other"].level == "tokens"
    assert adapt(CLIP).peft_config["default"].level == "pooled"


# ------------------------------------------------------------------------------- an adapter's folder and its encoder


def rewrite(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def other_kind(folder: Path) -> None:
    shutil.rmtree(folder)
    tiny(hf.RobertaModel, hf.RobertaConfig(**text_tower(ENCODER_WIDTH)))().save_pretrained(folder)


def other_width(folder: Path) -> None:
    shutil.rmtree(folder)
    save_encoder(folder, width=20)


def other_vocabulary(folder: Path) -> None:
    save_encoder(folder, words="v")


def more_tokens(folder: Path) -> None:
    model = hf.BertModel.from_pretrained(folder)
    model.resize_token_embeddings(VOCAB + 8)
    model.save_pretrained(folder)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    no_weights(folder)


def missing_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights = {k: v for k, v in weights.items() if "layer.1.attention.self.query" not in k}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def own_code(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    rewrite(folder, model_type="evil", auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Config"})


WAY_OUT = r"[\s\S]*config\.(encoder|with_encoder)"
CHANGED = {
    "another width": (other_width, rf"encoder_width 20 now, then it was {ENCODER_WIDTH}{WAY_OUT}"),
    "another kind": (other_kind, f"encoder_type 'roberta' now, then it was 'bert'{WAY_OUT}"),
    "another vocabulary": (other_vocabulary, f"tokenizer_hash .* now, then it was{WAY_OUT}"),
    "more tokens": (more_tokens, f"encoder_vocab_size {VOCAB + 8} now, then it was {VOCAB}{WAY_OUT}"),
    "gone": (shutil.rmtree, f"can't be found{WAY_OUT}"),
    "no weights": (no_weights, f"can't be loaded{WAY_OUT}"),
    "weights in pickle": (pickled_weights, f"can't be loaded{WAY_OUT}"),
    "missing weights": (missing_weights, r"lacks weights: encoder\.layer\.1\.attention\.self\.query"),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{"), f"can't be loaded{WAY_OUT}"),
    "code of its own": (own_code, f"can't be loaded{WAY_OUT}"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_an_encoder_that_is_another_now(change: str, tmp_path: Path):
    spoil, message = CHANGED[change]
    save_encoder(tmp_path / "encoder")
    adapt(encoder=str(tmp_path / "encoder")).save_pretrained(tmp_path / "adapter")
    spoil(tmp_path / "encoder")
    base = CLIP.build()
    features(base, texts(3))
    before = trace(base)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert trace(base) == before
    model = adapt(encoder=second_language(), adapter_name="good")
    before, expected = trace(model), features(model, texts(5, 3))
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path / "adapter", "bad")
    assert list(model.peft_config) == model.active_adapters == ["good"]
    assert trace(model) == before
    assert torch.equal(features(model, texts(5, 3)), expected)
    # The ways out that the messages name.
    options = CrossLingualAdapterConfig.from_pretrained(tmp_path / "adapter")
    options.encoder = language()
    other = PeftModel.from_pretrained(CLIP.build(), tmp_path / "adapter", config=options)
    assert torch.equal(features(other, texts(5, 3)), features(adapt(), texts(5, 3)))
    options = CrossLingualAdapterConfig.from_pretrained(tmp_path / "adapter")
    options.with_encoder(hf.BertModel.from_pretrained(language()))
    other = PeftModel.from_pretrained(CLIP.build(), tmp_path / "adapter", config=options)
    assert torch.equal(features(other, texts(5, 3)), features(adapt(), texts(5, 3)))


def test_no_encoder_at_all():
    base = CLIP.build()
    before = trace(base)
    for options, message in (
        (config(encoder=None), r"encoder= is missing.*with_encoder"),
        (config(encoder="/no/such/folder"), "'/no/such/folder' can't be found"),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, options)
        assert trace(base) == before


def test_an_encoder_that_reads_no_text(tmp_path: Path):
    hf.ViTModel(hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path)
    base = CLIP.build()
    before = trace(base)
    with pytest.raises(ValueError, match="encoder"):
        get_peft_model(base, config(encoder=str(tmp_path)))
    assert trace(base) == before


MT5 = hf.MT5Config(vocab_size=VOCAB, d_model=28, d_kv=8, d_ff=56, num_layers=2, num_heads=2, pad_token_id=PAD)
KINDS = {
    "bert": (hf.BertModel, hf.BertConfig(**text_tower(28))),
    "xlm-roberta": (hf.XLMRobertaModel, hf.XLMRobertaConfig(**text_tower(28))),
    "distilbert": LIMITED["distilbert"][:2],
    "modernbert": (hf.ModernBertModel, hf.ModernBertConfig(**text_tower(32), cls_token_id=BOS, sep_token_id=EOS)),
    "mt5": (hf.MT5Model, MT5),
    "mt5 encoder": (hf.MT5EncoderModel, MT5),
    "masked language model": (hf.BertForMaskedLM, hf.BertConfig(**text_tower(28))),
    "qwen3": (hf.Qwen3Model, hf.Qwen3Config(**text_tower(32, num_key_value_heads=2), head_dim=8)),
}


@pytest.mark.parametrize("kept", [False, True], ids=["named", "kept in the folder"])
@pytest.mark.parametrize("kind", KINDS)
def test_encoders_of_every_kind(kind: str, kept: bool, tmp_path: Path):
    model_class, options = KINDS[kind]
    tiny(model_class, options)().save_pretrained(tmp_path / "encoder")
    model, batch = adapt(encoder=str(tmp_path / "encoder"), save_encoder=kept), texts(5, 3)
    expected = features(model, batch)
    close(features(model, texts(5, 3, longest=8)), expected)
    for row, (ids, mask) in enumerate(zip(*batch.values(), strict=True)):
        with torch.no_grad():
            close(model.text_model(**batch).pooler_output[row].double(), oracle(model, ids[mask.bool()])[1])
    model.save_pretrained(tmp_path / "adapter")
    if kept:
        shutil.rmtree(tmp_path / "encoder")
    loaded = PeftModel.from_pretrained(CLIP.build(), tmp_path / "adapter")
    assert distance(features(loaded, batch), expected) <= 1e-6


# --- an encoder that is given as a module


def given_encoder() -> tuple[nn.Module, Any]:
    """An encoder that exists nowhere else, and its tokenizer."""
    encoder = tiny(hf.BertModel, hf.BertConfig(**text_tower(24)))()
    return encoder, hf.AutoTokenizer.from_pretrained(language())


def with_module(**changes: Any) -> tuple[PeftModel, nn.Module]:
    encoder, tokenizer = given_encoder()
    options = config(encoder=None, **changes).with_encoder(encoder, tokenizer)
    return stir(get_peft_model(CLIP.build(), options)), encoder


def test_the_models_own_text_tower_is_no_encoder_of_it():
    base = CLIP.build()
    with pytest.raises(ValueError, match=r"own text tower.* copy.deepcopy"):
        get_peft_model(base, config(encoder=None).with_encoder(base.text_model))
    get_peft_model(base, config(encoder=None).with_encoder(copy.deepcopy(base.text_model)))


def test_given_encoders_are_called_alike_in_every_process():
    """Their names are keys of the model's state: what one process has written another must read."""
    models = []
    for _ in range(2):
        encoders = [hf.BertModel.from_pretrained(language()) for _ in range(2)]
        model = get_peft_model(CLIP.build(), config(encoder=None).with_encoder(encoders[0]))
        for name, encoder in (("same", encoders[0]), ("other", encoders[1])):
            model.add_adapter(name, config(encoder=None).with_encoder(encoder))
        assert len(part(model).encoders) == 2
        models.append(model)
    one, other = models
    other.load_state_dict(one.state_dict())
    one.delete_adapter("default")
    one.delete_adapter("same")
    one.add_adapter("new", config(encoder=None).with_encoder(encoders[0]))
    assert part(one).encoders[part(one).encoder_of["new"]] is encoders[0]


def test_a_given_encoder_is_not_in_the_config(tmp_path: Path):
    model, encoder = with_module()
    with pytest.warns(UserWarning, match=r"(?s)names its language encoder by None.*save_encoder = True"):
        model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["encoder"] is None
    assert (written["encoder_type"], written["encoder_width"], written["encoder_vocab_size"]) == ("bert", 24, VOCAB)
    assert written["tokenizer_hash"] == vocabulary_hash(hf.AutoTokenizer.from_pretrained(language()))
    assert set(written) == set(model.peft_config["default"].to_dict())
    assert not any(name.startswith("_") for name in written)
    assert not (tmp_path / "encoder").exists()

    with pytest.raises(ValueError, match=r"encoder= is missing.*with_encoder"):
        PeftModel.from_pretrained(CLIP.build(), tmp_path)
    options = CrossLingualAdapterConfig.from_pretrained(tmp_path).with_encoder(encoder)
    loaded = PeftModel.from_pretrained(CLIP.build(), tmp_path, config=options)
    assert torch.equal(features(loaded, texts(5, 3)), features(model, texts(5, 3)))
    wrong = CrossLingualAdapterConfig.from_pretrained(tmp_path).with_encoder(hf.BertModel.from_pretrained(language()))
    with pytest.raises(ValueError, match="encoder_width 28 now, then it was 24"):
        PeftModel.from_pretrained(CLIP.build(), tmp_path, config=wrong)


@pytest.mark.parametrize("save", [PeftModel.save_pretrained, peft_multimodal.save], ids=["stock", "atomic"])
@pytest.mark.parametrize("source", ["module", "folder"])
def test_a_kept_encoder_outlives_its_original(source: str, save: Any, tmp_path: Path):
    if source == "module":
        model, _ = with_module(save_encoder=True)
    else:
        save_encoder(tmp_path / "original")
        model = adapt(encoder=str(tmp_path / "original"), save_encoder=True)
    expected = features(model, texts(5, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        save(model, str(tmp_path / "first"))
    shutil.rmtree(tmp_path / "original", ignore_errors=True)
    (tmp_path / "first").rename(tmp_path / "elsewhere")

    files = {str(f.relative_to(tmp_path / "elsewhere")) for f in (tmp_path / "elsewhere").rglob("*") if f.is_file()}
    assert files == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
        *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
        *("encoder/config.json", "encoder/model.safetensors"),
    }
    for options in ({}, {"low_cpu_mem_usage": True}, {"torch_device": "cpu"}):
        loaded = PeftModel.from_pretrained(CLIP.build(), tmp_path / "elsewhere", **options)
        assert distance(features(loaded, texts(5, 3)), expected) <= 1e-6
    save(loaded, str(tmp_path / "again"))  # and again
    shutil.rmtree(tmp_path / "elsewhere")
    loaded = adapt(adapter_name="zh")
    loaded.load_adapter(tmp_path / "again", "default")
    loaded.set_adapter("default")
    assert distance(features(loaded, texts(5, 3)), expected) <= 1e-6
    assert len(part(loaded).encoders) == 2


def test_kept_encoders_of_several_adapters(tmp_path: Path):
    model = bilingual()
    for options in model.peft_config.values():
        options.save_encoder = True
    model.save_pretrained(tmp_path)
    batch, names = texts(5, 3), ["zh", "ja"]
    loaded = PeftModel.from_pretrained(CLIP.build(), tmp_path, subfolder="zh", adapter_name="zh")
    loaded.load_adapter(tmp_path, "ja", subfolder="ja")
    assert distance(features(loaded, batch, adapter_names=names), features(model, batch, adapter_names=names)) <= 1e-6


def test_save_encoder_may_be_asked_for_at_last(tmp_path: Path):
    model, _ = with_module()
    model.peft_config["default"].save_encoder = True
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(CLIP.build(), tmp_path)
    assert distance(features(loaded, texts(5, 3)), features(model, texts(5, 3))) <= 1e-6


@pytest.mark.parametrize("source", ["module", "folder"])
def test_the_user_is_told_where_an_adapter_may_not_load(source: str, tmp_path: Path):
    model = adapt() if source == "folder" else with_module()[0]
    with pytest.warns(UserWarning, match="elsewhere it loads only with that encoder at hand"):
        model.save_pretrained(tmp_path)


def test_tokenizer_files_lie_in_the_adapters_folder(tmp_path: Path):
    original = hf.AutoTokenizer.from_pretrained(language())
    adapt().save_pretrained(tmp_path)
    bilingual().save_pretrained(tmp_path)
    second = hf.AutoTokenizer.from_pretrained(second_language())
    for folder, expected in (("", original), ("zh", original), ("ja", second)):
        tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / folder, subfolder="tokenizer")
        assert tokenizer.get_vocab() == expected.get_vocab()
        assert tokenizer("w7 x9 w30").input_ids == expected("w7 x9 w30").input_ids
        written = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert written["tokenizer_hash"] == vocabulary_hash(tokenizer)
    assert vocabulary_hash(original) != vocabulary_hash(second)


def test_an_encoder_without_a_tokenizer(tmp_path: Path):
    tiny(hf.BertModel, hf.BertConfig(**text_tower(24)))().save_pretrained(tmp_path / "encoder")
    model = adapt(encoder=str(tmp_path / "encoder"))
    assert model.peft_config["default"].tokenizer_hash is None
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(CLIP.build(), tmp_path / "adapter")
    assert torch.equal(features(loaded, texts(5, 3)), features(model, texts(5, 3)))
    assert not (tmp_path / "adapter" / "tokenizer").exists()


# --- an encoder on the Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Any:
    """A cache of the Hub with one model; `hub(words)` publishes a commit and returns its hash."""
    from huggingface_hub import constants

    cache, commits = tmp_path / "hub", []
    for module in (constants, hf.utils.hub.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(cache))

    def publish(words: str, width: int = ENCODER_WIDTH) -> str:
        commit = f"{len(commits) + 1:040x}"
        commits.append(commit)
        save_encoder(cache / "models--user--encoder" / "snapshots" / commit, width=width, words=words)
        refs = cache / "models--user--encoder" / "refs"
        refs.mkdir(exist_ok=True)
        (refs / "main").write_text(commit)
        return commit

    return publish


def test_an_adapter_on_the_hub_with_its_encoder(hub: Any, tmp_path: Path):
    model, _ = with_module(save_encoder=True)
    hub("w")  # there are other models too
    snapshot = tmp_path / "hub" / "models--user--adapter" / "snapshots" / f"{9:040x}"
    model.save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    loaded = PeftModel.from_pretrained(CLIP.build(), "user/adapter")
    assert distance(features(loaded, texts(5, 3)), features(model, texts(5, 3))) <= 1e-6
    loaded = adapt(adapter_name="zh")
    loaded.load_adapter("user/adapter", "default")
    loaded.set_adapter("default")
    assert distance(features(loaded, texts(5, 3)), features(model, texts(5, 3))) <= 1e-6


def test_an_encoder_on_the_hub_is_named_by_its_commit(hub: Any, tmp_path: Path):
    commit = hub("w")
    model = adapt(encoder="user/encoder", adapter_name="zh")
    model.add_adapter("ja", config(encoder="user/encoder"))
    assert len(part(model).encoders) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing to warn of
        model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "zh" / "adapter_config.json").read_text())
    assert (written["encoder"], written["encoder_revision"]) == ("user/encoder", commit)

    assert hub("v", width=20) != commit  # "main" moves on
    loaded = PeftModel.from_pretrained(CLIP.build(), tmp_path / "zh", adapter_name="zh")
    loaded.load_adapter(tmp_path / "ja", "ja")
    assert len(part(loaded).encoders) == 1
    batch, names = texts(5, 3), ["zh", "ja"]
    assert torch.equal(features(loaded, batch, adapter_names=names), features(model, batch, adapter_names=names))
    loaded.add_adapter("new", config(encoder="user/encoder"))
    assert len(part(loaded).encoders) == 2
    assert loaded.peft_config["new"].encoder_width == 20


# ----------------------------------------------------------------------------------------- dtypes, copies, compilation


@pytest.mark.parametrize("name", ["clip", "flava"])
def test_half_precision(name: str, tmp_path: Path):
    family, batch = FAMILIES[name], texts(5, 3, 7)
    seen = batch["attention_mask"].bool() if name == "flava" else slice(None)
    exact = features(adapt(family), batch)[seen]
    model = adapt(family, base=family.build().bfloat16())
    assert {p.dtype for p in part(model).encoders.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in adapter(model).values()} == {torch.float32}
    result = features(model, batch)[seen]
    assert result.dtype == torch.bfloat16
    assert distance(result, exact) <= 0.05 * float(exact.abs().max())
    mixed = features(model, batch, adapter_names=["default", "__base__", "default"])
    assert mixed.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(family.build().bfloat16(), tmp_path, **options)
        assert distance(features(loaded, batch)[seen], result) <= 1e-6
        assert {p.dtype for p in part(loaded).encoders.parameters()} == {torch.bfloat16}
    encoder = hf.BertModel.from_pretrained(language())  # a given module keeps its precision
    model = get_peft_model(family.build().bfloat16(), config().with_encoder(encoder))
    assert {p.dtype for p in part(model).encoders.parameters()} == {torch.float32}
    assert features(model, batch).dtype == torch.bfloat16


def test_a_base_in_float64():
    model, batch = adapt(base=CLIP.build().double()), texts(5, 3)
    assert features(model, batch).dtype == torch.float64
    close(features(model, batch), features(adapt(), batch).double())
    model.get_text_features(**batch).pooler_output.sum().backward()


def test_low_cpu_mem_usage(tmp_path: Path):
    model, batch = bilingual(), texts(5, 3)
    expected = features(model, batch, adapter_names=["zh", "ja"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(CLIP.build(), tmp_path / "zh", adapter_name="zh", low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path / "ja", "ja", low_cpu_mem_usage=True)
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    assert distance(features(loaded, batch, adapter_names=["zh", "ja"]), expected) <= 1e-6


@pytest.mark.parametrize("name", ["clip", "flava"])
def test_copies_stand_on_their_own(name: str):
    model, batch, names = bilingual(FAMILIES[name]), texts(5, 3), ["zh", "ja"]
    buffer = io.BytesIO()
    torch.save(model, buffer)  # before the first call: transformers then installs hooks that no pickle takes
    buffer.seek(0)
    expected = features(model, batch, adapter_names=names)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(features(other, batch, adapter_names=names), expected)
        theirs, ours = ({id(p) for p in m.parameters()} for m in (other, model))
        assert not theirs & ours
        stir(other, "zh", seed=5)
        stir(other, "ja", seed=5)
        assert distance(features(other, batch, adapter_names=names), expected) > 1e-3
        assert torch.equal(features(model, batch, adapter_names=names), expected)
        other.delete_adapter("ja")
        assert list(part(model).encoder_of) == ["zh", "ja"]
        other.save_pretrained  # noqa: B018
        assert torch.equal(features(other.unload(), batch), features(FAMILIES[name].build(), batch))
        assert torch.equal(features(model, batch, adapter_names=names), expected)


@pytest.mark.parametrize("name", ["clip", *(pytest.param(n, marks=pytest.mark.full) for n in TEXT_TOWER[1:])])
@torch.no_grad()
def test_compiles_without_graph_breaks(name: str):
    torch._dynamo.reset()
    model, batch = adapt(FAMILIES[name]), texts(5, 3)
    expected = features(model, batch)  # before: transformers installs hooks at the first call, which can't be traced
    compiled = torch.compile(model.get_text_features, fullgraph=True, backend="eager")
    close(compiled(**batch).pooler_output, expected)
    with model.disable_adapter():
        english = features(model, batch)
        close(compiled(**batch).pooler_output, english)
    assert distance(english, expected) > 1e-2


# ------------------------------------------------------------------------------------------- models that can't have it

INTERLEAVED = ("blip_retrieval", "blip_vqa", "blip_captioning", "blip_2", "bridgetower", "florence2")
NO_TEXT_TOWER = ("vilt", "llama", "t5", "bart", "llava", "qwen2_5_vl", "paligemma", "idefics3", "mllama")


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in TEXT_TOWER])
def test_models_without_a_text_tower_say_why(name: str):
    base = FAMILIES[name].build()
    before = trace(base)
    message = "reads the image inside its text layers" if name in INTERLEAVED else "has no text encoder of its own"
    assert (name in INTERLEAVED) != (name in NO_TEXT_TOWER)
    for call in (get_peft_model, peft_multimodal.matched_modules):
        with pytest.raises(ValueError, match=rf"{type(base).__name__} {message}.*CLIP.*FLAVA.*AuroraModeApprox"):
            call(base, config())
        assert trace(base) == before


def test_an_adapter_of_another_width_is_refused(tmp_path: Path):
    adapt().save_pretrained(tmp_path)
    base = FAMILIES["siglip"].build()  # as wide, but projects to more
    before = trace(base)
    with pytest.raises(ValueError, match="another base: it gives 32 features, the text tower of SiglipModel 48"):
        PeftModel.from_pretrained(base, tmp_path)
    assert trace(base) == before


@pytest.mark.parametrize("whole", ["text_model", "token_embedding", "final_layer_norm"])
def test_modules_to_save_inside_the_tower(whole: str):
    """It isn't run: to train a part of it would do nothing."""
    base = CLIP.build()
    before = trace(base)
    with pytest.raises(ValueError, match=rf"modules_to_save.*{whole}"):
        get_peft_model(base, config(modules_to_save=[whole]))
    assert trace(base) == before


def test_a_config_serves_several_models():
    """What it fills in says nothing about the next model."""
    options = config()
    for name in TEXT_TOWER:
        family = FAMILIES[name]
        model = get_peft_model(family.build(), options)
        assert model.peft_config["default"].level == ("tokens" if name == "flava" else "pooled")
        assert features(model, texts(5, 3)).isfinite().all()


def test_describe_sees_the_model_itself():
    for name in TEXT_TOWER:
        family = FAMILIES[name]
        assert str(describe(bilingual(family))) == str(describe(family.build()))


# --------------------------------------------------------------------------------------------------- the contract


def cross_lingual(family: Family, **changes: Any) -> PeftConfig | None:
    if family.name not in TEXT_TOWER:
        return None
    changes = {"encoder": language(), **changes}
    return CrossLingualAdapterConfig(**{"bottleneck_dim": 16, "num_heads": 2, **changes})


def cross_lingual_parameters(base: nn.Module, config: CrossLingualAdapterConfig) -> int:
    """(d_s m + m) + n (12 m^2 + 13 m) + (m d_t + d_t), d_t being the width of the tower's output."""
    d_s, m, n = ENCODER_WIDTH, config.bottleneck_dim, config.num_layers
    d_t = TOWER_OUTPUT.get(type(base).__name__, 32)
    return (d_s * m + m) + n * (12 * m**2 + 13 * m) + (m * d_t + d_t)


TOWER_OUTPUT = {"SiglipModel": 48, "AltCLIPModel": 40}  # where the tower projects; elsewhere its width, 32


CASES = [
    Case(
        "cross_lingual_adapter",
        cross_lingual,
        cross_lingual_parameters,
        anywhere=lambda: CrossLingualAdapterConfig(encoder=language(), bottleneck_dim=8, num_heads=2),
        whole=lambda: CrossLingualAdapterConfig(encoder=language(384, layers=12)),
        refusal="Use a dual encoder",
    )
]
