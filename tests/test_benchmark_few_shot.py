"""The few-shot benchmark's own parts, on tiny models and made-up images, and its report."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from benchmark_cases import one_a_method
from families import FAMILIES
from methods import word_tokenizer
from test_benchmarks import tiny_clip

from benchmarks import experiment as experiments
from benchmarks import kept_images, records
from benchmarks.assets.categories import CLASSES, class_of, split_class
from benchmarks.kept_images import KeptImages, as_pixels, look_up, look_up_lower
from benchmarks.peers.probes import LinearProbe, TipAdapterF
from benchmarks.peers.prompts import CoCoOp, TemplateClassifier
from benchmarks.tasks import few_shot

NAMES = ["w4 w5", "w6", "w7 w8", "w9"]
SPLITS = ["train"] * 20 + ["validation"] * 4 + ["test"] * 8
NUMBER = len(SPLITS)


def made_up(data: str = "emoji") -> KeptImages:
    """Images whose outputs are noise around their class's."""
    torch.manual_seed(2)
    labels = torch.arange(NUMBER) % 4
    states = torch.randn(4, 37, 16)[labels] + 0.3 * torch.randn(NUMBER, 37, 16)
    with torch.no_grad():
        embeds = F.normalize(tiny_clip().visual_projection(states[:, 0]), dim=-1)
    styles = [("google", "fluent")[i > 20 and i % 3 == 0] for i in range(NUMBER)]
    return KeptImages(data, states, states, embeds, labels, styles, [f"c{i // 2}" for i in range(NUMBER)], SPLITS)


@pytest.fixture
def tiny(monkeypatch):
    """The task with a tiny CLIP and made-up images for its assets."""
    images = {data: made_up(data) for data in ("emoji", "photos")}
    monkeypatch.setattr(few_shot, "kept_images", images.__getitem__)
    monkeypatch.setattr(few_shot, "load_clip", lambda: (tiny_clip(), word_tokenizer(size=40, eos=39)))
    monkeypatch.setattr(few_shot, "TEMPLATE", "w10 w11 {}")
    monkeypatch.setattr(few_shot, "CONTEXT", "w10 w11")
    monkeypatch.setitem(kept_images.CLASSES, "emoji", dict.fromkeys(NAMES, ()))
    monkeypatch.setitem(kept_images.CLASSES, "photos", dict.fromkeys(NAMES, ()))
    monkeypatch.setattr(few_shot, "LOWER", 2)
    return images


