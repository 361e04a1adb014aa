"""training/distillation.py: its losses against slow loops of their equations, its Trainer on tiny models.

English words are e0, e1, ..., those of the other language z0, z1, ...; a pair is a few words and their translation in
reverse order. The tokenizers differ in vocabulary, special ids, padding and limit.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
import socket
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from accelerate.state import AcceleratorState
from families import FAMILIES, text_tower
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from test_language_processor import EN, ZH, encoder, siglip_like, tokenizer
from torch import nn

from peft_multimodal import CrossLingualAdapterConfig
from peft_multimodal.data import LanguageProcessor
from peft_multimodal.training import CrossLingualTrainer, DistillationLoss
from peft_multimodal.training import distillation as ds

pytestmark = pytest.mark.filterwarnings(
    "ignore:The adapter's folder names its language encoder", "ignore::FutureWarning"
)

quick = settings(deadline=None, max_examples=25)
numbers = lambda seed: torch.Generator().manual_seed(seed)  # noqa: E731


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Trainer collects garbage among all that was imported, which takes longer than the training."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# -------------------------------------------------------------------------------------------------- losses, by loops


def unit(vector):
    norm = math.sqrt(sum(x * x for x in vector))
    return [x / norm for x in vector]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow_contrast(Z, T, tau):
    """(CE(z Z'^T / tau) + CE(z' Z^T / tau)) / 2; a row whose target is the same vector is no negative."""
    total = 0.0
    for i in range(len(Z)):
        others = [j for j in range(len(Z)) if j == i or dot(T[i], T[j]) <= 1 - 1e-6]
        e = lambda a, b: math.exp(dot(a, b) / tau)  # noqa: E731
        total -= math.log(e(Z[i], T[i]) / sum(e(Z[i], T[j]) for j in others))
        total -= math.log(e(Z[i], T[i]) / sum(e(Z[j], T[i]) for j in others))
    return total / 2 / len(Z)


@quick
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
    st.tuples(*[st.sampled_from([0.0, 0.1, 1.0, 2.0])] * 3).filter(any),
    st.booleans(),
    st.integers(0, 99),
)
def test_pooled_loss_is_the_equation(ids, weights, projected, seed):
    """Rows of equal id have equal targets."""
    y, targets = torch.randn(2, 6, 5, generator=numbers(seed)).double()
    y, e = y[: len(ids)], targets[ids]
    projection = nn.Linear(5, 4, bias=False) if projected else None
    mse, cosine, contrastive = weights
    found = DistillationLoss(mse, cosine, contrastive, temperature=0.2).pooled(y.float(), e.float(), projection)
    W = torch.eye(5).double() if projection is None else projection.weight.detach().double()
    Z, T = ([unit((W @ v).tolist()) for v in x] for x in (y, e))
    expected = mse * sum(sum((a - b) ** 2 for a, b in zip(*v, strict=True)) / 5 for v in zip(y, e, strict=True))
    expected += cosine * sum(1 - dot(*v) for v in zip(Z, T, strict=True))
    expected = float(expected) / len(ids) + contrastive * slow_contrast(Z, T, 0.2)
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_equal_targets_are_no_negatives():
    z, e = (F.normalize(torch.randn(4, 512, generator=numbers(i)), dim=-1) for i in range(2))
    z.requires_grad_()
    alone = ds.in_batch_contrast(z[:2], e[:2], 0.05)
    rows = [0, 1, 1]
    many = ds.in_batch_contrast(z[rows], e[rows], 0.05)
    row = lambda i, j: F.cross_entropy((z[[i]] @ e[[i, j]].t()) / 0.05, torch.tensor([0]))  # noqa: E731
    column = lambda i, j: F.cross_entropy((e[[i]] @ z[[i, j]].t()) / 0.05, torch.tensor([0]))  # noqa: E731
    torch.testing.assert_close(alone, (row(0, 1) + column(0, 1) + row(1, 0) + column(1, 0)) / 4)
    twice = lambda part: F.cross_entropy(part / 0.05, torch.tensor([0]))  # noqa: E731
    first = twice(z[[0]] @ e[[0, 1, 1]].t()) + twice(e[[0]] @ z[[0, 1, 1]].t())
    torch.testing.assert_close(many, (first + 2 * (row(1, 0) + column(1, 0))) / 6)
    same = ds.in_batch_contrast(z, e[[2] * 4], 0.05)
    same.backward()
    assert same == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_one_pair_has_nothing_to_contrast():
    y, e = torch.randn(2, 1, 8, generator=numbers(0))
    assert DistillationLoss(mse=0, cosine=0, contrastive=1).pooled(y, e, None) == 0


def test_losses_are_fp32_under_autocast():
    y, e = torch.randn(2, 6, 512, generator=numbers(0))
    e[1] = e[0] + 0.01 * e[1]  # near, but another text
    Y, E = torch.randn(2, 3, 5, 64, generator=numbers(1))
    mask = torch.ones(3, 5, dtype=torch.bool)
    calls = {
        "mse": lambda: DistillationLoss(cosine=0, contrastive=0).pooled(y, e, None),
        "cosine": lambda: DistillationLoss(mse=0, contrastive=0).pooled(y, e, None),
        "contrastive": lambda: DistillationLoss(mse=0, cosine=0, contrastive=1).pooled(y, e, None),
        "soft": lambda: ds.soft_alignment_loss(Y, E, mask, mask),
        "hard": lambda: ds.hard_alignment_loss(Y, E, [[(1, 2)], [], [(3, 3)]], mask, mask),
    }
    exact = {name: call() for name, call in calls.items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = {name: call() for name, call in calls.items()}
    assert all(x.dtype == torch.float32 for x in found.values())
    assert {n: float(x) for n, x in found.items()} == {n: float(x) for n, x in exact.items()}


def whole(states):
    """The mask of texts without padding."""
    return torch.ones(states.shape[:2], dtype=torch.bool)


def ragged(seed, lengths, width=4):
    """Random states (B, L, width) and their mask, with random numbers in the padding too."""
    states = torch.randn(len(lengths), max(lengths), width, generator=numbers(seed))
    return states, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def slow_soft(Y, E, mask, target_mask, frozen=True):
    """METHODS 3.4 (b), token by token: coverage of the teacher and, with weights without gradient, precision."""
    coverage, precision = [], []
    for b in range(len(Y)):
        student = [y for y, m in zip(Y[b], mask[b], strict=True) if m]
        teacher = [e for e, m in zip(E[b], target_mask[b], strict=True) if m]
        S = [[torch.dot(e, y) / math.sqrt(len(y)) for y in student] for e in teacher]
        for e, scores in zip(teacher, S, strict=True):
            w = [s.exp() / sum(t.exp() for t in scores) for s in scores]
            coverage.append((e - sum(a * y for a, y in zip(w, student, strict=True))).square().mean())
        for i, y in enumerate(student):
            column = [scores[i].detach() if frozen else scores[i] for scores in S]
            w = [s.exp() / sum(t.exp() for t in column) for s in column]
            precision.append((y - sum(a * e for a, e in zip(w, teacher, strict=True))).square().mean())
    return sum(coverage) / len(coverage) + sum(precision) / len(precision)


lengths = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3)


@quick
@given(lengths, st.integers(0, 99))
def test_soft_alignment_is_the_equation_and_so_is_its_gradient(lengths, seed):
    (Y, mask), (E, target_mask) = (ragged(seed + i, n) for i, n in enumerate(zip(*lengths, strict=True)))
    Y.requires_grad_()
    found, expected = ds.soft_alignment_loss(Y, E, mask, target_mask), slow_soft(Y, E, mask, target_mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(loss, Y)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert not gradients[0][~mask].any()


def test_the_precision_weights_carry_no_gradient():
    (Y, mask), (E, target_mask) = ragged(0, [3, 2]), ragged(1, [2, 4])
    Y.requires_grad_()
    found = torch.autograd.grad(ds.soft_alignment_loss(Y, E, mask, target_mask), Y)[0]
    through = torch.autograd.grad(slow_soft(Y, E, mask, target_mask, frozen=False), Y)[0]
    assert (found - through)[mask].abs().max() > 1e-3


@quick
@given(lengths, st.integers(0, 3), st.integers(0, 3), st.integers(0, 99))
def test_soft_alignment_knows_no_padding_and_no_order(lengths, more, more_teacher, seed):
    (Y, mask), (E, target_mask) = (ragged(seed + i, n) for i, n in enumerate(zip(*lengths, strict=True)))

    def padded(x, count, value):
        return torch.cat([x, torch.full((len(x), count, *x.shape[2:]), value, dtype=x.dtype)], dim=1)

    def gradient(Y, E, mask, target_mask):
        Y = Y.clone().requires_grad_()
        loss = ds.soft_alignment_loss(Y, E, mask, target_mask)
        return loss.detach(), torch.autograd.grad(loss, Y)[0]

    loss, slope = gradient(Y, E, mask, target_mask)
    longer, longer_slope = gradient(
        padded(Y, more, 9.0),
        padded(E, more_teacher, -9.0),
        padded(mask, more, False),
        padded(target_mask, more_teacher, False),
    )
    torch.testing.assert_close(longer, loss)
    torch.testing.assert_close(longer_slope[:, : Y.shape[1]], slope)
    order, teacher_order = torch.randperm(Y.shape[1]), torch.randperm(E.shape[1])
    moved = ds.soft_alignment_loss(Y[:, order], E[:, teacher_order], mask[:, order], target_mask[:, teacher_order])
    torch.testing.assert_close(moved, loss, rtol=1e-4, atol=1e-5)


@quick
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=4), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_hard_alignment_is_the_equation(pairs, seed):
    """(1 / |A|) sum of |Y_i - E_j|^2 / d, with (0, 0) in each row, every pair once."""
    Y, E = torch.randn(len(pairs), 5, 4, generator=numbers(seed)), torch.randn(len(pairs), 4, 4)
    terms = [
        sum((a - b) ** 2 for a, b in zip(Y[row, i].tolist(), E[row, j].tolist(), strict=True)) / 4
        for row, found in enumerate(pairs)
        for i, j in {*found, (0, 0)}
    ]
    assert float(ds.hard_alignment_loss(Y, E, pairs, whole(Y), whole(E))) == pytest.approx(
        sum(terms) / len(terms), rel=1e-4
    )


@pytest.mark.parametrize("pair", [(5, 0), (0, 4), (-1, 0), (0, -1)])
def test_hard_pairs_out_of_range(pair):
    Y, E = torch.zeros(2, 5, 3), torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match=rf"Pair \({pair[0]}, {pair[1]}\) of row 1 is outside its 5 and 4 tokens"):
        ds.hard_alignment_loss(Y, E, [[(1, 1)], [(1, 1), pair]], whole(Y), whole(E))


@pytest.mark.parametrize(
    "weights",
    [
        {"mse": -1.0},
        {"cosine": -0.1},
        {"contrastive": -1},
        {"tokens": -1.0},
        {"functional": -1.0},
        {"mse": 0, "cosine": 0, "contrastive": 0},
        {"mse": 0, "cosine": 0.0, "contrastive": 0, "tokens": 0.0, "functional": 0},
        {"mse": "1"},
        {"mse": None},
        {"tokens": [1.0]},
        {"mse": math.nan},
        {"temperature": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
    ],
    ids=str,
)
def test_weights_are_checked(weights):
    with pytest.raises(ValueError, match=r"numbers >= 0|temperature must be > 0"):
        DistillationLoss(**weights)


def test_weights():
    loss = DistillationLoss()
    assert (loss.mse, loss.cosine, loss.contrastive, loss.temperature) == (1.0, 1.0, 0.1, 0.05)
    assert DistillationLoss(mse=0, cosine=0, contrastive=0, tokens=1).tokens == 1
    y, e = torch.randn(2, 4, 8, generator=numbers(0))
    parts = [DistillationLoss(**{**dict.fromkeys(("mse", "cosine", "contrastive"), 0), n: w}) for n, w in
             (("mse", 1), ("cosine", 1), ("contrastive", 0.1))]  # fmt: skip
    torch.testing.assert_close(sum(part.pooled(y, e, None) for part in parts), loss.pooled(y, e, None))


# -------------------------------------------------------------------------------------------------------- tiny models


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The language's encoder and its tokenizer, as a user has them."""
    path = tmp_path_factory.mktemp("encoder")
    save_encoder(path)
    return path


