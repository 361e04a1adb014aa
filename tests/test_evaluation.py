"""evaluation.py against slow oracles."""

from __future__ import annotations

import random
import socket

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from peft_multimodal import evaluation as ev
from peft_multimodal.training.losses import retrieval_embeddings


def slow_rank(scores, query_id, gallery_ids):
    """Sort with the matches last among equals; the position of the first match among the items that don't match."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], gallery_ids[j] == query_id))
    return [gallery_ids[j] == query_id for j in order].index(True) + 1


@st.composite
def pools(draw):
    """Images and texts of up to 6 concepts, each concept on both sides, with ties (few distinct embeddings)."""
    concepts = draw(st.integers(1, 6))
    sides = []
    for _ in range(2):
        ids = [*range(concepts), *draw(st.lists(st.integers(0, concepts - 1), max_size=6))]
        vector = st.tuples(*[st.sampled_from([-1.0, 0.5, 2.0])] * 2)
        sides.append((torch.tensor(draw(st.lists(vector, min_size=len(ids), max_size=len(ids)))), ids))
    return sides


@given(pools(), st.integers(1, 4))
def test_recall_is_the_oracles(pool, chunk):
    (images, image_ids), (texts, text_ids) = pool
    cosine = torch.nn.functional.normalize(images.double()) @ torch.nn.functional.normalize(texts.double()).T
    cosine = (cosine * 1e8).round() / 1e8
    i2t = [slow_rank(row.tolist(), i, text_ids) for row, i in zip(cosine, image_ids, strict=True)]
    t2i = [slow_rank(row.tolist(), i, image_ids) for row, i in zip(cosine.T, text_ids, strict=True)]
    assert ev.embedding_ranks(images, texts, image_ids, text_ids, chunk).tolist() == i2t
    assert ev.retrieval_ranks(cosine.T, text_ids, image_ids).tolist() == t2i
    recall = ev.retrieval_recall(images, texts, image_ids, text_ids, ks=(1, 2, 30))
    for k in (1, 2, 30):
        assert recall[f"i2t_r@{k}"] == pytest.approx(100 * np.mean([r <= k for r in i2t]))
        assert recall[f"t2i_r@{k}"] == pytest.approx(100 * np.mean([r <= k for r in t2i]))
    assert recall["i2t_r@1"] <= recall["i2t_r@2"] <= recall["i2t_r@30"] == 100
    assert all(0 <= value <= 100 for value in recall.values())
    assert recall["mean_recall"] == pytest.approx(np.mean([v for k, v in recall.items() if k != "mean_recall"]))


@given(pools(), st.randoms())
def test_the_order_of_the_gallery_is_of_no_matter(pool, rng):
    (images, image_ids), (texts, text_ids) = pool
    order = list(range(len(texts)))
    rng.shuffle(order)
    shuffled = ev.retrieval_recall(images, texts[order], image_ids, [text_ids[j] for j in order])
    assert shuffled == pytest.approx(ev.retrieval_recall(images, texts, image_ids, text_ids))


def test_constant_embeddings_earn_nothing():
    ones = torch.ones(37, 19)
    assert set(ev.retrieval_recall(ones, ones, ks=(1, 5)).values()) == {0.0}
    assert ev.retrieval_ranks(torch.zeros(4, 4)).tolist() == [4] * 4


def test_defaults_and_kinds_of_ids():
    embeds = torch.eye(4)
    assert ev.retrieval_recall(embeds, 3 * embeds)["mean_recall"] == 100
    assert ev.retrieval_recall(embeds, embeds, list("abcd"), tuple("abcd"), ks=[1])["i2t_r@1"] == 100
    assert ev.retrieval_recall(embeds, embeds, torch.arange(4), np.arange(4))["mean_recall"] == 100
    assert ev.retrieval_ranks(np.eye(3, dtype=int)).tolist() == [1, 1, 1]
    assert ev.retrieval_ranks(torch.tensor([[-torch.inf, 1.0]]), [0], [0, 1]).tolist() == [2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: ev.retrieval_recall(e, e, [0, 1, 2], [0, 1, 1]), r"ids: \[2\]"),
        (lambda e: ev.retrieval_recall(e, e[:2]), "pass the ids"),
        (lambda e: ev.retrieval_recall(e, e, [0, 1, 2]), "both sides"),
        (lambda e: ev.retrieval_recall(e, e, [0, 1], [0, 1, 2]), "ids were given"),
        (lambda e: ev.retrieval_recall(e * torch.nan, e), "NaN"),
        (lambda e: ev.retrieval_ranks(e * torch.nan), "NaN"),
        (lambda e: ev.retrieval_recall(e, e, ks=(0,)), "k >= 1"),
        (lambda e: ev.retrieval_recall(e[0], e[0]), "shape"),
        (lambda e: ev.rerank_recall(e, e, lambda i, t: i * 0.0, candidates=2, ks=(3,)), "candidates=2"),
        (lambda e: ev.rerank_recall(e, e, lambda i, t: torch.zeros(1), ks=(3,)), "score gave shape"),
        (lambda e: ev.vqa_accuracy([], []), "no predictions"),
        (lambda e: ev.vqa_accuracy(["a"], [[]]), "no reference"),
        (lambda e: ev.vqa_accuracy(["a"], []), "shorter|longer"),
        (lambda e: ev.bootstrap_error([1.0]), "at least 2"),
        (lambda e: ev.bootstrap_error([1.0, 2.0], groups=["x", "x"]), "at least 2"),
        (lambda e: ev.bootstrap_error([1.0, float("nan")]), "finite"),
        (lambda e: ev.paired_bootstrap([1.0, 2.0], [1.0]), "not paired"),
        (lambda e: ev.retention(50.0, 0.0), "positive"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.eye(3))


def test_rerank_is_the_oracles():
    torch.manual_seed(0)
    images, texts = torch.randn(9, 4), torch.randn(14, 4)
    image_ids, text_ids = [*range(7), 0, 1], [*range(7)] * 2
    pair_scores = torch.randn(9, 14)
    cosine = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T
    seen = []

    def score(image, text):
        assert image.shape == text.shape
        seen.append(len(image))
        return pair_scores[image, text]

    recall = ev.rerank_recall(images, texts, score, image_ids, text_ids, (1, 3), candidates=5, similarity_weight=0.5)
    assert seen == [5] * (9 + 14)
    for side, cos, scores, queries, items in (
        ("i2t", cosine, pair_scores, image_ids, text_ids),
        ("t2i", cosine.T, pair_scores.T, text_ids, image_ids),
    ):
        ranks = []
        for q, query in enumerate(queries):
            final = [-float("inf")] * len(items)
            for j in sorted(range(len(items)), key=lambda j: -cos[q, j])[:5]:
                final[j] = (scores[q, j] + 0.5 * cos[q, j]).item()
            ranks.append(slow_rank(final, query, items))
        for k in (1, 3):
            assert recall[f"{side}_r@{k}"] == pytest.approx(100 * np.mean([r <= k for r in ranks]))
    everything = ev.rerank_recall(images, texts, lambda i, t: cosine[i, t], image_ids, text_ids)
    assert everything == pytest.approx(ev.retrieval_recall(images, texts, image_ids, text_ids))


# ------------------------------------------------------------------------------------------------------------ answers


def slow_vqa(prediction, answers):
    """The evaluation server's rule: leave each human out, min(matches among the rest / 3, 1), average."""
    scores = []
    for i in range(len(answers)):
        rest = answers[:i] + answers[i + 1 :]
        scores.append(min(1, rest.count(prediction) / 3))
    return sum(scores) / len(scores)


