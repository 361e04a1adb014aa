"""The bank of difficulties and the samplers, against slow and obvious versions."""

from __future__ import annotations

import copy
import itertools
import json
import tracemalloc

import numpy as np
import pytest
import torch
import transformers as hf
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file

from peft_multimodal import ContrastiveTrainer, HardSampleBank, ImageTextCollator
from peft_multimodal.training import HardSampleSampler, HardSampling, SumTree, weighted_order
from peft_multimodal.training.hard_samples import (
    FILE,
    FeatureQueue,
    SampleIds,
    difficulties,
    hash_ids,
    read_ids,
    stack_rows,
    unique_keys,
)
from peft_multimodal.training.hard_samples.draws import distinct
from peft_multimodal.training.losses import text_keys
from peft_multimodal.training.temperature import logit_scale

# 0.1 % of right samplers would fail at this quantile; the seeds are fixed.
QUANTILE = 3.09


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Standard score of Pearson's statistic (Wilson and Hilferty 1931); expected counts must not be small."""
    assert expected.min() > 5
    df = len(counts) - 1
    x = ((counts - expected) ** 2 / expected).sum()
    return ((x / df) ** (1 / 3) - (1 - 2 / (9 * df))) / np.sqrt(2 / (9 * df))


def bank_of(difficulty, **settings) -> HardSampleBank:
    bank = HardSampleBank(list(range(len(difficulty))), **settings)
    bank.difficulty[:] = difficulty
    bank.base_difficulty[:] = difficulty
    bank.start_epoch()
    return bank


# -------------------------------------------------------------------------------------------------------- the sum tree


@pytest.mark.parametrize("size", [1, 7, 64, 65, 500, 5000])
def test_the_tree_draws_by_weight(size: int):
    rng = np.random.default_rng(size)
    weights = rng.random(size) + 0.05
    weights[rng.random(size) < 0.2] = 0
    weights[0] = 1
    tree = SumTree(weights)
    drawn = np.bincount(tree.draw(100 * size, rng), minlength=size)
    assert len(drawn) == size
    assert not drawn[weights == 0].any()
    has = weights > 0
    if has.sum() > 1:
        assert chi_square(drawn[has], 100 * size * weights[has] / weights.sum()) < QUANTILE


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_changed_tree_is_a_new_one(data):
    """Changes leave the sums as if the tree had been made of the changed weights: to the bit, so that restarts agree."""
    size = data.draw(st.integers(1, 300))
    weights = np.array(data.draw(st.lists(st.floats(0, 1e4, width=32), min_size=size, max_size=size)), np.float32)
    tree = SumTree(weights)
    for _ in range(3):
        rows = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))))
        weights[rows] = data.draw(st.lists(st.floats(0, 1e4, width=32), min_size=len(rows), max_size=len(rows)))
        tree.set(rows, weights[rows])
    fresh = SumTree(weights)
    assert all(np.array_equal(a, b) for a, b in zip(tree.levels, fresh.levels, strict=True))
    assert tree.total == pytest.approx(weights.sum(dtype=np.float64))


def test_the_tree_is_small():
    tree = SumTree(np.ones(1_000_003, np.float32))
    assert tree.nbytes <= 8 * len(tree)
    assert tree.nbytes <= 4.2 * len(tree)


# ---------------------------------------------------------------------------------------------- without replacement


def first_orders(weights: np.ndarray, count: int) -> dict[tuple[int, ...], float]:
    """The exact probability of each sequence of `count` successive draws without replacement."""
    p, result = weights / weights.sum(), {}
    for sequence in itertools.permutations(range(len(weights)), count):
        left, probability = 1.0, 1.0
        for i in sequence:
            probability *= p[i] / left
            left -= p[i]
        result[sequence] = probability
    return result


def check_orders(draw, weights: np.ndarray, count: int = 2, trials: int = 20_000) -> None:
    exact = first_orders(weights, count)
    seen = dict.fromkeys(exact, 0)
    for _ in range(trials):
        seen[tuple(int(i) for i in draw())] += 1
    expected = np.array(list(exact.values())) * trials
    assert chi_square(np.array(list(seen.values())), expected) < QUANTILE


WEIGHTS = np.array([4.0, 1.0, 2.0, 0.5, 1.5])


def test_the_race_is_successive_drawing():
    rng = np.random.default_rng(0)
    check_orders(lambda: weighted_order(lambda part: WEIGHTS[part], 5, 2, rng), WEIGHTS)


def test_distinct_draws_are_successive_drawing():
    rng, tree = np.random.default_rng(1), SumTree(WEIGHTS)
    check_orders(lambda: distinct(lambda n: tree.draw(n, rng), 2), WEIGHTS, trials=5_000)