def small(name: str, **task):
    """The experiment on the tiny model."""
    item = experiments.load("few_shot", name)
    item = item.choose(0) if item.choices else item
    item.training.update({"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2})
    item.settings.update(
        {"shots": [k for k in (0, 2, 4) if k in item.settings["shots"]] or [4], "base_to_new": [2]} | task
    )
    item.settings.update(
        {name: value for name, value in {"alpha": 1, "beta": 1, "penalty": 0.1}.items() if name not in item.settings}
    )
    if item.peft and item.peft["peft_type"] == "STRUCTURED_PROMPT":
        item.peft.update({"general_init": "w10 w11", "attention_dim": 8, "num_heads": 2, "text_anchor": 0.0})
        item.peft.update({"shortlist": 2} if item.peft.get("shortlist") else {})
    elif item.peft:
        item.peft["target_modules"] = ".*text_model.encoder.layer.\\d.attention.self.query"
    return item


@pytest.mark.parametrize("name", one_a_method("few_shot"))
def test_every_experiment_trains_and_is_tested(name, tiny):
    item = small(name)
    outcome = few_shot.run(item, 0, "test")
    assert 0 <= few_shot.score(outcome["metrics"]) <= 100
    for key, hits in outcome["items"]["hits"].items():
        right = sum(map(int, hits)) / len(hits)
        assert outcome["metrics"][key] == pytest.approx(100 * right)
        assert len(hits) == (4 if key.endswith(("_base", "_new")) else 8)
    assert (outcome["cost"]["trainable_parameters"] > 0) == item.trains


def test_images_depend_on_the_seed_alone_and_fewer_are_among_more(tiny):
    images = tiny["emoji"]
    one, four = (few_shot.draw(images, NAMES, k, False, 3) for k in (1, 4))
    assert set(one.tolist()) < set(four.tolist())
    assert four.equal(few_shot.draw(images, NAMES, 4, False, 3))
    assert not four.equal(few_shot.draw(images, NAMES, 4, False, 4))
    assert images.labels[four].bincount().tolist() == [4] * 4
    assert {SPLITS[row] for row in few_shot.draw(images, NAMES, 100, True, 3).tolist()} == {"train"}
    assert len(few_shot.draw(images, NAMES, 50, True, 3)) == 4 * 3
    some = few_shot.draw(images, NAMES[1:2], 4, False, 3)
    assert some.tolist() == [row for row in four.tolist() if images.labels[row] == 1]


def test_another_image_is_never_ones_own_nor_of_another_split(tiny):
    lesson = next(few_shot.lessons(small("structured_prompt/shots").settings, 0, "test"))
    partner = few_shot.another_image(lesson)
    assert not (partner == torch.arange(NUMBER)).any()
    assert sorted(partner.tolist()) == list(range(NUMBER))
    assert all(SPLITS[i] == SPLITS[j] for i, j in enumerate(partner.tolist()))


def test_kept_outputs_are_exact():
    """`look_up` and `look_up_lower` give what the vision tower gives."""
    torch.manual_seed(0)
    x = torch.randn(NUMBER, 3, 84, 84)
    model, lower = tiny_clip(), []
    model.vision_model.encoder.layer[2].register_forward_pre_hook(lambda _, inputs: lower.append(inputs[0]))
    with torch.no_grad():
        last = model.vision_model(pixel_values=x).last_hidden_state
        expected = model.get_image_features(pixel_values=x).pooler_output
        images = KeptImages("emoji", last, lower[0], expected, torch.zeros(NUMBER), [], [], SPLITS)
        rows = torch.tensor([5, 0, 7])
        for function in (look_up, look_up_lower):
            found = function(tiny_clip(), images, *([2] if function is look_up_lower else []))
            features = found.get_image_features(pixel_values=as_pixels(rows)).pooler_output
            torch.testing.assert_close(features, expected[rows])


def test_shuffled_patches_leave_the_embedding():
    images = made_up()
    model = look_up(tiny_clip(), images, torch.arange(NUMBER).roll(1))
    out = model.vision_model(pixel_values=as_pixels(torch.tensor([4])))
    assert out.pooler_output.equal(images.states[4:5, 0])
    assert out.last_hidden_state.equal(images.states[3:4])


@pytest.mark.parametrize("start", ["zero", "text"])
def test_the_probe_is_the_minimum(start):
    torch.manual_seed(0)
    v, labels = F.normalize(torch.randn(30, 6), dim=-1), torch.arange(30) % 3
    begin = torch.zeros(3, 6) if start == "zero" else F.normalize(torch.randn(3, 6), dim=-1)
    probe = LinearProbe(begin, 5.0, 0.1)
    probe.fit(v, labels)
    W = probe.weight.detach().requires_grad_()
    loss = F.cross_entropy(5 * v @ W.T, labels) + 0.1 * (W - begin).square().sum()
    assert torch.autograd.grad(loss, W)[0].abs().max() < 1e-3


def test_tip_adapter_is_the_papers_formula():
    torch.manual_seed(0)
    v, labels, text = (
        F.normalize(torch.randn(6, 5), dim=-1),
        torch.arange(6) % 3,
        F.normalize(torch.randn(3, 5), dim=-1),
    )
    adapter, x = TipAdapterF(v, labels, text, 100.0, 2.0, 5.5), F.normalize(torch.randn(4, 5), dim=-1)
    expected = 100 * x @ text.T
    for i in range(4):
        for j in range(6):
            expected[i, labels[j]] += 2.0 * torch.exp(-5.5 * (1 - x[i] @ v[j]))
    torch.testing.assert_close(adapter(x), expected)
    before = F.cross_entropy(adapter(v), labels)
    adapter.fit(v, labels, learning_rate=1e-2)
    assert F.cross_entropy(adapter(v), labels) < before


@pytest.mark.parametrize("family", ["clip", "vision_text_dual_encoder"])
def test_cocoop_padded_is_cocoop_trimmed(family):
    x = torch.randn(3, 3, 16, 16)
    found = []
    for padded in (False, True):
        torch.manual_seed(0)
        classifier = CoCoOp(FAMILIES[family].build(), word_tokenizer(), "w10 w11", padded=padded)
        torch.manual_seed(1)
        for parameter in classifier.meta.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        classifier.set_classes(NAMES)
        found.append(classifier(x)["logits"])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0][0], found[0][1])


def test_cocoop_whose_net_says_nothing_is_its_words():
    model = FAMILIES["clip"].build()
    classifier = CoCoOp(model, word_tokenizer(), "w10 w11")
    for parameter in classifier.meta.parameters():
        torch.nn.init.zeros_(parameter)
    template = TemplateClassifier(FAMILIES["clip"].build(), word_tokenizer(), "w10 w11 {}")
    x = torch.randn(3, 3, 16, 16)
    for one in (classifier, template):
        one.set_classes(NAMES)
    torch.testing.assert_close(classifier(x)["logits"], template(x)["logits"], atol=1e-5, rtol=1e-5)


def test_classes_come_from_their_folders():
    found = {
        folder: class_of(folder, CLASSES["photos"])
        for folder in ("animals/birds", "animals/mammals/cats", "town/", "town/houses", "sports/", "clothes/hats")
    }
    names = {folder: None if label is None else list(CLASSES["photos"])[label] for folder, label in found.items()}
    assert list(names.values()) == ["bird", "mammal", "monument", "house", None, "clothes"]
    subgroups = [group for groups in CLASSES["emoji"].values() for group in groups]
    assert len(subgroups) == len(set(subgroups))


def test_a_class_keeps_enough_for_training_and_families_together():
    families = [f"f{i // 2}" for i in range(30)]
    splits = split_class(families)
    assert splits == split_class(families)
    assert splits.count("train") >= 16
    assert {"validation", "test"} <= set(splits)
    assert all(len({s for f, s in zip(families, splits, strict=True) if f == name}) == 1 for name in families)


def test_the_report_works_with_what_results_there_are(tiny, tmp_path):
    found = []
    for name in ("zero_shot/shots", "coop/shots", "structured_prompt/shots", "structured_prompt/base_to_new"):
        item = small(name)
        for seed in (0, 1) if item.trains else (0,):
            outcome = few_shot.run(item, seed, "test")
            found.append(
                records.Record("few_shot", name, item.label, seed, item.as_dict(), records.environment(), **outcome)
            )
    for some in (found, found[:1], found[3:5]):
        text = few_shot.report(some, tmp_path)
        assert all(record.label in text for record in some)
    assert (tmp_path / "few_shot_accuracy.png").is_file()
    assert "− CoOp, emoji" in few_shot.report(found, tmp_path)