ENCODER = encoder(ZH)


def save_encoder(path):
    ENCODER.save_pretrained(path)
    tokenizer("z", **ZH).save_pretrained(path)


PROCESSOR = LanguageProcessor(en=tokenizer("e", **EN), zh=tokenizer("z", **ZH))
SIGLIP = LanguageProcessor(en=siglip_like(), zh=tokenizer("z", **ZH), padding={"en": "max_length"})


def clip_text():
    """The text side alone of the tiny CLIP, with its weights."""
    whole = FAMILIES["clip"].build()
    model = hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**text_tower(32), projection_dim=24))
    model.load_state_dict({k: v for k, v in whole.state_dict().items() if k.startswith("text_")})
    return model.eval()


def bare(family):
    return clip_text() if family == "clip_text" else FAMILIES[family].build()


def language(folder, encoder=None, **changes):
    """The config of an adapter; the folder's encoder is given, since reading it takes as long as a short training."""
    config = CrossLingualAdapterConfig(**{"encoder": str(folder), "bottleneck_dim": 16, "num_heads": 2, **changes})
    return config.with_encoder(encoder or copy.deepcopy(ENCODER), PROCESSOR.tokenizer("zh"))


def adapted(family, folder, name="zh", base=None, **changes):
    base = base or bare(family)
    torch.manual_seed(0)
    model = get_peft_model(base, language(folder, **changes), adapter_name=name)
    for block in part_of(model).cross_lingual_adapter_language[name].blocks:
        for last in (block.out, block.ffn[2]):  # they start at 0, behind which nothing gets a gradient
            last.reset_parameters()
    return model