@given(st.lists(st.sampled_from(["yes", "no", "red"]), min_size=2, max_size=10))
def test_vqa_rule(answers):
    assert ev.vqa_accuracy(["yes"], [answers]) == pytest.approx(100 * slow_vqa("yes", answers))


@pytest.mark.parametrize(
    ("prediction", "answer", "same"),
    [
        ("The cat.", "cat", True),
        ("two", "2", True),
        ("don't", "dont", True),
        ("1,000", "1000", True),
        ("1.5", "15", False),
        ("t-shirt", "T shirt", True),
        ("red, green", "red green", True),
        ("红色。", "红色", True),
        ("a", "the", False),
        ("an apple", "apples", False),
        ("50%", "50", False),
    ],
)
def test_vqa_normalisation(prediction, answer, same):
    assert ev.vqa_accuracy([prediction], [answer]) == ev.vqa_accuracy([prediction], [[answer]]) == 100 * same


# ------------------------------------------------------------------------------------------------------------- errors


def test_bootstrap_agrees_with_theory_and_with_a_slow_loop():
    rng = np.random.default_rng(1)
    values = rng.normal(size=400)
    found = ev.bootstrap_error(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(values.std() / 20, rel=0.05)
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.standard_error, rel=0.05)

    groups = rng.integers(0, 30, size=400)  # a shared effect makes items of a group alike
    values = values + rng.normal(size=30)[groups]
    clusters = [values[groups == g] for g in np.unique(groups)]
    py = random.Random(0)
    means = [np.concatenate(py.choices(clusters, k=len(clusters))).mean() for _ in range(4000)]
    clustered = ev.bootstrap_error(values, groups)
    assert clustered.standard_error == pytest.approx(np.std(means), rel=0.05)
    assert clustered.low == pytest.approx(np.percentile(means, 2.5), abs=0.1 * np.std(means))
    assert clustered.standard_error > 1.5 * ev.bootstrap_error(values).standard_error
    one_each = ev.bootstrap_error(values, [f"item {i}" for i in range(400)])
    assert one_each == ev.bootstrap_error(values)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), min_size=4, max_size=30), st.integers(0, 9))