@pytest.mark.parametrize("size", [5, 40], ids=["race", "tree"])
def test_the_bank_draws_by_its_probabilities(size: int):
    """Both ways of drawing: the first of a batch by P, the others by P of those that are left."""
    rng = np.random.default_rng(2)
    bank = bank_of(rng.random(size), emphasis="power", alpha=2.0, eta=0.7, guard_share=0)
    q = (bank.difficulty.astype(np.float64) + 0.01) ** 2
    exact = 0.3 / size + 0.7 * q / q.sum()
    np.testing.assert_allclose(bank.probabilities(slice(None)), exact, rtol=1e-5)
    pairs = np.array([bank.draw(2, rng) for _ in range(20_000)])
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert chi_square(np.bincount(pairs[:, 0], minlength=size), 20_000 * exact) < QUANTILE
    second = [sum(exact[i] * exact[j] / (1 - exact[i]) for i in range(size) if i != j) for j in range(size)]
    assert chi_square(np.bincount(pairs[:, 1], minlength=size), 20_000 * np.array(second)) < QUANTILE


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 200), data=st.data())
def test_orders_have_no_pair_twice(size: int, data):
    count = data.draw(st.integers(0, size))
    weights = np.array(data.draw(st.lists(st.floats(1e-6, 1e6), min_size=size, max_size=size)))
    order = weighted_order(lambda part: weights[part], size, count, np.random.default_rng(0))
    assert len(set(order.tolist())) == count
    assert set(order.tolist()) <= set(range(size))
    bank = bank_of(np.clip(weights / weights.max(), 0, 1), alpha=8.0, eta=1.0, emphasis="power")
    drawn = bank.draw(count, np.random.default_rng(0))
    assert len(set(drawn.tolist())) == count


def test_the_race_in_many_parts(monkeypatch):
    """Packing works in place, a part at a time."""
    weights = np.random.default_rng(0).random(1000) + 0.01
    whole = [weighted_order(lambda part: weights[part], 1000, n, np.random.default_rng(3)).copy() for n in (1000, 613)]
    monkeypatch.setattr("peft_multimodal.training.hard_samples.draws.PART", 64)
    parts = [weighted_order(lambda part: weights[part], 1000, n, np.random.default_rng(3)) for n in (1000, 613)]
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(parts[0][:613], parts[1])


def test_the_race_runs_beyond_2_to_the_24():
    """30 million pairs in 350 MiB; indices above 2^24, at which torch.multinomial stops, are drawn as often."""
    size = 30_000_000
    tracemalloc.start()
    order = weighted_order(lambda part: np.ones(part.stop - part.start), size, size // 2, np.random.default_rng(0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 350 * 2**20
    beyond = (order >= 2**24).mean()
    share = 1 - 2**24 / size
    assert abs(beyond - share) < 5 * np.sqrt(share * (1 - share) / (2 * len(order)))
    assert len(np.unique(order[:100_000])) == 100_000


def test_more_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="6 of 5 pairs"):
        weighted_order(lambda part: WEIGHTS[part], 5, 6, np.random.default_rng(0))
    with pytest.raises(ValueError, match="6 distinct pairs can't be drawn from 5"):
        bank_of([0.5] * 5).draw(6, np.random.default_rng(0))


# ---------------------------------------------------------------------------------------------------------- ids


def test_ids_get_stable_keys():
    keys = hash_ids([3, -(2**63), np.int32(7), torch.tensor(9), "3", "ä"])
    assert keys.dtype == np.int64
    assert keys[:4].tolist() == [3, -(2**63), 7, 9]
    assert keys[4] == -7311316421096453337 or keys[4] == hash_ids(["3"])[0]
    assert len(set(keys.tolist())) == 6


@pytest.mark.parametrize("value", [1.5, None, True, b"a", 2**63, [1]])
def test_ids_are_integers_or_strings(value):
    with pytest.raises(TypeError, match="Ids are strings or 64-bit integers"):
        hash_ids([value])


def test_ids_that_occur_twice_and_keys_that_collide():
    with pytest.raises(ValueError, match=r"id 'b' occurs twice"):
        unique_keys(["a", "b", "c", "b"])
    collision = int(hash_ids(["b"])[0])
    with pytest.raises(ValueError, match=r"the same 64-bit key: rename one"):
        unique_keys(["a", "b", collision])


def test_reading_ids():
    assert read_ids([{"id": "a"}, {"id": "b"}], "id") == ["a", "b"]
    with pytest.raises(ValueError, match=r"Row 1 of the data set has no id column 'id': \['name'\]"):
        read_ids([{"id": "a"}, {"name": "b"}], "id")


def test_another_data_set_is_refused():
    bank = HardSampleBank(["a", "b", "c"])
    assert bank.keys[bank.rows(hash_ids(["c", "a"]))].tolist() == hash_ids(["c", "a"]).tolist()
    rows = [{"id": i} for i in "cab"]  # another order is the same data set
    positions = bank.positions_in(rows)
    assert [hash_ids([rows[p]["id"]])[0] for p in positions] == bank.keys.tolist()
    for ids, message in (("abcd", "not in the bank"), ("abd", "not in the bank"), ("ab", "3 pairs, the data set 2")):
        with pytest.raises(ValueError, match=message):
            bank.positions_in([{"id": i} for i in ids])
    with pytest.raises(ValueError, match="There are no pairs"):
        HardSampleBank([])