def two_adapters(folder):
    """CLIP with zh and ja, and one encoder."""
    model = adapted("clip", folder)
    model.add_adapter("ja", language(folder, encoder=next(iter(part_of(model).encoders.values()))))
    return model


def pairs(count=24, seed=0, aligned=False, longest=4):
    """Different pairs, shorter ones first; with the aligned tokens (target, source) if asked for."""
    found, draw = {}, random.Random(seed)
    while len(found) < count:
        words = tuple(draw.randrange(30) for _ in range(draw.randint(1, longest)))
        found[words] = {
            "source": " ".join(f"e{w}" for w in words),
            "target": " ".join(f"z{w}" for w in reversed(words)),
        }
        if aligned:
            found[words]["pairs"] = [[len(words) - i, i + 1] for i in range(len(words))]
    return sorted(found.values(), key=lambda pair: len(pair["target"]))


def arguments(folder, **changes):
    return hf.TrainingArguments(
        str(folder),
        **{
            **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"},
            **{"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "learning_rate": 1e-2},
            **changes,
        },
    )


def trainer(model, tmp, data=None, *, eval_dataset=None, processor=PROCESSOR, args=None, **options):
    names = {"loss", "language", "cache", "cache_dtype", "cache_dir", "compute_metrics", "callbacks"}
    own = {"cache_dir": tmp / "cache", **{k: options.pop(k) for k in names & set(options)}}
    return CrossLingualTrainer(
        model,
        args or arguments(tmp / "out", **options),
        train_dataset=data,
        eval_dataset=eval_dataset,
        processing_class=processor,
        **own,
    )


def part_of(model):
    return next(m for m in model.modules() if type(m).__name__ == "LanguageTower")


def adapter_of(model, name="zh"):
    return dict(part_of(model).cross_lingual_adapter_language[name].named_parameters())


def copies(tensors):
    return {name: value.detach().clone() for name, value in tensors.items()}


def frozen(model, *names):
    """All weights but those of the adapters of these names."""
    names = tuple(f".cross_lingual_adapter_language.{name}." for name in names)
    return copies({k: v for k, v in model.state_dict().items() if not any(name in k for name in names)})


class Watch:
    """Counts the forward calls of teacher and student, and whether any part of theirs was in train mode."""

    def __init__(self, model, fail_at=None):
        part = part_of(model)
        encoder = next(iter(part.encoders.values()))
        towers = {"student": encoder, "teacher": part.host()}
        self.calls, self.in_training, self.fail_at = dict.fromkeys(towers, 0), [], fail_at
        for name, tower in towers.items():
            own = [m for path, m in tower.named_modules() if "cross_lingual_adapter_tower" not in path]
            embedding = next(m for m in own if isinstance(m, nn.Embedding))
            embedding.register_forward_hook(lambda *_, name=name, own=own: self.seen(name, own))

    def seen(self, name, modules):
        self.calls[name] += 1
        self.in_training += [name for m in modules if m.training]
        if self.fail_at is not None and self.calls[name] == self.fail_at:
            raise KeyboardInterrupt

    @property
    def both(self):
        return self.calls["student"], self.calls["teacher"]


def losses_of(trainer, name="loss"):
    return [log[name] for log in trainer.state.log_history if name in log]


FUNCTIONAL = DistillationLoss(functional=1.0)
CASES = {
    "clip": {},
    "siglip": {"processor": SIGLIP},
    "vision_text_dual_encoder": {},
    "clip_text": {},
    "flava": {},
    "flava-pairs": {"aligned": True},
    "flava-functional": {"loss": FUNCTIONAL},
    "flava-pairs-functional": {"aligned": True, "loss": FUNCTIONAL},
}


def case(name):
    """(family, data, options of `trainer`)."""
    options = dict(CASES[name])
    return name.partition("-")[0], pairs(aligned=options.pop("aligned", False)), options


# ---------------------------------------------------------------------------------------- the functional loss of FLAVA


@pytest.fixture(scope="module")
def flava(folder):
    return adapted("flava", folder)


def states(seed, *lengths):
    return ragged(seed, lengths, 32)


def test_functional_loss_is_that_of_the_models_forward(flava):
    """With E as the tower's states for a text, the fusion encoder gives what the English model gives."""
    pixels = ds.random_images(flava, 2)
    assert pixels.shape == (2, 3, 16, 16)
    batch = PROCESSOR.tokenize(["e1 e2 e3", "e4"], "en")
    with torch.no_grad():
        E = part_of(flava).teach(**batch).states
        Y, mask = states(0, 3, 4)
        found = ds.functional_loss(flava, Y, E, mask, batch["attention_mask"].bool(), pixels)
        english = FAMILIES["flava"].build()(**batch, pixel_values=pixels)
        with part_of(flava).standing_in(Y):
            other = flava(input_ids=mask.long(), attention_mask=mask.long(), pixel_values=pixels)
    kept = [out.multimodal_output.last_hidden_state[:, : -s.shape[1]] for out, s in ((english, E), (other, Y))]
    assert kept[0].shape == kept[1].shape == (2, 6, 40)  # a class token, the image's, four patches
    layernorm = flava.get_base_model().multimodal_model.layernorm
    captured = []
    handle = layernorm.register_forward_hook(lambda m, args, out: captured.append(args[0]))
    with torch.no_grad():
        flava.get_base_model().multimodal_model(torch.randn(1, 3, 40))
        for out in (E, Y):
            m = batch["attention_mask"] if out is E else mask.long()
            with part_of(flava).standing_in(out):
                flava(input_ids=m, attention_mask=m, pixel_values=pixels)
    handle.remove()
    slow = (captured[1][:, :6] - captured[2][:, :6]).square().mean()
    torch.testing.assert_close(found, slow)


def test_functional_loss_is_zero_where_both_are_equal(flava):
    E, mask = states(0, 4, 2)
    pixels = ds.random_images(flava, 2)
    assert ds.functional_loss(flava, E, E, mask, mask, pixels) == 0
    assert ds.functional_loss(flava, E + 1e-2, E, mask, mask, pixels) > 0
    assert ds.functional_loss(flava.eval(), E, E.flip(0), mask, mask.flip(0), pixels) > 0


def test_functional_loss_is_zero_where_both_are_equal_under_dropout(folder):
    """The fusion encoder is frozen: in training its dropout isn't to add noise."""
    base = FAMILIES["flava"].build()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    model = adapted("flava", folder, base=base).train()
    E, mask = states(0, 4, 2)
    assert ds.functional_loss(model, E, E, mask, mask, ds.random_images(model, 2)) == 0


def test_functional_loss_knows_no_padding(flava):
    (Y, mask), (E, target_mask) = states(0, 4, 2), states(1, 3, 5)
    pixels = ds.random_images(flava, 2)
    found = ds.functional_loss(flava, Y, E, mask, target_mask, pixels)
    Y, E = (F.pad(x, (0, 0, 0, 3), value=9.0) for x in (Y, E))
    mask, target_mask = (F.pad(m, (0, 3)) for m in (mask, target_mask))
    torch.testing.assert_close(ds.functional_loss(flava, Y, E, mask, target_mask, pixels), found)


def test_functional_loss_reaches_the_adapter_alone(folder):
    model = adapted("flava", folder)
    (H, mask), (E, target_mask) = ragged(0, [4, 2], 28), states(1, 3, 5)
    Y, _ = part_of(model).project(H, mask, "zh")
    ds.functional_loss(model, Y, E.requires_grad_(), mask, target_mask, ds.random_images(model, 2)).backward()
    assert E.grad is None
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter_of(model).values())
    adapter = {id(p) for p in adapter_of(model).values()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in adapter)