def test_paired_bootstrap_is_antisymmetric(items, seed):
    a, b, groups = zip(*items, strict=True)
    groups = ["x", "y", *groups[2:]]
    one = ev.paired_bootstrap(a, b, groups, samples=501, seed=seed)
    other = ev.paired_bootstrap(b, a, groups, samples=501, seed=seed)
    assert one.difference == pytest.approx(np.mean(a) - np.mean(b))
    assert one.difference == pytest.approx(-other.difference)
    assert one.standard_error == pytest.approx(other.standard_error)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert one == ev.paired_bootstrap(a, b, groups, samples=501, seed=seed)
    same = ev.paired_bootstrap(a, a, groups, samples=501)
    assert (same.difference, same.standard_error, same.low, same.high) == (0, 0, 0, 0)


def test_retention():
    assert ev.retention(45.0, 60.0) == 75


# ------------------------------------------------------------------------------------------------------------ metrics


@pytest.fixture
def offline(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return str(tmp_path)


def test_metrics_work_offline(offline):
    torch.manual_seed(0)
    images, texts, concepts = torch.randn(6, 4), torch.randn(6, 4), list("aabbcd")
    metric = ev.RetrievalRecall(cache_dir=offline)
    for rows in torch.arange(6).split(4):
        metric.add_batch(predictions=images[rows], references=texts[rows])
    expected = ev.retrieval_recall(images, texts, concepts, concepts, ks=(1, 2))
    assert metric.compute(image_ids=concepts, text_ids=concepts, ks=(1, 2)) == pytest.approx(expected)
    metric.add_batch(predictions=images.numpy(), references=texts.numpy())  # it starts anew
    assert metric.compute() == pytest.approx(ev.retrieval_recall(images, texts))

    metric = ev.VQAAccuracy(cache_dir=offline)
    metric.add_batch(predictions=["yes", "a dog"], references=[["yes", "yes", "no", "yes", "yes"], ["dog"]])
    metric.add(prediction="2", reference=["three"])
    assert metric.compute() == {"accuracy": pytest.approx(200 / 3)}
    assert metric.compute(predictions=["2", "no"], references=["two", "yes"]) == {"accuracy": 50.0}


# --------------------------------------------------------------------------------------------------------- embeddings


def rows(family):
    """The family's batch as a dataset of three rows, and the collator that puts rows together again."""
    batch = FAMILIES[family].inputs()
    dataset = [{k: v[i] for k, v in batch.items()} for i in range(3)]
    return batch, dataset, lambda rows: {k: torch.stack([row[k] for row in rows]) for k in rows[0]}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("family", ["clip", "siglip", "chinese_clip", "vision_text_dual_encoder"])
def test_embeddings_are_those_of_forward(family, wrapped):
    batch, dataset, collate = rows(family)
    model = FAMILIES[family].build()
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.eval()
    with torch.no_grad():
        expected = model(**batch)
    model.train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.LayerNorm))
    frozen.eval()
    found = ev.compute_embeddings(model, dataset, lambda r: collate(r) | {"return_loss": True}, 2, progress=False)
    assert model.training
    assert not frozen.training
    for side in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(found[side], expected[side])
        assert not found[side].requires_grad


def test_embeddings_of_one_side_and_errors(capfd):
    _, dataset, collate = rows("clip")
    model = FAMILIES["clip"].build().train()
    only = [{"pixel_values": row["pixel_values"]} for row in dataset]
    assert set(ev.compute_embeddings(model, only, collate, 2)) == {"image_embeds"}
    assert "Embedding" in capfd.readouterr().err
    with pytest.raises(ValueError, match="language"):
        ev.compute_embeddings(model, dataset, lambda r: collate(r) | {"language": ["zh"]}, progress=False)
    assert model.training
    with pytest.raises(TypeError, match="encode="):
        ev.compute_embeddings(FAMILIES["blip_retrieval"].build(), dataset, collate, progress=False)


def test_embeddings_of_a_retrieval_model():
    batch, dataset, collate = rows("blip_retrieval")
    model = FAMILIES["blip_retrieval"].build()
    found = ev.compute_embeddings(model, dataset, collate, 3, progress=False, encode=retrieval_embeddings)
    with torch.no_grad():
        cosines = model(**batch, use_itm_head=False).itm_score
    torch.testing.assert_close(found["image_embeds"] @ found["text_embeds"].T, cosines)