def test_equal_texts_have_equal_keys_however_they_are_padded():
    right = torch.tensor([[5, 6, 7, 0, 0], [5, 7, 6, 0, 0], [5, 6, 0, 0, 0]])
    left = torch.tensor([[0, 0, 5, 6, 7], [9, 9, 5, 7, 6], [1, 1, 1, 5, 6]])
    masks = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    keys = text_keys(right, masks)
    assert torch.equal(keys, text_keys(left, masks.flip(1)))
    assert len(set(keys.tolist())) == 3
    many = torch.randint(0, 1000, (20_000, 6), generator=torch.Generator().manual_seed(0))
    assert len(set(text_keys(many).tolist())) == len({tuple(row) for row in many.tolist()})


def test_the_collator_adds_keys():
    collator = SampleIds(lambda rows: {"n": len(rows)}, "id", "image_id")
    batch = collator([{"id": "a", "image_id": 1}, {"id": "b", "image_id": 1}])
    assert batch["n"] == 2
    assert batch["sample_ids"].tolist() == hash_ids(["a", "b"]).tolist()
    assert batch["image_ids"].tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"no column 'image_id' but \['id'\]"):
        collator([{"id": "a"}])


# -------------------------------------------------------------------------------------------------------- difficulty


def slow_difficulty(how: HardSampling, i: int, image, text, scale, keys, queue) -> float:
    sides = []
    for one, others in ((image[i], queue["text"]), (text[i], queue["image"])):
        own = float(image[i] @ text[i]) * scale
        negatives = [
            float(one @ other.float()) * scale
            for j, other in enumerate(others)
            if queue["image_keys"][j] != keys["image"][i] and queue["text_keys"][j] != keys["text"][i]
        ]
        sides.append((own, negatives))
    if how.difficulty == "margin":
        g = sum(own - max(negatives, default=-np.inf) for own, negatives in sides) / 2 / scale
        return 1 / (1 + np.exp(-(how.margin - g) / how.margin_width))
    p = [np.exp(own) / (np.exp(own) + sum(np.exp(n) for n in negatives)) for own, negatives in sides]
    if how.difficulty == "prob":
        return 1 - sum(p) / 2
    return -sum(np.log(p)) / 2 / np.log(1 + max(1, len(sides[0][1])))


def units(rows: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("difficulty", ["prob", "margin", "loss"])
def test_difficulties_against_a_slow_version(difficulty: str):
    how = HardSampling(difficulty=difficulty)
    queue = FeatureQueue(16)
    old = {"image": torch.arange(100, 110), "text": torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9, 21])}
    queue.push(units(10, 0), units(10, 1), old)
    image, text = units(5, 2), units(5, 3)
    keys = {"image": torch.tensor([20, 21, 22, 22, 100]), "text": torch.tensor([20, 21, 22, 23, 24])}  # doubles
    queue.push(image, text, keys)
    found = difficulties(image, text, 8.0, keys, queue, how)
    for i in range(5):
        assert float(found[i]) == pytest.approx(slow_difficulty(how, i, image, text, 8.0, keys, queue), abs=2e-3)


@pytest.mark.parametrize("difficulty", ["prob", "margin", "loss"])
def test_difficulties_do_not_depend_on_the_batch_size(difficulty: str):
    """Once the queue is full, a pair that comes in a batch of 1, 4 or 8 meets the same 64 pairs."""
    how = HardSampling(difficulty=difficulty)
    image, text, ids = units(64, 0), units(64, 1), torch.arange(64)
    found = []
    for batch in (1, 4, 8):
        queue = FeatureQueue(64)
        queue.push(image, text, {"image": ids, "text": ids})
        again = []
        for rows in torch.arange(64).split(batch):
            keys = {"image": ids[rows], "text": ids[rows]}
            queue.push(image[rows], text[rows], keys)
            again.append(difficulties(image[rows], text[rows], 10.0, keys, queue, how))
        found.append(torch.cat(again))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


@pytest.mark.parametrize("difficulty", ["prob", "margin", "loss"])
def test_a_pair_without_negatives_is_easy(difficulty: str):
    queue, keys = FeatureQueue(4), {"image": torch.zeros(3, dtype=torch.long), "text": torch.arange(3)}
    queue.push(units(3, 0), units(3, 1), keys)
    found = difficulties(units(3, 0), units(3, 1), 10.0, keys, queue, HardSampling(difficulty=difficulty))
    assert torch.equal(found, torch.zeros(3))


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 9), batches=st.lists(st.integers(1, 12), max_size=8))
def test_the_queue_holds_the_latest(size: int, batches: list[int]):
    queue, all_keys = FeatureQueue(size), []
    for batch in batches:
        keys = torch.arange(batch) + len(all_keys)
        all_keys += keys.tolist()
        queue.push(units(batch, 0), units(batch, 1), {"image": keys, "text": -keys})
        assert sorted(queue["image_keys"].tolist()) == all_keys[-size:]
        assert torch.equal(queue["text_keys"], -queue["image_keys"])