@pytest.mark.parametrize("reentrant", [True, False])
def test_functional_loss_under_gradient_checkpointing(folder, tmp_path, reentrant):
    loss = DistillationLoss(mse=0, cosine=0, contrastive=0, tokens=0, functional=1)
    found = []
    for changes in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        model = adapted("flava", folder)
        run = trainer(model, tmp_path, pairs(8), loss=loss, max_steps=2, **changes)
        run.train()
        found.append(copies(adapter_of(model)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("name", CASES)
def test_training(name, folder, tmp_path):
    family, data, options = case(name)
    model = adapted(family, folder)
    before, start = frozen(model, "zh"), copies(adapter_of(model))
    run = trainer(model, tmp_path, data, eval_dataset=pairs(10, seed=1), num_train_epochs=4, **options)
    watch = Watch(model)
    first = run.evaluate()["eval_loss"]
    run.train()
    evaluated = run.evaluate()
    assert math.isfinite(first)
    assert evaluated["eval_loss"] < 0.8 * first
    trained = adapter_of(model)
    assert all((trained[n] - start[n]).abs().max() > 0 for n in start), "a parameter of the adapter stood still"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if any(p is q for q in trained.values())
    }
    after = frozen(model, "zh")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert watch.both == (0, 0)  # all was kept already
    assert not next(iter(part_of(model).encoders.values())).training


@pytest.mark.parametrize("family", ["clip", "vision_text_dual_encoder", "flava"])
def test_towers_run_in_eval_mode(family, folder, tmp_path):
    """With dropout everywhere, in every step, and the model left in training."""
    base = bare(family)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model = adapted(family, folder, base=base).train()
    for module in part_of(model).encoders.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    watch = Watch(model)
    data = pairs(8)
    run = trainer(model, tmp_path, data, eval_dataset=data, cache=False, max_steps=3)
    run.train()
    assert watch.both == (3, 4)  # the mean teacher vector is one more
    kept = trainer(model, tmp_path, data, eval_dataset=data)
    assert watch.in_training == []
    assert kept.evaluate()["eval_loss"] == pytest.approx(run.evaluate()["eval_loss"], rel=1e-5)


def test_towers_run_once_a_pair(folder, tmp_path):
    data = pairs(70)  # two batches of 64
    model = adapted("clip", folder)
    watch = Watch(model)
    run = trainer(model, tmp_path, data, num_train_epochs=3)
    assert watch.both == (2, 2)
    run.train()
    run.evaluate(run.train_dataset)
    assert run.state.global_step == 27
    assert watch.both == (2, 2)
    again = trainer(model, tmp_path, data, num_train_epochs=1)  # its adapter has moved since
    assert watch.both == (2, 2)
    other = adapted("clip", folder, name="other", num_layers=2)
    with torch.no_grad():
        other.get_base_model().vision_model.post_layernorm.weight.add_(1.0)
    watch = Watch(other)
    reused = trainer(other, tmp_path, data, language="zh", num_train_epochs=1)
    reused.train()
    assert watch.both == (0, 0)
    for a, b in zip(run.train_dataset, reused.train_dataset, strict=True):
        assert np.array_equal(a["student"], b["student"])
        assert np.array_equal(a["teacher"], b["teacher"])
    assert len(again.train_dataset) == 70


def test_without_cache_towers_run_in_every_step(folder, tmp_path):
    model = adapted("clip", folder)
    watch = Watch(model)
    run = trainer(model, tmp_path, pairs(24), cache=False, num_train_epochs=3)
    assert watch.both == (0, 0)
    run.train()
    assert watch.both == (9, 10)  # the mean teacher vector is one more
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", [*CASES, "clip-cls", "clip-attention", "flava-left"])
def test_cached_training_is_uncached_training(name, folder, tmp_path):
    """The data is in the cache's order, and one batch."""
    changes = {"pool": name.partition("-")[2]} if name in ("clip-cls", "clip-attention") else {}
    family, data, options = case(name) if name in CASES else (name.partition("-")[0], pairs(), {})
    if name == "flava-left":
        zh = tokenizer("z", **ZH, padding_side="left")
        options["processor"] = LanguageProcessor(en=PROCESSOR.tokenizer("en"), zh=zh)
    found = []
    for cache in (True, False):
        model = adapted(family, folder, **changes)
        run = trainer(
            *(model, tmp_path, data),
            **{"cache": cache, "logging_steps": 1, "max_steps": 2, "per_device_train_batch_size": len(data), **options},
            **{
                "eval_dataset": pairs(10, seed=1),
                "per_device_eval_batch_size": 10,
                "train_sampling_strategy": "sequential",
            },
        )
        run.train()
        found.append((losses_of(run), run.evaluate()["eval_loss"]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5, abs=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5, abs=1e-5)


def test_half_the_space(folder, tmp_path):
    found = {}
    for dtype in ("float32", "float16"):
        model = adapted("flava", folder)
        run = trainer(model, tmp_path, pairs(), cache_dtype=dtype, num_train_epochs=2, logging_steps=1)
        row = run.train_dataset[0]
        assert row["student"].dtype == row["teacher"].dtype == np.dtype(dtype)
        run.train()
        found[dtype] = (losses_of(run), sum(len(row["student"].tobytes()) for row in run.train_dataset))
    assert found["float16"][0] == pytest.approx(found["float32"][0], rel=5e-3)
    assert found["float16"][0] != found["float32"][0]
    assert 2 * found["float16"][1] == found["float32"][1]


@pytest.mark.parametrize("family", ["clip", "siglip", "flava"])
def test_rows_are_the_towers_outputs(family, folder, tmp_path):
    model = adapted(family, folder)
    processor = SIGLIP if family == "siglip" else PROCESSOR
    data = random.Random(0).sample(pairs(70), 70)
    kept = trainer(model, tmp_path, data, processor=processor).train_dataset
    part, ordered = part_of(model), sorted(data, key=lambda pair: len(pair["target"]))
    for i in (0, 1, 30, 63, 64, 69):
        tokens = processor(ordered[i]["target"], language="zh")
        H = part.encode(tokens["input_ids"], tokens["attention_mask"].bool(), "zh")[0]
        pooled, E = part.teach(**processor.tokenize([ordered[i]["source"]], "en"))
        assert kept[i]["student"].shape == H.shape  # no padding
        torch.testing.assert_close(torch.from_numpy(kept[i]["student"].copy()), H, rtol=1e-5, atol=1e-5)
        expected = pooled if E is None else E[0]
        torch.testing.assert_close(torch.from_numpy(kept[i]["teacher"].copy()), expected, rtol=1e-5, atol=1e-5)
    vectors = part.teach(**processor.tokenize([pair["source"] for pair in ordered], "en")).pooled
    torch.testing.assert_close(kept.mean_teacher(), vectors.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept.mean_teacher(20), vectors[::3].mean(0), rtol=1e-5, atol=1e-5)


def test_kept_outputs_go_to_workers(folder, tmp_path):
    run = trainer(adapted("flava", folder), tmp_path, pairs(8, aligned=True))
    data, collator = pickle.loads(pickle.dumps((run.train_dataset, run.data_collator)))
    rows = [data[i] for i in (0, 7)]
    batch = collator(rows)
    expected = run.data_collator([run.train_dataset[i] for i in (0, 7)])
    assert batch["pairs"] == expected["pairs"]
    assert batch["pairs"][0]
    for name in ("student_states", "student_mask", "teacher_states", "teacher_mask"):
        assert torch.equal(batch[name], expected[name])
    assert batch["student_mask"].sum(1).tolist() == [len(row["student"]) for row in rows]
    assert not batch["student_states"][~batch["student_mask"]].any()


# ----------------------------------------------------------------------------------------------------------- the cache


@torch.no_grad()
def shift(parameter):
    parameter.flatten()[0].add_(1e-3)


def lowercase(processor):
    """The same vocabulary, other tokens."""
    from tokenizers import normalizers

    processor.tokenizers["zh"].backend_tokenizer.normalizer = normalizers.Replace("z1", "z2")


CHANGES = {
    "teacher": lambda model, data, p, o: shift(part_of(model).host().encoder.layers[1].mlp.fc2.bias),
    "encoder": lambda model, data, p, o: shift(next(iter(part_of(model).encoders.values())).encoder.layer[0].output.dense.weight),
    "source": lambda model, data, p, o: data[3].update(source="e29 e28"),
    "target": lambda model, data, p, o: data[3].update(target="z29 z28"),
    "swapped": lambda model, data, p, o: data.append(dict(data[0], source=data[1]["source"])),
    "fewer": lambda model, data, p, o: data.pop(),
    "padding": lambda model, data, p, o: setattr(p, "padding", {"en": "max_length"}),
    "max_length": lambda model, data, p, o: setattr(p, "max_length", {"zh": 4}),
    "own_limit": lambda model, data, p, o: setattr(p.tokenizer("zh"), "model_max_length", 4),
    "vocabulary": lambda model, data, p, o: p.tokenizers.update(zh=tokenizer("z", **{**ZH, "words": range(9, 40)})),
    "special_tokens": lambda model, data, p, o: p.tokenizers.update(zh=tokenizer("z", **{**ZH, "bos": None})),
    "normalizer": lambda model, data, p, o: lowercase(p),
    "dtype": lambda model, data, p, o: o.update(cache_dtype="float16"),
    "pairs": lambda model, data, p, o: data[3].update(pairs=[[1, 1]]),
}  # fmt: skip


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_what_makes_the_cache_anew(change, folder, tmp_path, filled):
    model, data, processor, options = adapted("clip", folder), pairs(12), copy.deepcopy(PROCESSOR), {}
    if change:
        CHANGES[change](model, data, processor, options)
    watch = Watch(model)
    shutil.copytree(filled, tmp_path / "cache")
    run = trainer(model, tmp_path, data, processor=processor, **options)
    assert watch.both == ((1, 1) if change else (0, 0))
    if change:  # what is kept is right
        fresh = trainer(model, tmp_path, data, processor=processor, cache_dir=tmp_path / "fresh", **options)
        for a, b in zip(run.train_dataset, fresh.train_dataset, strict=True):
            assert np.array_equal(a["student"], b["student"])
            assert np.array_equal(a["teacher"], b["teacher"])


@pytest.fixture(scope="module")
def filled(folder, tmp_path_factory):
    """A cache of 12 pairs."""
    tmp = tmp_path_factory.mktemp("filled")
    trainer(adapted("clip", folder), tmp, pairs(12))
    return tmp / "cache"


def test_texts_that_hold_the_keys_separators(folder, tmp_path):
    model = adapted("clip", folder)
    trainer(model, tmp_path, [{"source": "e1\x1fe2", "target": "z1"}, {"source": "e3", "target": "z3 z4 z5"}])
    watch = Watch(model)
    trainer(model, tmp_path, [{"source": "e1", "target": "e2\x1fz1"}, {"source": "e3", "target": "z3 z4 z5"}])
    assert watch.both == (1, 1)


@pytest.mark.parametrize("how", ["interrupt", "killed"])
def test_interrupted_filling_leaves_nothing_complete(how, folder, tmp_path):
    data = pairs(70)
    model = adapted("clip", folder)
    if how == "interrupt":
        watch = Watch(model, fail_at=2)
        with pytest.raises(KeyboardInterrupt):
            trainer(model, tmp_path, data)
        watch.fail_at = None
    else:  # as a killed process leaves it: the folder of an unfinished filling, with a part of the rows
        trainer(model, tmp_path, data)
        (file,) = (tmp_path / "cache").rglob("*.arrow")
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        file.parent.rename(file.parent.with_name(file.parent.name + ".incomplete"))
        watch = Watch(model)
    done = watch.both
    run = trainer(model, tmp_path, data)
    assert (watch.both[0] - done[0], watch.both[1] - done[1]) == (2, 2)
    clean = trainer(model, tmp_path, data, cache_dir=tmp_path / "clean")
    assert len(run.train_dataset) == 70
    for a, b in zip(run.train_dataset, clean.train_dataset, strict=True):
        assert np.array_equal(a["student"], b["student"])
        assert np.array_equal(a["teacher"], b["teacher"])


# ----------------------------------------------------------------------------------------------------------- bad input


def test_skips_are_counted_and_warned(folder, tmp_path):
    bad = [
        *({"source": "e1", "target": side} for side in (None, "", "  ", "\n\t")),
        *({"source": side, "target": "z1"} for side in (None, "", "  ")),
    ]
    data = [*bad[:4], *pairs(8), *bad[4:]]
    model = adapted("clip", folder)
    for cache in (True, False):
        with pytest.warns(UserWarning, match="7 of 15 train pairs have an empty side and are left out") as found:
            run = trainer(model, tmp_path, datasets.Dataset.from_list(data), eval_dataset=pairs(5), cache=cache)
        assert [w.filename for w in found if "empty side" in str(w.message)] == [__file__]
        assert run.skipped == {"train": 7, "eval": 0}
        assert len(run.train_dataset) == 8
    with pytest.warns(UserWarning, match="2 of 7 eval_b pairs"):
        run = trainer(model, tmp_path, pairs(8), eval_dataset={"a": pairs(5), "b": pairs(5) + bad[:2]})
    assert run.skipped == {"train": 0, "eval_a": 0, "eval_b": 2}
    assert {"eval_a_loss", "eval_b_loss"} <= run.evaluate().keys()


def streaming(rows):
    return datasets.Dataset.from_list(rows).to_iterable_dataset()


PAIR = {"source": "e1", "target": "z1"}


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "train data needs the columns 'source' and 'target'; no rows"),
        ([{"source": "", "target": "z1"}] * 3, "All 3 train pairs are empty"),
        ([{"source": "e1", "target": None}], "All 1 train pairs are empty"),
        ([PAIR] * 4, "All 4 train pairs are equal"),
        ([PAIR, PAIR, {"source": "e2", "target": " "}], "train pairs are equal"),
        ([{"en": "e1", "zh": "z1"}], r"columns 'source' and 'target'; row 0 has \['en', 'zh'\]"),
        ([{"source": "e1", "text": "z1"}], r"row 0 has \['source', 'text'\]"),
        ([PAIR, {"source": "e2"}], "target"),
    ],
    ids=["none", "empty", "empty_none", "equal", "equal_but_empty", "columns", "column", "column_later"],
)
@pytest.mark.filterwarnings("ignore:.*have an empty side")
def test_data_without_anything_to_learn(data, message, cache, folder_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(folder_model, tmp_path, data, cache=cache)


@pytest.fixture(scope="module")
def folder_model(folder):
    return adapted("clip", folder)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"language": "fr"}, ValueError, r"no tokenizer for 'fr', but for \['en', 'zh'\]"),
        ({"processor": LanguageProcessor(en=tokenizer("e", **EN))}, ValueError, "no tokenizer for 'zh'"),
        ({"processor": tokenizer("z", **ZH)}, TypeError, "must be a LanguageProcessor"),
        ({"processor": None}, TypeError, "must be a LanguageProcessor"),
        ({"cache_dtype": "bfloat16"}, ValueError, "'float32' or 'float16', got 'bfloat16'"),
        ({"loss": DistillationLoss(tokens=1.0)}, ValueError, "level='tokens'"),
        ({"loss": DistillationLoss(functional=1.0)}, ValueError, "level='tokens'"),
        ({"data": streaming(pairs(4))}, ValueError, "streams.*set cache=False"),
    ],
)
def test_options_that_do_not_fit(options, error, message, folder_model, tmp_path):
    options = {"data": pairs(4), **options}
    with pytest.raises(error, match=message):
        trainer(folder_model, tmp_path, **options)


