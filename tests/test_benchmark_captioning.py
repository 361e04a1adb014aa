"""The captioning benchmark's own parts, on a tiny language model that reads made-up captions, and its report."""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import pytest
import torch
from benchmark_cases import one_a_method
from families import text_tower
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import experiment as experiments
from benchmarks import records, report
from benchmarks.assets.caption_lm import Pages
from benchmarks.assets.captions import KINDS, Caption, kind_of_question
from benchmarks.tasks import captioning
from benchmarks.tasks.captioning import Exam, PageCollator, Reader, Shown

D, THINGS = 12, 36
WORDS = [f"w{i}" for i in range(30)]
COLOURS, SHAPES = ["red", "blue"], ["circle", "square"]


def made_up(kind: str) -> tuple[Caption, ...]:
    found = []
    for i in range(THINGS):
        split = ("train", "validation", "test")[i % 3]
        if kind == "questions":
            answers = {"colour": COLOURS, "shape": SHAPES, "yes or no": ["no", "yes"]}
            topic = captioning.QUESTIONS[i // 3 % 3]
            answer = answers[topic][i // 9 % 2]
            found.append(Caption(i, answer, split, topic, str(i), question=f"{topic.replace(' ', '')} ?"))
        else:
            words = (WORDS[i % 30], WORDS[i * 7 % 29], "all") if kind == "keywords" else ()
            answer = ", ".join(words) or f"{WORDS[i % 30]} {WORDS[i * 7 % 29]}"
            found.append(Caption(i, answer, split, f"topic{i % 4}", f"thing{i}", words=words))
    return tuple(found)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The task with made-up captions and images and a tiny language model for its assets."""
    words = [
        "[PAD]",
        "<end>",
        "[UNK]",
        *WORDS,
        *COLOURS,
        *SHAPES,
        "no",
        "yes",
        "all",
        ",",
        "?",
        "colour",
        "shape",
        "yesorno",
    ]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", eos_token="<end>")
    torch.manual_seed(0)
    config = LlamaConfig(
        **text_tower(16) | {"vocab_size": len(words), "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.3}
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    states = {kind: torch.randn(THINGS, 8 if kind == "animations" else 1, 5, D) for kind in KINDS}
    for module in (captioning, sys.modules[Pages.__module__]):
        monkeypatch.setattr(module, "captions", made_up)
    monkeypatch.setattr(captioning, "patch_states", states.__getitem__)
    monkeypatch.setattr(captioning, "caption_lm", lambda: tmp_path / "lm")
    for kept in (captioning.exam, captioning._support, captioning._directions):
        kept.cache_clear()
    yield tmp_path / "lm"
    for kept in (captioning.exam, captioning._support, captioning._directions):
        kept.cache_clear()


SMALL = {"max_steps": 2, "warmup_steps": 0, "disable_tqdm": True, "learning_rate": 1e-2}


def small(name: str) -> experiments.Experiment:
    item = experiments.load("captioning", name)
    if item.peft:
        item.peft.update(num_latents=2, resampler_depth=1, resampler_heads=2, head_dim=4)
        item.peft["every_n_layers"] = min(2, item.peft["every_n_layers"])
    item.training.update(SMALL)
    item.settings.update(pages=2, things=9, candidates=3, eval_batch_size=4, lm="caption_lm")
    return item


@pytest.mark.parametrize("name", one_a_method("captioning"))
def test_every_experiment_trains_and_is_measured(name, tiny, tmp_path):
    item = small(name)
    found = captioning.run(item, 0, "validation")
    metrics, items = found["metrics"], found["items"]
    assert 0 <= captioning.score(metrics) <= 100
    for k in item.settings["shots"]:
        assert len(items[f"names_nats_{k}"]) == len(items["asked"]["names"]) == 9
        assert metrics[f"names_nats_{k}"] > 0
    assert ("names_nats_other_4" in metrics) == ("names_first_of_two" in metrics) == item.trains
    assert (found["cost"]["trainable_parameters"] > 0) == item.trains
    kept = {"environment": records.environment(), "config": item.as_dict()}
    for seed in (0, 1):
        record = records.Record("captioning", item.name, item.label, seed, **kept, **found)
        record.write(tmp_path / "results")
    report.write_reports(tmp_path / "results", tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text().count(item.label) >= 2


def reader(folder, item: experiments.Experiment) -> Reader:
    lm, tokenizer = captioning.load_lm("caption_lm")
    processor = captioning.InterleavedProcessor(tokenizer)
    model = captioning.measure.prepare(lm, captioning.with_marker(item, processor)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_gate_norm" in name:
                parameter.fill_(0.5)
            elif parameter.requires_grad and not parameter.any():  # what starts at 0 behind open gates
                parameter.normal_(std=0.1)
    return Reader(model, PageCollator(processor, 4), 3, sees=item.peft is not None)


def exam() -> Exam:
    return captioning.exam("names", "test", 9, 3)


@pytest.mark.parametrize("name", ["gated_xattn/last", "base/text"])
def test_nats_are_those_of_whole_pages(name, tiny):
    """The prompt is read once and its answers behind it; a whole page has the same loss."""
    asking, found = reader(tiny, small(name)), exam()
    prompts = found.prompts(2)
    nats = asking.answer_nats(prompts, found.candidates)
    marker = asking.collator.processor.media_token if asking.sees else ""
    for index in (0, 4):
        for column, text in enumerate(found.candidates[index]):
            page = [*prompts[index][:-1], replace(prompts[index][-1], answer=text)]
            shown = "<end>" + "".join(s.text(marker, "<end>") for s in page)
            ids = asking.collator.processor(shown)["input_ids"]
            extra = {"vision_features": asking.collator.states([page])} if asking.sees else {}
            with torch.no_grad():
                logits = asking.model(input_ids=ids, **extra).logits[0].log_softmax(-1)
            length = len(asking.tokenizer(f"{text}<end>", add_special_tokens=False)["input_ids"])
            expected = -sum(logits[p - 1, ids[0, p]] for p in range(ids.shape[1] - length, ids.shape[1]))
            assert nats[index, column].item() == pytest.approx(expected.item(), abs=1e-3)


def test_two_images_stand_in_both_prompts(tiny):
    """What is said between the images reads the first: the second changes nothing of it, the first does."""
    asking, found = reader(tiny, small("gated_xattn/last")), exam()
    shown = [captioning._shown(found, i) for i in range(3)]
    pages = [[shown[0], shown[1]], [shown[0], shown[2]], [replace(shown[0], image=shown[2].image), shown[1]]]
    nats = asking.first_nats(pages)
    assert nats[0] == pytest.approx(nats[1].item(), abs=1e-4)
    assert abs(nats[0] - nats[2]) > 1e-3
    alone = asking.answer_nats([[shown[0]]], [[shown[0].answer]])
    assert nats[0] == pytest.approx(alone.item(), abs=1e-3)


def test_exams(tiny):
    for kind in KINDS:
        asked = captioning.exam(kind, "test", 9, 3)
        assert all(c.split == "test" for c in asked.asked)
        assert len({c.thing for c in asked.asked}) == len(asked.asked) == 9
        for caption, row, right in zip(asked.asked, asked.candidates, asked.right.tolist(), strict=True):
            assert row[right] == caption.answer
            assert row.count(caption.answer) == 1
        for prompt in (*asked.prompts(4), *asked.prompts(4, near=True)):
            assert len(prompt) == 5
        own, others = asked.prompts(2), asked.prompts(2, others=True)
        assert all(a[:-1] == b[:-1] and a[-1].image != b[-1].image for a, b in zip(own, others, strict=True))
        assert all(
            set(a) <= set(b) for a, b in zip(asked.prompts(1), asked.prompts(4), strict=True) if kind != "keywords"
        )
    support = {c.image for c in made_up("names") if c.split == "train"}
    likeness = captioning._directions("names") @ captioning._directions("names")[exam().asked[0].image]
    best = max(support, key=lambda p: likeness[p].item())
    assert exam().prompts(3, near=True)[0][-2].image == best
    for i, j in captioning.pairs_of(captioning.exam("questions", "test", 9, 3)):
        a, b = (captioning.exam("questions", "test", 9, 3).asked[k] for k in (i, j))
        assert a.topic == b.topic != "yes or no"
        assert a.answer != b.answer


def test_kept_states_are_what_the_encoder_gives(tiny):
    """Features that are kept and pixels through the encoder: the same logits."""
    from families import tiny as built
    from families import vision_tower
    from transformers import Dinov2Config, Dinov2Model

    eyes = built(Dinov2Model, Dinov2Config(**vision_tower(D)))().eval()
    lm = AutoModelForCausalLM.from_pretrained(tiny).requires_grad_(False)
    item = small("gated_xattn/last")
    marker = lm.config.vocab_size
    config = captioning.with_marker(item, type("P", (), {"media_token_id": marker})()).peft_config()
    model = captioning.measure.get_peft_model(lm, config.with_vision_encoder(eyes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_gate_norm" in name:
                parameter.fill_(0.5)
            elif parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.1)
        pixels = torch.randn(1, 1, 3, eyes.config.image_size, eyes.config.image_size)
        states = eyes(pixel_values=pixels[0]).last_hidden_state[None, :, None]
        ids = torch.tensor([[1, marker, 5, 6]])
        assert torch.equal(
            model(input_ids=ids, pixel_values=pixels).logits, model(input_ids=ids, vision_features=states).logits
        )


def test_pages_of_one_topic_hold_different_things(tiny):
    rng, pages = random.Random(0), Pages("names", ["train"], one_topic=1.0)
    for _ in range(20):
        page = pages.choose(rng, 3)
        assert len({c.thing for c in page}) == len(page)
        assert len({c.topic for c in page}) == 1
        assert {c.split for c in page} == {"train"}


def test_training_shows_others_images_where_it_is_told_to(tiny):
    settings = small("gated_xattn/last").settings
    own, others = (captioning.TrainingPages(settings | {"shown": way}, 0) for way in ("own", "others"))
    images = {c.answer: c.image for c in made_up("names")}
    for pages, expected in ((own, 1.0), (others, 0.0)):
        rows = [next(iterator) for iterator in [iter(pages)] for _ in range(30)]
        names = [s for page in rows for s in page if s.kind == "names"]
        share = sum(images[s.answer] == s.image for s in names) / len(names)
        assert abs(share - expected) < 0.35
    assert [page[0].kind for page in rows[: 2 * len(KINDS)]] == [kind for kind in KINDS for _ in range(2)]


def test_scores_of_what_is_written():
    total, each = captioning.cider(["A red apple.", "a dog"], [["a red apple"], ["two cats"]])
    assert each[1] == 0
    assert total == pytest.approx(sum(each) / 2)
    assert each[0] > 100
    caption = Caption(0, "a, b c", "test", "", "", words=("a", "b c"))
    assert captioning.precision("b c, a, A, x", caption) == pytest.approx(200 / 3)
    assert captioning.precision("", caption) == 0
    asked = [
        Caption(i, answer, "test", topic, "", "?")
        for i, (topic, answer) in enumerate(
            [("colour", "red"), ("shape", "circle"), ("yes or no", "no"), ("yes or no", "yes")]
        )
    ]
    found = captioning.accuracies(["red", "square", "no", "no"], asked)
    assert found == {"vqa": 50, "vqa_colour": 100, "vqa_shape": 0, "vqa_yes or no": 50, "vqa_blind": 75}


def test_shown_text():
    shown = Shown("questions", 0, "what colour?", "red")
    assert shown.text("<image>", "<end>") == "<image>what colour? red<end>"
    assert shown.text("<image>", "<end>", answered=False) == "<image>what colour?"
    assert replace(shown, question="").text("<image>", "<end>", answered=False) == "<image>"


def test_kinds_of_questions():
    assert kind_of_question("is there a circle?", "no") == "yes or no"
    assert kind_of_question("what color is the circle?", "teal") == "colour"
    assert kind_of_question("what shape is present?", "circle") == "shape"