# ----------------------------------------------------------------------------------------------------------- the bank


def test_updates_follow_the_visits():
    bank = bank_of([0.8, 0.2, 0.5], momentum=0.75)
    bank.update(np.array([0, 2, 0]), np.array([0.4, 0.9, 0.1]), step=5)  # a pair that occurs twice counts once
    np.testing.assert_allclose(bank.difficulty, [0.75 * 0.8 + 0.25 * 0.4, 0.2, 0.75 * 0.5 + 0.25 * 0.9], rtol=1e-6)
    np.testing.assert_allclose(bank.base_difficulty, [0.8, 0.2, 0.5], rtol=1e-6)
    assert bank.visits.tolist() == [1, 0, 1]
    assert bank.last_step.tolist() == [5, -1, 5]
    fresh = HardSampleBank([0, 1])
    fresh.update(np.array([1]), np.array([0.9]), step=0)
    fresh.update(np.array([1]), np.array([0.8]), step=1)
    np.testing.assert_allclose(fresh.difficulty, [0.5, 0.9 * 0.9 + 0.1 * 0.8], rtol=1e-6)
    with pytest.raises(ValueError, match=r"1 of 1 pairs are not in the bank, such as that of key 9"):
        fresh.update(np.array([9]), np.array([0.5]), step=2)


def test_a_step_that_overflowed_spoils_nothing():
    bank = bank_of(np.linspace(0.1, 0.9, 50))
    before = bank.difficulty.copy()
    bank.draw(2, np.random.default_rng(0))  # makes the tree
    bank.update(np.array([3, 9]), np.array([np.nan, np.inf]), 1)
    np.testing.assert_array_equal(bank.difficulty, before)
    assert np.isfinite(bank.probabilities(slice(None))).all()
    assert not bank.visits.any()


def test_a_pair_takes_21_bytes():
    bank = HardSampleBank(list(range(1000)))
    arrays = (bank.difficulty, bank.base_difficulty, bank.visits, bank.last_step, bank.flag)
    assert sum(a.nbytes for a in arrays) == 21 * 1000


def test_ranks_tell_saturated_difficulties_apart():
    """1 - p is near 1 for most pairs of a narrow domain: powers of it draw them alike, ranks don't."""
    difficulty = 1 - np.geomspace(1e-6, 0.2, 512)
    hardest, easiest = 0, -1
    power, rank = (
        bank_of(difficulty, emphasis=e, alpha=1.0, eta=1.0, guard_share=0).probabilities(slice(None))
        for e in ("power", "rank")
    )
    assert power[hardest] / power[easiest] < 1.3
    assert rank[hardest] / rank[easiest] > 20
    np.testing.assert_allclose(rank * 512, 2 * (512 - np.arange(512)) / 512, atol=0.03)
    equal = bank_of([0.3] * 100)
    np.testing.assert_allclose(equal.probabilities(slice(None)), 1 / 100)


def test_weights_of_the_loss():
    difficulty = np.array([0.0, 0.2, 0.5, 0.9, 1.0])
    bank = bank_of(difficulty, emphasis="power", gamma=0.5, guard_share=0)
    x = np.sqrt(difficulty + 0.01)
    expected = np.clip(x / x.mean(), 0.25, 4)
    np.testing.assert_allclose(bank.loss_weights(np.arange(5)), expected / expected.mean(), rtol=1e-5)
    assert bank.loss_weights(np.arange(5)).mean() == pytest.approx(1)
    flat = bank_of(difficulty, gamma=0.0)
    np.testing.assert_allclose(flat.loss_weights(np.array([4, 2, 0])), 1)
    corrected = bank_of(difficulty, emphasis="power", gamma=0.0, beta=1.0)
    c = 1 / corrected.probabilities(np.arange(5))
    np.testing.assert_allclose(corrected.loss_weights(np.arange(5)), c / c.max(), rtol=1e-5)


def test_the_correction_undoes_the_sampling():
    """With beta = 1 the expected sum of c_i over draws by P is the same for every pair."""
    bank = bank_of(np.linspace(0, 1, 50), gamma=0.0, beta=1.0)
    share = bank.probabilities(np.arange(50)) * bank.loss_weights(np.arange(50))
    np.testing.assert_allclose(share / share[0], 1, rtol=1e-4)