def test_models_that_do_not_fit(folder, tmp_path):
    with pytest.raises(ValueError, match="The model has no language: get_peft_model"):
        trainer(bare("clip"), tmp_path, pairs(4))
    side = adapted("flava", folder, base=bare("flava").text_model, level="tokens")
    with pytest.raises(ValueError, match="needs the fusion encoder"):
        trainer(side, tmp_path, pairs(4), loss=FUNCTIONAL)
    model = two_adapters(folder)
    model.base_model.set_adapter(["zh", "ja"])
    with pytest.raises(ValueError, match=r"One adapter is trained at a time; active are \['zh', 'ja'\]"):
        trainer(model, tmp_path, pairs(4))


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (
            LanguageProcessor(en=tokenizer("e", **EN), zh=tokenizer("z", **{**ZH, "words": range(41, 60)})),
            "outside the 40 tokens of adapter 'zh'",
        ),
        (
            LanguageProcessor(en=tokenizer("e", **EN), zh=tokenizer("z", **ZH), max_length={"zh": 40}),
            "40 tokens, but the encoder of adapter 'zh' reads 24.*max_length=24",
        ),
    ],
    ids=["wrong_tokenizer", "too_long"],
)
def test_texts_that_the_encoder_can_not_read(processor, message, cache, folder, tmp_path):
    data = [PAIR, {"source": "e2", "target": "z2 " * 38}]
    with pytest.raises(ValueError, match=message):
        trainer(adapted("clip", folder), tmp_path, data, processor=processor, cache=cache, max_steps=1).train()