def test_the_noise_guard():
    """Pairs that stay the hardest and don't fall lose their emphasis; those that fall keep it."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.9, 1000)
    wrong = rng.permutation(1000)[:10]
    base[wrong] = 0.97
    for emphasis in ("rank", "power"):
        bank = bank_of(base, emphasis=emphasis, guard_share=0.02, guard_visits=3)
        before = bank.probabilities(wrong)
        for step in range(12):
            now = np.where(np.isin(np.arange(1000), wrong), 0.99, base - 0.08 * step)
            bank.update(np.arange(1000), np.clip(now, 0, 1), step)
            assert (len(bank.suspects) > 0) == (step >= 2)  # after three visits, in the middle of an epoch
        assert set(wrong.tolist()) <= set(bank.suspects.tolist())
        bank.start_epoch()
        assert set(wrong.tolist()) <= set(bank.suspects.tolist())
        assert len(bank.suspects) <= 20
        after = bank.probabilities(wrong)
        assert (after < before).all()
        middle = np.median(bank.probabilities(slice(None)))
        np.testing.assert_allclose(after, middle, rtol=0.02)
        batch = np.concatenate([wrong, np.flatnonzero(bank.flag == 0)[:90]])
        assert bank.loss_weights(batch)[:10].max() <= 1.1
        off = bank_of(base, emphasis=emphasis, guard_share=0)
        off.visits[:] = 9
        off.start_epoch()
        assert not len(off.suspects)


def test_the_hardest_are_suspected_from_the_start_until_they_fall():
    bank = bank_of(np.linspace(0.2, 0.9, 100))
    hardest, middle = np.arange(95, 100), np.median(bank.probabilities(slice(None)))
    assert set(bank.suspects.tolist()) == set(hardest.tolist())
    np.testing.assert_allclose(bank.probabilities(hardest), middle, rtol=0.02)
    for step in range(3):
        bank.update(hardest[:2], np.full(2, 0.5), step)
    assert set(bank.suspects.tolist()) == set(hardest[2:].tolist())
    assert (bank.probabilities(hardest[:2]) > middle).all()


def test_without_a_base_pass_all_count_alike_until_they_were_met():
    bank, keys = HardSampleBank(list(range(100)), eta=1.0), np.arange(100)
    bank.start_epoch()
    bank.update(keys[:79], np.linspace(0, 1, 79), 1)
    bank.start_epoch()
    np.testing.assert_allclose(bank.probabilities(slice(None)), 0.01)
    np.testing.assert_array_equal(bank.loss_weights(keys), 1)
    bank.update(keys[79:], np.linspace(0, 1, 21), 2)
    np.testing.assert_allclose(bank.probabilities(slice(None)), 0.01)  # an epoch goes on as it began
    again = HardSampleBank(list(range(100)), eta=1.0)
    again.load_state(bank.state())
    for one in (bank, again):
        one.start_epoch()
        p = one.probabilities(slice(None))
        assert p[78] > 1.9 * p[39] > 0
        assert p.sum() == pytest.approx(1)


def test_settings_are_checked():
    for name, value in {
        **{"difficulty": "entropy", "momentum": 1.5, "emphasis": None, "alpha": -1, "eta": "0.5", "eps": 0},
        **{"gamma": True, "beta": 2, "queue_size": 2.0, "margin_width": 0, "guard_share": -0.1, "guard_fall": None},
    }.items():
        with pytest.raises(ValueError, match=rf"{name} must be .*got"):
            HardSampleBank([1, 2], **{name: value})
    with pytest.raises(TypeError, match="unexpected"):
        HardSampleBank([1, 2], colour="red")


# -------------------------------------------------------------------------------------------------------- the storage


def test_saves_and_loads(tmp_path):
    bank = bank_of(np.random.default_rng(0).random(300), emphasis="power", alpha=2.0)
    keys = {"image": torch.arange(7), "text": torch.arange(7)}
    bank.queue.push(units(7, 0), units(7, 1), keys)
    bank.update(np.arange(0, 300, 7), np.full(43, 0.25), 11)
    path = bank.save(tmp_path / "adapter")
    assert path.name == FILE
    other = HardSampleBank.load(tmp_path / "adapter")
    assert other.settings == bank.settings
    for name, array in bank.state().items():
        np.testing.assert_array_equal(other.state()[name], array, err_msg=name)
    rngs = [np.random.default_rng(1) for _ in range(2)]
    np.testing.assert_array_equal(other.draw(20, rngs[0]), bank.draw(20, rngs[1]))
    assert [p.name for p in path.parent.iterdir()] == [FILE]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    bank = bank_of([0.1, 0.9])
    bank.save(tmp_path)
    bank.update(np.array([0]), np.array([1.0]), 1)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("peft_multimodal.training.hard_samples.bank.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        bank.save(tmp_path)
    assert HardSampleBank.load(tmp_path).visits.tolist() == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_damaged_files_are_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=FILE):
        HardSampleBank.load(tmp_path)
    bank = bank_of([0.1, 0.9, 0.5])
    file = bank.save(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="damaged or truncated"):
        HardSampleBank.load(tmp_path)
    arrays = bank.state()
    about = {"settings": {}, "id_column": "id", "image_id_column": None}
    good = {"format": "1", "hard_sample_bank": json.dumps(about)}
    for change, metadata in (
        ({"visits": arrays["visits"][:-1]}, good),
        ({"difficulty": np.array([0.1, np.nan, 0.2], np.float32)}, good),
        ({"keys": np.array([2, 1, 0])}, good),
        ({"flag": arrays["flag"].astype(np.int16)}, good),
        ({}, {"format": "99", "hard_sample_bank": json.dumps(about)}),
        ({}, {"format": "1", "hard_sample_bank": "{"}),
        ({}, {"format": "1", "hard_sample_bank": json.dumps({**about, "settings": {"eta": 7}})}),
        ({}, {}),
    ):
        save_file({**arrays, **change}, file, metadata)
        with pytest.raises(ValueError, match="no bank that can be used"):
            HardSampleBank.load(tmp_path)
    assert set(load_file(file)) == set(arrays)


def test_another_bank_does_not_fit():
    with pytest.raises(ValueError, match=r"other pairs \(2\) than this one \(3\)"):
        bank_of([0.1, 0.2, 0.3]).load_state(bank_of([0.1, 0.2]).state())


# -------------------------------------------------------------------------------------------------------- the sampler


def sampler_of(bank: HardSampleBank, batch: int = 8, **options) -> HardSampleSampler:
    return HardSampleSampler(bank, np.arange(len(bank)), batch, **options)


def test_batches_have_no_pair_twice_and_epochs_differ():
    sampler = sampler_of(bank_of(np.linspace(0, 1, 400)), seed=3)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert len(epochs[-1]) == len(sampler) == 400
        for start in range(0, 400, 8):
            assert len(set(epochs[-1][start : start + 8])) == 8
    assert epochs[0] != epochs[1]
    sampler.set_epoch(0)
    assert list(sampler) == epochs[0]


def test_hard_pairs_come_more_often():
    bank = bank_of(np.linspace(0, 1, 400), eta=0.8)
    sampler, counts = sampler_of(bank), np.zeros(400)
    for epoch in range(40):
        sampler.set_epoch(epoch)
        counts += np.bincount(list(sampler), minlength=400)
    assert counts[-40:].mean() / counts[:40].mean() > 3
    assert counts.min() > 0
    assert np.corrcoef(counts, bank.probabilities(slice(None)))[0, 1] > 0.9


def test_an_order_becomes_numbers_a_part_at_a_time():
    """A million of Python's integers take 40 MB."""
    sampler = sampler_of(bank_of(np.linspace(0, 1, 2_000_000)), chunk_size=None)
    iterator = iter(sampler)
    next(iterator)
    tracemalloc.start()
    rest = sum(1 for _ in iterator)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rest == 999_999
    assert peak < 10 * 2**20