@pytest.mark.parametrize("cache", [True, False])
def test_aligned_tokens_beyond_a_text(cache, folder, tmp_path):
    """Its own text: that another of the batch is longer is no help."""
    data = [{**PAIR, "pairs": [[4, 1]]}, {"source": "e1 e2 e3 e4", "target": "z1 z2 z3 z4", "pairs": [[1, 1]]}]
    run = trainer(adapted("flava", folder), tmp_path, data, cache=cache, max_steps=1)
    with pytest.raises(ValueError, match=r"Pair \(4, 1\)"):
        run.train()


def test_a_text_of_no_tokens_is_no_nan(folder, tmp_path):
    """It isn't empty, but its tokenizer knows no special tokens and drops the rest."""
    from tokenizers import normalizers

    zh = tokenizer("z", **ZH)
    zh.backend_tokenizer.post_processor = None
    zh.backend_tokenizer.normalizer = normalizers.Replace("z0", "")
    processor = LanguageProcessor(en=PROCESSOR.tokenizer("en"), zh=zh)
    data = [{"source": "e0", "target": "z0"}, PAIR, {"source": "e1 e2", "target": "z1 z2"}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run = trainer(adapted("flava", folder), tmp_path, data, processor=processor, max_steps=1, logging_steps=1)
            run.train()
        except ValueError as error:
            assert "token" in str(error)  # noqa: PT017
        else:
            assert math.isfinite(losses_of(run)[0])


# ------------------------------------------------------------------------------------------------------------- Trainer


@pytest.mark.parametrize("name", ["clip", "flava-pairs-functional"])
def test_data_that_streams(name, folder, tmp_path):
    family, data, options = case(name)
    model = adapted(family, folder)
    run = trainer(
        *(model, tmp_path, streaming(data)),
        **{"cache": False, "max_steps": 12, "eval_dataset": pairs(10, seed=1), **options},
    )
    first = run.evaluate()["eval_loss"]
    run.train()
    assert run.state.global_step == 12
    assert run.evaluate()["eval_loss"] < 0.9 * first


def test_streamed_pairs_with_an_empty_side(folder, tmp_path):
    """Left out and counted, or an error that says which."""
    data = [*pairs(8), {"source": "e1", "target": " "}]
    run = trainer(adapted("clip", folder), tmp_path, streaming(data), cache=False, max_steps=4)
    try:
        run.train()
    except ValueError as error:
        assert "is empty" in str(error)  # noqa: PT017
    else:
        assert sum(run.skipped.values()) > 0


RESUMED = {
    "clip": ("zh", {}),
    "clip-uncached": ("default", {"cache": False, "language": "zh"}),
    "flava-functional": ("zh", {"loss": FUNCTIONAL}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_is_uninterrupted(name, folder, tmp_path):
    adapter_name, options = RESUMED[name]
    settings = {"num_train_epochs": 2, "save_strategy": "epoch", "logging_steps": 1, **options}
    whole = adapted(name.partition("-")[0], folder, name=adapter_name)
    run = trainer(whole, tmp_path, pairs(), **settings)
    run.train()
    again = adapted(name.partition("-")[0], folder, name=adapter_name)
    resumed = trainer(again, tmp_path, pairs(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert resumed.state.global_step == run.state.global_step == 6
    torch.testing.assert_close(adapter_of(again, adapter_name), adapter_of(whole, adapter_name), rtol=0, atol=0)
    assert losses_of(resumed) == pytest.approx(losses_of(run), rel=1e-6)


@pytest.mark.parametrize("name", ["default", "zh"])
def test_checkpoints_hold_the_adapter_alone(name, folder, tmp_path):
    model = adapted("clip", folder, name=name)
    run = trainer(model, tmp_path, pairs(8), language="zh", max_steps=1, save_strategy="steps", save_steps=1)
    run.train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    place = checkpoint if name == "default" else checkpoint / name
    weights = [p for p in checkpoint.rglob("*") if p.suffix in (".safetensors", ".bin", ".pt", ".pth", ".arrow")]
    assert {p.relative_to(checkpoint).as_posix() for p in weights} == {
        (place / "adapter_model.safetensors").relative_to(checkpoint).as_posix(),
        *("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"),
    }
    with safe_open(place / "adapter_model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    own = adapter_of(model, name)
    assert {key.rpartition("cross_lingual_adapter_language.")[2] for key in stored} == set(own)
    assert len(stored) == len(own)
    assert {p.relative_to(place).as_posix() for p in place.glob("tokenizer/*.json")} >= {"tokenizer/tokenizer.json"}
    processor = LanguageProcessor.from_pretrained(checkpoint)
    assert processor.languages == ["en", "zh"]
    for language, text in (("en", "e1 e2"), ("zh", "z1 z2")):
        expected = PROCESSOR([text], language=language)
        assert torch.equal(processor([text], language=language)["input_ids"], expected["input_ids"])
    loaded = PeftModel.from_pretrained(bare("clip"), place, adapter_name=name)
    inputs = processor(["z1 z2"], language="zh")  # which knows the language's adapter
    with torch.no_grad():
        found, expected = (m.eval().get_text_features(**inputs).pooler_output for m in (loaded, model))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["default", "zh"])
def test_the_best_model_is_loaded_at_the_end(name, folder, tmp_path):
    scores = iter([1.0, 3.0, 2.0, 0.0, 0.0])
    model = adapted("clip", folder, name=name)
    run = trainer(
        *(model, tmp_path, pairs()),
        **{"eval_dataset": pairs(10, seed=1), "language": "zh", "num_train_epochs": 3, "save_strategy": "epoch"},
        **{"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "score"},
        compute_metrics=lambda found: {"score": next(scores)},
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-6")
    assert run.evaluate()["eval_loss"] == pytest.approx(losses_of(run, "eval_loss")[1], rel=1e-6)


@pytest.mark.parametrize("family", ["clip", "flava"])
@pytest.mark.parametrize("cache", [True, False])
def test_metrics_get_both_vectors(family, cache, folder, tmp_path):
    model, data, found = adapted(family, folder), pairs(20), []
    run = trainer(
        *(model, tmp_path),
        **{"data": pairs(4), "eval_dataset": data, "cache": cache},
        compute_metrics=lambda p: found.append((p.predictions, p.label_ids)) or {"count": len(p.predictions)},
    )
    assert run.evaluate()["eval_count"] == 20
    part = part_of(model)
    source, target = (PROCESSOR.tokenize([pair[side] for pair in data], name) for side, name in
                      (("source", "en"), ("target", "zh")))  # fmt: skip
    with torch.no_grad():
        e = part.teach(**source).pooled
        mask = target["attention_mask"].bool()
        y = part.project(part.encode(target["input_ids"], mask, "zh"), mask, "zh")[1]
    for got, expected in zip(found[0], (y, e), strict=True):
        assert got.shape == (20, 32)
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-5)
    predicted = run.predict(data)  # rows as they are, in their order
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), y, rtol=1e-4, atol=1e-5)
    assert "test_loss" in predicted.metrics


@pytest.mark.parametrize("name", ["flava-functional", "clip"])
def test_evaluation_says_the_same_twice(name, folder, tmp_path):
    family, data, options = case(name)
    run = trainer(adapted(family, folder), tmp_path, eval_dataset=data, **options)
    assert run.evaluate()["eval_loss"] == run.evaluate()["eval_loss"]


def test_evaluation_leaves_training_alone(folder, tmp_path):
    found = []
    for strategy in ("no", "epoch"):
        model = adapted("flava", folder)
        options = {"loss": FUNCTIONAL, "num_train_epochs": 2, "eval_strategy": strategy}
        trainer(model, tmp_path, pairs(16), eval_dataset=pairs(8, seed=1), **options).train()
        found.append(copies(adapter_of(model)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("family", ["clip", "flava"])
def test_the_bias_starts_at_the_mean_teacher_vector(family, cache, folder, tmp_path):
    model, data = adapted(family, folder), pairs()
    run = trainer(model, tmp_path, data, cache=cache, learning_rate=0.0, max_steps=1)
    assert not adapter_of(model)["up.bias"].any()
    run.train()
    mean = part_of(model).teach(**PROCESSOR.tokenize([pair["source"] for pair in data], "en")).pooled.mean(0)
    torch.testing.assert_close(adapter_of(model)["up.bias"].detach(), mean, rtol=1e-4, atol=1e-5)
    trainer(model, tmp_path, pairs(seed=5), cache=cache, learning_rate=0.0, max_steps=1).train()
    torch.testing.assert_close(adapter_of(model)["up.bias"].detach(), mean, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(bare(family), tmp_path / "saved" / "zh", adapter_name="zh", is_trainable=True)
    trainer(loaded, tmp_path, pairs(seed=6), cache=cache, learning_rate=0.0, max_steps=1).train()
    torch.testing.assert_close(adapter_of(loaded)["up.bias"].detach(), mean, rtol=1e-4, atol=1e-5)


def one_step(folder, tmp, data, **options):
    """The adapter after one step of SGD."""
    model = adapted("clip", folder)
    sgd = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 1.0, "max_steps": 1, "max_grad_norm": 0.0}
    run = trainer(model, tmp, data, loss=DistillationLoss(contrastive=0.0), **sgd, **options)
    start = copies(adapter_of(model))
    run.train()
    assert run.state.global_step == 1
    found = copies(adapter_of(model))
    assert all((found[n] - start[n]).abs().max() > 0 for n in found)
    return found


@pytest.mark.parametrize("cache", [True, False])
def test_gradient_accumulation_is_the_big_batch(cache, folder, tmp_path):
    once = one_step(folder, tmp_path, pairs(), per_device_train_batch_size=24, cache=cache)
    many = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}
    torch.testing.assert_close(one_step(folder, tmp_path, pairs(), cache=cache, **many), once, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "cache"), [("clip", True), ("flava-functional", False), ("flava-pairs", True)])
def test_mixed_precision(name, cache, folder, tmp_path):
    family, data, options = case(name)
    model, dtypes = adapted(family, folder), []
    part_of(model).cross_lingual_adapter_language["zh"].blocks[0].qkv.register_forward_hook(
        lambda m, args, out: dtypes.append(out.dtype)
    )
    run = trainer(
        *(model, tmp_path, data),
        **{"eval_dataset": data, "bf16": True, "num_train_epochs": 4, "cache": cache, **options},
    )
    first = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.8 * first
    assert set(dtypes) == {torch.bfloat16}
    assert {p.dtype for p in adapter_of(model).values()} == {torch.float32}


@pytest.mark.parametrize(("name", "cache"), [("clip", True), ("flava", False), ("flava-functional", True)])
def test_a_base_in_bfloat16(name, cache, folder, tmp_path):
    family, data, options = case(name)
    model = adapted(family, folder, base=bare(family).bfloat16())
    run = trainer(model, tmp_path, data, eval_dataset=data, num_train_epochs=4, cache=cache, **options)
    first = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.8 * first


def test_one_of_two_adapters_trains(folder, tmp_path):
    model = two_adapters(folder)
    for name, other in (("zh", "ja"), ("ja", "zh")):
        model.set_adapter(name)
        before, start = frozen(model, name), copies(adapter_of(model, name))
        trainer(model, tmp_path, pairs(8), language="zh", max_steps=3).train()
        after = frozen(model, name)
        assert any(f".{other}." in n for n in after)
        assert all(torch.equal(after[n], before[n]) for n in before)
        assert all((p - start[n]).abs().max() > 0 for n, p in adapter_of(model, name).items())
    assert len(part_of(model).encoders) == 1


def test_rows_of_one_of_two_adapters_train_it_alone(folder):
    model = two_adapters(folder)
    processor = LanguageProcessor(**PROCESSOR.tokenizers, ja=PROCESSOR.tokenizer("zh"))
    model.train()
    batch = processor(["z1 z2", "e1", "z3", "z4"], language=["zh", "en", "zh", "ja"])
    out = model.get_text_features(**batch).pooler_output
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter_of(model, "zh").values())
    trained = {id(p) for p in adapter_of(model, "zh").values()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)


def test_the_text_side_alone_trains_the_same_adapter(folder, tmp_path):
    models = [adapted(family, folder) for family in ("clip", "clip_text")]
    for model in models:
        run = trainer(model, tmp_path, pairs(), num_train_epochs=2)
        run.train()
    torch.testing.assert_close(*(adapter_of(model) for model in models), rtol=1e-5, atol=1e-6)
    models[1].save_pretrained(tmp_path / "saved")
    whole = PeftModel.from_pretrained(bare("clip"), tmp_path / "saved" / "zh", adapter_name="zh").eval()
    inputs = PROCESSOR(["z1 z2", "z3"], language="zh")
    with torch.no_grad():
        found = whole.get_text_features(**inputs).pooler_output
        side, expected = models[1].eval()(**inputs).text_embeds, models[0].eval().get_text_features(**inputs)
    torch.testing.assert_close(found, side)
    torch.testing.assert_close(found, expected.pooler_output, rtol=1e-4, atol=1e-5)


def test_arguments_are_kept(folder, tmp_path):
    args = arguments(
        tmp_path / "out",
        **{"warmup_steps": 3, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "seed": 7, "logging_steps": 5},
        **{"gradient_accumulation_steps": 2, "save_total_limit": 2, "dataloader_num_workers": 1, "bf16": True},
        **{"accelerator_config": {"split_batches": True}, "eval_strategy": "steps", "optim": "sgd"},
    )
    before = args.to_dict()
    run = trainer(adapted("clip", folder), tmp_path, pairs(8), eval_dataset=pairs(4), args=args)
    assert run.args is args  # what is changed later, or hung on it, arrives
    assert args.to_dict() == before


def test_data_sets_of_any_kind(folder, tmp_path):
    """Further columns do no harm, and rows come as a list, a data set or a torch one."""

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return pairs(8)[index]

    model = adapted("clip", folder)
    rows = [{"id": i, **pair} for i, pair in enumerate(pairs(8))]
    expected = None
    for data in (pairs(8), datasets.Dataset.from_list(rows), Rows()):
        evaluated = trainer(model, tmp_path, eval_dataset=data).evaluate()["eval_loss"]
        expected = expected or evaluated
        assert evaluated == expected


# ------------------------------------------------------------------------------------------------------- two processes


def one_rank(rank, tmp, folder, port):
    """Trains in turn what `test_two_processes` looks at, as one of two processes."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", **where)
    AcceleratorState._reset_state(reset_partial_state=True)  # a fork has its parent's
    torch.set_num_threads(1)
    found = {}
    for name, cache in (("clip", True), ("flava-pairs-functional", True), ("stream", False)):
        family, data, options = case("clip" if name == "stream" else name)
        options = {"loss": DistillationLoss(contrastive=0.0), **options}
        model = adapted(family, folder)
        watch, before = Watch(model), frozen(model, "zh")
        run = trainer(
            *(model, tmp, streaming(data) if name == "stream" else data),
            **{"eval_dataset": pairs(11, seed=1), "cache": cache, "max_steps": 4, "eval_on_start": True},
            **{"per_device_train_batch_size": 12, "ddp_backend": "gloo", "ddp_find_unused_parameters": False},
            accelerator_config={"dispatch_batches": False},  # batches of a stream differ in length
            compute_metrics=lambda p: {"shape": list(p.predictions.shape)},
            **options,
        )
        assert run.args.world_size == 2
        calls = watch.both
        run.train()  # evaluate() before it would keep transformers' Trainer from averaging gradients
        run.evaluate()
        assert all(torch.equal(v, before[n]) for n, v in frozen(model, "zh").items())
        torch.save(copies(adapter_of(model)), tmp / f"{name}-{rank}.pt")
        found[name] = {"calls": calls, "loss": losses_of(run, "eval_loss"), "shape": losses_of(run, "eval_shape")}
    (tmp / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_two_processes(folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A fork has imported everything, but can't take autograd's threads of an accelerator along.
    context = multiprocessing.get_context("spawn" if torch.accelerator.is_available() else "fork")
    ranks = [context.Process(target=one_rank, args=(rank, tmp_path, folder, port)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(timeout=120)
        assert [rank.exitcode for rank in ranks] == [0, 0], "its traceback stands in the captured stderr"
    finally:
        for rank in ranks:
            rank.kill()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first.keys() == second.keys()
    for name, found in first.items():
        a, b = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert found["loss"] == second[name]["loss"]
        assert found["loss"][-1] < found["loss"][0]
        assert found["shape"] == second[name]["shape"] == [[11, 32]] * 2
    for name in ("clip", "flava-pairs-functional"):  # one fills, train and eval, and the other waits and reads
        calls = [rank[name]["calls"] for rank in (first, second)]
        assert [sum(side) for side in zip(*calls, strict=True)] == [2, 2]
    model = adapted("clip", folder)
    options = {"loss": DistillationLoss(contrastive=0.0), "max_steps": 4, "per_device_train_batch_size": 24}
    trainer(model, tmp_path, pairs(), **options).train()
    for name in ("clip", "stream"):  # two halves of a batch are the batch
        found = torch.load(tmp_path / f"{name}-0.pt")
        torch.testing.assert_close(found, copies(adapter_of(model)), rtol=1e-3, atol=1e-4)


def test_names_are_exported():
    from peft_multimodal import training

    assert {"CrossLingualTrainer", "DistillationLoss"} <= set(training.__all__)
    assert Path(ds.__file__).parent.name == "distillation"