def test_difficulties_are_fresh_inside_an_epoch():
    bank = bank_of(np.full(1600, 0.5), eta=1.0, alpha=3.0, momentum=0.0)
    sampler = sampler_of(bank, chunk_size=64)
    iterator = iter(sampler)
    early = [next(iterator) for _ in range(64)]
    bank.start_epoch()
    bank.table[:] = np.linspace(0, 1, len(bank.table))
    bank.update(np.arange(1500), np.zeros(1500), 1)
    bank.update(np.arange(1500, 1600), np.ones(100), 1)
    late = [next(iterator) for _ in range(640)]
    assert np.mean(np.array(early) >= 1500) < 0.2
    assert np.mean(np.array(late) >= 1500) > 0.9


def test_an_epoch_drawn_at_once():
    bank = bank_of(np.linspace(0, 1, 1000), eta=1.0, alpha=4.0)
    sampler = sampler_of(bank, chunk_size=None)
    order = list(sampler)
    assert len(order) == len(sampler) == len(set(order)) == 500
    assert np.mean(order) > 650
    assert abs(np.mean(order[:250]) - np.mean(order[250:])) < 60  # the hard ones don't come first


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(20, 200), batch=st.integers(1, 9), stop=st.integers(0, 200), ahead=st.integers(0, 30),
    chunk=st.sampled_from([None, 4, 32]),
)  # fmt: skip
def test_a_sampler_resumes_exactly(size: int, batch: int, stop: int, ahead: int, chunk: int | None):
    """Whatever has been drawn in advance when it stops, and whatever the bank learns on the way."""

    def learn(bank: HardSampleBank, indices: list[int], step: int) -> None:
        bank.update(np.unique(indices), np.full(len(set(indices)), 1 / (1 + step % 7)), step)

    bank = bank_of(np.random.default_rng(0).random(size))
    sampler = sampler_of(bank, batch, chunk_size=chunk)
    sampler.set_epoch(4)
    iterator, order, trained = iter(sampler), [], 0
    stop = min(stop, len(sampler) // batch)
    states = None
    for step in range(len(sampler) // batch + 1):
        while len(order) < trained + batch + ahead:  # a loader that fetches ahead
            if (i := next(iterator, None)) is None:
                break
            order.append(i)
        if step == stop:
            states = {k: v.copy() for k, v in bank.state().items()}, {k: v.copy() for k, v in sampler.state().items()}
            drawn = len(order)
        learn(bank, order[trained : trained + batch] or [0], step)
        trained = min(trained + batch, len(sampler))
        sampler.trained(batch)

    other = bank_of(np.zeros(size))
    other.load_state(states[0])
    again = sampler_of(other, batch, chunk_size=chunk)
    again.load_state(states[1])
    again.set_epoch(4)
    iterator = iter(again)
    trained = stop * batch
    resumed = list(itertools.islice(iterator, drawn))
    assert resumed[trained:] == order[trained:drawn]
    for step in range(stop, len(sampler) // batch + 1):
        while len(resumed) < trained + batch + ahead:
            if (i := next(iterator, None)) is None:
                break
            resumed.append(i)
        learn(other, resumed[trained : trained + batch] or [0], step)
        trained = min(trained + batch, len(sampler))
        again.trained(batch)
    assert resumed[stop * batch :] == order[stop * batch :]
    for name, array in bank.state().items():
        np.testing.assert_array_equal(other.state()[name], array, err_msg=name)


def test_the_next_epoch_after_a_restart_is_a_new_one():
    bank = bank_of(np.linspace(0, 1, 100))
    sampler = sampler_of(bank)
    list(sampler)
    sampler.trained(96)  # the last batch was dropped
    again = sampler_of(bank)
    again.load_state(sampler.state())
    again.set_epoch(1)
    sampler.set_epoch(1)
    assert list(again) == list(sampler)


# ------------------------------------------------------------------------------------------------- from the open model


class Pairs(torch.utils.data.Dataset):
    """Rows of tensors for the tiny CLIP, each with an id."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = [
            {
                "id": f"pair-{i}",
                "input_ids": torch.cat([torch.tensor([1]), torch.randint(4, 50, (5,), generator=generator), torch.tensor([2])]),
                "attention_mask": torch.ones(7, dtype=torch.long),
                "pixel_values": torch.randn(3, 16, 16, generator=generator),
            }
            for i in range(size)
        ]  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        return self.rows[i]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_from_the_open_model():
    from methods import wrap

    family, data = FAMILIES["clip"], Pairs(30)
    model = wrap(family, "hard_sample_domain_adapter").train()  # stirred: the adapter must be off
    bank = HardSampleBank.from_model(model, data, batch_size=7, progress=False)
    assert model.training
    assert len(bank) == 30
    np.testing.assert_array_equal(bank.difficulty, bank.base_difficulty)
    base = family.build()
    with torch.no_grad():
        batch = {k: torch.stack([r[k] for r in data.rows]) for k in ("input_ids", "attention_mask", "pixel_values")}
        out = base(**batch)
    image, text, scale = (x.double() for x in (out.image_embeds, out.text_embeds, base.logit_scale.exp()))
    logits = image @ text.T * scale  # the queue holds all 30
    p = (logits.softmax(1).diagonal() + logits.softmax(0).diagonal()) / 2
    rows = bank.rows(hash_ids([r["id"] for r in data.rows]))
    np.testing.assert_allclose(bank.difficulty[rows], 1 - p.detach().numpy(), atol=2e-3)

    streamed = HardSampleBank.from_model(model, Stream(data.rows), batch_size=7, progress=False)
    np.testing.assert_allclose(streamed.difficulty, bank.difficulty, atol=1e-5)
    for made in (bank, streamed):  # neither holds a pair twice when the next epoch comes, and ranks are there
        assert made.queue.size == made.queue.filled == 30
        assert len(set(made.emphasis(slice(None)).tolist())) == 29  # the hardest counts as the median
        assert len(made.history) == 1
    other = HardSampleBank.from_model(base, data, batch_size=5, progress=False, seed=9)
    np.testing.assert_allclose(other.difficulty, bank.difficulty, atol=2e-3)
    with pytest.raises(ValueError, match="occur more than once"):
        HardSampleBank.from_model(base, Stream(data.rows[:3] * 2), progress=False)
    with pytest.raises(ValueError, match="no id column 'name'"):
        HardSampleBank.from_model(base, data, id_column="name", progress=False)
    for nothing in ([], Stream([])):
        with pytest.raises(ValueError, match="has no rows"):
            HardSampleBank.from_model(base, nothing, progress=False)


def test_the_scale_is_the_model_s_own():
    """By it the model makes its own similarities of cosines."""
    vision = {
        **{"image_size": 16, "hidden_dim": 16, "kernel_sizes": [3], "in_channels": [32], "out_channels": [16]},
        **{"strides": [1], "num_block_repeats": [1], "expand_ratios": [1], "width_coefficient": 1.0},
    }
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 50,
    }
    align = hf.AlignModel(
        hf.AlignConfig(text_config=text, vision_config=vision, projection_dim=16, temperature_init_value=0.05)
    ).eval()
    batch = {k: torch.stack([r[k] for r in Pairs(3).rows]) for k in ("input_ids", "attention_mask", "pixel_values")}
    for model in (FAMILIES["clip"].build(), align):
        with torch.no_grad():
            out = model(**batch)
            cosines = torch.nn.functional.cosine_similarity(out.image_embeds[:, None], out.text_embeds[None], dim=-1)
            torch.testing.assert_close(cosines * logit_scale(model), out.logits_per_image, atol=1e-4, rtol=1e-4)


def test_rows_that_are_ready_may_have_images_and_texts_too():
    """The report shows those; the model reads the tensors."""
    data = Pairs(8)
    for row in data.rows:
        row |= {"image": Image.new("RGB", (8, 9)), "text": ["a", "b"], "n": 3}
    batch = stack_rows(data.rows)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    lists = [{k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in row.items()} for row in data.rows]
    for name, value in stack_rows(lists).items():
        torch.testing.assert_close(value, batch[name])
    assert len(HardSampleBank.from_model(FAMILIES["clip"].build(), data, progress=False)) == 8


def test_images_and_texts_go_through_the_checkpoint_s_processor(tmp_path):
    """Without a collator rows of `image` and `text` are made ready by what lies beside the model's weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", "red", "green", "apple", "pear"))}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    hf.CLIPProcessor(images, tokenizer).save_pretrained(tmp_path)
    FAMILIES["clip"].build().save_pretrained(tmp_path)
    model = hf.CLIPModel.from_pretrained(tmp_path)
    colours = [(200, 20, 20), (20, 200, 20), (90, 90, 200)]
    rows = [
        {"id": f"pair {i}", "image": Image.new("RGB", (20, 24), colours[i % 3]), "text": text}
        for i, text in enumerate(("red apple", "green pear", "green apple </s>", "red pear </s>"))
    ]
    bank = HardSampleBank.from_model(model, rows, progress=False)
    collator = ImageTextCollator(hf.AutoProcessor.from_pretrained(tmp_path), random_text=False)
    asked = HardSampleBank.from_model(model, rows, collator=collator, progress=False)
    np.testing.assert_array_equal(bank.difficulty, asked.difficulty)
    assert len(set(bank.difficulty.tolist())) > 1
    args = hf.TrainingArguments(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    ContrastiveTrainer(model, args, train_dataset=rows, hard_samples=bank).train()
    assert bank.visits.sum() == 4


# --------------------------------------------------------------------------------------------------------- the report


def test_the_report_is_one_safe_page(tmp_path):
    rows = [
        {"id": f"<b>{i}</b>", "text": "<script>alert(1)</script>" if i == 3 else f"text {i}", "image": Image.new("L", (9, 9), i)}
        for i in range(12)
    ]  # fmt: skip
    bank = HardSampleBank([row["id"] for row in rows])
    hardest = bank.rows(hash_ids([rows[3]["id"]]))
    bank.difficulty[hardest] = bank.base_difficulty[hardest] = 0.95
    bank.visits[:] = 4
    for step in range(3):
        bank.last_step[:] = step
        bank.start_epoch()
    assert len(bank.history) == 3
    page = bank.report(tmp_path / "report.html", rows, pairs=5).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "&lt;b&gt;3&lt;/b&gt;" in page
    assert page.count("data:image/jpeg;base64,") >= 5
    assert "data:image/png;base64," in page
    assert not any(text in page for text in ("http://", "https://", 'src="/', "<link"))
    assert "0.950" in page
    assert bank.report(tmp_path / "plain.html").read_text().count("<figure>") >= 12
    bank.dataset = rows  # what it was made of or trained with
    assert "data:image/jpeg;base64," in bank.report(tmp_path / "own.html").read_text()
    assert copy.deepcopy(bank).dataset is None
    streamed = bank.report(tmp_path / "streamed.html", Stream(rows), pairs=5).read_text()
    assert streamed == page
    with pytest.raises(ValueError, match="it is another"):
        bank.report(tmp_path / "other.html", Stream(rows[:3]))


def test_the_histogram_counts_every_pair():
    """By "loss" a pair may be harder than chance."""
    bank = HardSampleBank(range(5), difficulty="loss")
    bank.difficulty[:] = [0.2, 0.4, 0.9, 1.2, 3.0]
    bank.start_epoch()
    assert bank.history[-1][1].sum() == 5
    assert bank.history[-1][1][-1] == 2
