"""Captioning: a language model that has read captions learns to see, and is asked about images of unseen concepts.

The language model and its eyes, DINOv2-S, are frozen. GatedXAttn trains on pages of one to five images with what is
said of them, half of the pages about one topic, every step on pages of all kinds (`assets/captions.py`). A page is

    <end><image>red apple<end><image>what color is the shape? red<end>...

with the tokenizer's end token for `<end>`, and a prompt of k shots is a page of k training images and a test image, whose caption is missing. Measured are

- the nats of the right answer, the end among them;
- accuracy among candidates, the right answer and others of its kind: those of questions by their nats, names and sentences,
  which are rare or long, by the nats that each gains over the bare language model's. A concept that nobody has shown
  can't be named with certainty, but told from others;
- CIDEr of the names and sentences that are written, 100 times the library's score as is usual, and the share of the
  written keywords that are the concept's.

Shots are drawn, or the training images most like the test image (`near`). The control asks about another test
image. Answers to questions are generated too, behind one image and behind two. In prompts of two images an answer
belongs to the image before it: the same text is read with its images in their places and swapped.

| `task` setting | content |
| --- | --- |
| `lm` | `caption_lm`, or a Hub id or a folder of another decoder |
| `kinds` | of captions, that are trained |
| `pages`, `pictures`, `one_topic` | pages of each kind in a step, the most images on one, the share about one topic |
| `frames` | of an animation |
| `shown` | `own` images in training, or `others`' |
| `shots`, `near`, `others` | numbers of shots: drawn, most alike, and those for which the control is measured |
| `written` | for which images texts are written: `own`, and `other` for the control |
| `things`, `candidates` | tested of each kind, at most; answers to choose from |
| `eval_batch_size` | prompts at a time |
"""

from __future__ import annotations

import random
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from peft_multimodal import InterleavedProcessor, MediaCache
from peft_multimodal.evaluation import PairedDifference, paired_bootstrap

from .. import measure, summary
from .. import report as tables
from ..assets.caption_lm import Pages, caption_lm
from ..assets.captions import Caption, captions, patch_states
from ..experiment import Experiment
from ..records import Record
from . import Split

Order = Literal["ordered", "shuffled", "still"]
QUESTIONS = ("colour", "shape", "yes or no")
SHOTS = 4
"""Of the measures that have one number of shots."""


@dataclass(frozen=True)
class Shown:
    """An image in a prompt, with what is said of it."""

    kind: str
    image: int
    question: str
    answer: str
    order: Order = "ordered"

    def text(self, marker: str, end: str, answered: bool = True) -> str:
        said = f"{self.question} {self.answer}{end}".lstrip() if answered else self.question
        return f"{marker}{said}"


Prompt = list[Shown]
"""Shots and, last, the image that is asked about."""


def run(experiment: Experiment, seed: int, split: Split) -> dict[str, Any]:
    """Learn to see, then answer about the split's images."""
    settings = experiment.settings
    lm, tokenizer = load_lm(settings["lm"])
    processor = InterleavedProcessor(tokenizer)
    model = measure.prepare(lm, with_marker(experiment, processor))
    cost: dict[str, Any] = measure.footprint(model)
    collator = PageCollator(processor, settings["frames"])
    if experiment.trains:
        cost = measure.fit(model, TrainingPages(settings, seed), collator, training_of(experiment), seed)
    reader = Reader(model.eval(), collator, settings["eval_batch_size"], sees=experiment.trains)
    metrics, items = evaluate(reader, settings, split)
    return {"metrics": metrics, "items": items, "cost": cost}


def score(metrics: Mapping[str, float]) -> float:
    """Mean of the names' accuracy, the sentences' and the questions', at four shots."""
    return sum(metrics[f"{kind}_right_{SHOTS}"] for kind in ("names", "sentences", "questions")) / 3


def load_lm(name: str) -> tuple[Any, Any]:
    """The language model and its tokenizer."""
    place: Any = caption_lm() if name == "caption_lm" else name
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return lm, tokenizer


def with_marker(experiment: Experiment, processor: InterleavedProcessor) -> Experiment:
    """The experiment for this tokenizer and these eyes."""
    if experiment.peft is None:
        return experiment
    own = {"media_token_id": processor.media_token_id, "vision_hidden_size": patch_states("names").shape[-1]}
    return replace(experiment, peft=experiment.peft | own)


def training_of(experiment: Experiment) -> dict[str, Any]:
    """Every step accumulates over one batch of pages of each kind, as the paper does."""
    settings = experiment.settings
    sizes = {"per_device_train_batch_size": settings["pages"], "gradient_accumulation_steps": len(settings["kinds"])}
    return experiment.training | sizes


# --- training --------------------------------------------------------------------------------------------------------


class TrainingPages(torch.utils.data.IterableDataset):
    """Pages without end: a batch of each kind in turn."""

    def __init__(self, settings: Mapping[str, Any], seed: int) -> None:
        self.settings, self.seed = settings, seed

    def __iter__(self) -> Iterator[Prompt]:
        rng, settings = random.Random(self.seed), self.settings
        pages = {kind: Pages(kind, ["train"], settings["one_topic"]) for kind in settings["kinds"]}
        while True:
            for kind, source in pages.items():
                size = rng.randint(1, settings["pictures"])  # of a batch, so that little of it is padding
                for _ in range(settings["pages"]):
                    chosen = source.choose(rng, size)
                    page = [Shown(kind, c.image, c.question, c.said(rng)) for c in chosen]
                    if settings["shown"] == "others":
                        page = [replace(s, image=rng.choice(source.all).image) for s in page]
                    yield page


class PageCollator:
    """Pages to batches of the model: texts, markers and kept patch states."""

    def __init__(self, processor: InterleavedProcessor, frames: int) -> None:
        self.processor, self.frames = processor, frames
        self.end: str = processor.tokenizer.eos_token

    def __call__(self, pages: Sequence[Prompt]) -> dict[str, Tensor]:
        """Whole pages, with labels."""
        marker, end = self.processor.media_token, self.end
        texts = [end + "".join(s.text(marker, end) for s in page) for page in pages]
        batch = dict(self.processor(texts, padding_side="right"))
        ignored = (batch["attention_mask"] == 0) | (batch["input_ids"] == self.processor.media_token_id)
        return {**batch, "labels": batch["input_ids"].masked_fill(ignored, -100), "vision_features": self.states(pages)}

    def prompts(self, pages: Sequence[Prompt], sees: bool) -> dict[str, Tensor]:
        """Pages without their last answer, padded on the left; without images where nobody sees them."""
        marker, end = self.processor.media_token if sees else "", self.end
        texts = [
            end + "".join(s.text(marker, end) for s in page[:-1]) + page[-1].text(marker, end, answered=False)
            for page in pages
        ]
        batch = dict(self.processor(texts, padding_side="left"))
        return {**batch, "vision_features": self.states(pages)} if sees else batch

    def states(self, pages: Sequence[Prompt]) -> Tensor:
        """(B, T, F, S, D), zeros behind a page's last image."""
        found = [torch.stack([self.frames_of(shown) for shown in page]) for page in pages]
        return torch.nn.utils.rnn.pad_sequence(found, batch_first=True)

    def frames_of(self, shown: Shown) -> Tensor:
        """(F, S, D): the image, or an animation's frames, evenly spaced."""
        states = patch_states(shown.kind)[shown.image]
        if len(states) == 1:
            return states
        places = [i * len(states) // self.frames for i in range(self.frames)]
        if shown.order == "shuffled":
            random.Random(shown.image).shuffle(places)
        return states[[places[0]] * self.frames if shown.order == "still" else places]


# --- answers ---------------------------------------------------------------------------------------------------------


@dataclass
class Reader:
    """Asks a model about prompts."""

    model: Any
    collator: PageCollator
    batch_size: int
    sees: bool

    @property
    def tokenizer(self) -> Any:
        return self.collator.processor.tokenizer

    def answer_nats(self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]) -> Tensor:
        """Nats of each prompt's candidates, the end among them: (prompts, candidates)."""
        size = self.batch_size
        parts = range(0, len(prompts), size)
        return torch.cat([self._nats(prompts[i : i + size], candidates[i : i + size]) for i in parts])

    @torch.no_grad()
    def _nats(self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]) -> Tensor:
        """The prompts are read once, and their candidates behind them."""
        number, past = len(candidates[0]), DynamicCache(config=self.model.config)
        batch = self.collator.prompts(prompts, self.sees)
        media = {"media": MediaCache()} if self.sees else {}
        first = self.model(**batch, **places(batch["attention_mask"]), **media, past_key_values=past).logits[:, -1]
        past.batch_repeat_interleave(number)
        media = {name: kept.repeat_interleave(number) for name, kept in media.items()}
        texts = [f"{text}{self.collator.end}" for row in candidates for text in row]
        answers = self.tokenizer(
            texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt"
        )
        ids, own = answers["input_ids"], answers["attention_mask"]
        mask = torch.cat([batch["attention_mask"].repeat_interleave(number, dim=0), own], dim=1)
        logits = self.model(
            input_ids=ids, attention_mask=mask, **places(mask, ids.shape[1]), **media, past_key_values=past
        ).logits
        logits = torch.cat([first.repeat_interleave(number, dim=0)[:, None], logits[:, :-1]], dim=1)
        nats = F.cross_entropy(logits.float().transpose(1, 2), ids, reduction="none") * own
        return nats.sum(dim=1).unflatten(0, (-1, number))

    def bare_nats(self, kinds: Sequence[tuple[str, str]], candidates: Sequence[Sequence[str]]) -> Tensor:
        """The same of the language model alone, which sees no images and has no shots; `kinds` are (kind, question)."""
        asked = [[Shown(kind, 0, question, "")] for kind, question in kinds]
        blind = replace(self, sees=False)
        if not self.sees:
            return blind.answer_nats(asked, candidates)
        with self.model.disable_adapter():
            return blind.answer_nats(asked, candidates)

    @torch.no_grad()
    def first_nats(self, prompts: Sequence[Prompt]) -> Tensor:
        """Nats of all that is said between the first and the second image: (prompts)."""
        marker, found = self.collator.processor.media_token_id, []
        for start in range(0, len(prompts), self.batch_size):
            batch = self.collator.prompts(prompts[start : start + self.batch_size], self.sees)
            ids = batch["input_ids"]
            marks: Any = ids == marker
            logits = self.model(**batch, **places(batch["attention_mask"])).logits[:, :-1]
            target = ids.masked_fill(marks, 0)[:, 1:]
            nats = F.cross_entropy(logits.float().transpose(1, 2), target, reduction="none")
            found.append((nats * ((marks.cumsum(dim=1) == 1) & ~marks)[:, 1:]).sum(dim=1))
        return torch.cat(found)

    @torch.no_grad()
    def write(self, prompts: Sequence[Prompt], tokens: int) -> list[str]:
        """What the model writes by itself behind the prompts, up to the end."""
        end, written = self.tokenizer.eos_token_id, []
        for start in range(0, len(prompts), self.batch_size):
            batch = self.collator.prompts(prompts[start : start + self.batch_size], self.sees)
            ids = self.model.generate(
                **batch, max_new_tokens=tokens, do_sample=False, eos_token_id=end, pad_token_id=end
            )
            new = ids[:, batch["input_ids"].shape[1] :]
            written += [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        return written


def places(mask: Tensor, length: int | None = None) -> dict[str, Tensor]:
    """Positions of the last `length` tokens, padding on the left not counted."""
    found = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return {"position_ids": found if length is None else found[:, -length:]}


# --- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exam:
    """Images of a split that are asked about, each with candidate answers, the right one in `right`."""

    kind: str
    asked: list[Caption]
    candidates: list[list[str]]
    right: Tensor

    def prompts(self, shots: int, near: bool = False, others: bool = False, order: Order = "ordered") -> list[Prompt]:
        """Behind `shots` training images: drawn, the nearest last, or with the next test image in the own's place."""
        found = []
        for index, caption in enumerate(self.asked):
            seen = self.asked[(index + 1) % len(self.asked)] if others else caption
            support = nearest(self.kind, caption.image, shots) if near else drawn(self.kind, index, shots)
            rng = random.Random(index)
            shown = [Shown(self.kind, c.image, c.question, c.said(rng)) for c in support]
            found.append([*shown, Shown(self.kind, seen.image, caption.question, caption.answer, order)])
        return found

    def usual_nats(self, reader: Reader) -> Tensor:
        """What candidates are ranked by their gain over: their nats for the bare language model, or nothing."""
        if self.kind == "questions":  # one word each, and some of them no answer to what is asked
            return torch.zeros(len(self.asked), len(self.candidates[0]))
        return reader.bare_nats([(self.kind, c.question) for c in self.asked], self.candidates)


@cache
def exam(kind: str, split: str, things: int, candidates: int) -> Exam:
    """The same in every run: different things, one image each, spread over the split."""
    rng = random.Random(0)
    found: dict[str, Caption] = {}
    rows = [c for c in captions(kind) if c.split == split]
    rng.shuffle(rows)
    for caption in rows:
        found.setdefault(caption.thing, caption)
    if kind == "questions":
        asked = balanced(rows, things)
        answers = sorted({c.answer for c in captions(kind)})
        return Exam(kind, asked, [answers] * len(asked), torch.tensor([answers.index(c.answer) for c in asked]))
    asked = sorted(found.values(), key=lambda c: c.thing)
    asked = [asked[i * len(asked) // min(things, len(asked))] for i in range(min(things, len(asked)))]
    choices, right = [], []
    for caption in asked:
        wrong = sorted({c.answer for c in asked if c.thing != caption.thing and c.answer != caption.answer})
        row = [*rng.sample(wrong, candidates - 1), caption.answer]
        rng.shuffle(row)
        choices.append(row)
        right.append(row.index(caption.answer))
    return Exam(kind, asked, choices, torch.tensor(right))


def balanced(rows: Sequence[Caption], size: int) -> list[Caption]:
    """As many questions of each kind, and of a kind as many of each answer as there are."""
    cells: dict[str, dict[str, list[Caption]]] = defaultdict(lambda: defaultdict(list))
    for caption in rows:
        cells[caption.topic][caption.answer].append(caption)
    found = []
    for topic in QUESTIONS:
        answers = [cells[topic][answer] for answer in sorted(cells[topic])]
        found += [answers[i % len(answers)][i // len(answers)] for i in range(size // len(QUESTIONS))]
    return found


@cache
def _support(kind: str) -> list[Caption]:
    return [c for c in captions(kind) if c.split == "train"]


def drawn(kind: str, seed: int, shots: int) -> list[Caption]:
    """Training captions; more shots are the same and others before them."""
    return random.Random(seed).sample(_support(kind), 8)[:shots][::-1]


@cache
def _directions(kind: str) -> Tensor:
    return F.normalize(patch_states(kind).mean(dim=(1, 2)), dim=-1)


def nearest(kind: str, image: int, shots: int) -> list[Caption]:
    """Training captions of different things whose images are most like this one, the nearest last."""
    support = _support(kind)
    found: dict[str, Caption] = {}
    likeness = _directions(kind)[[c.image for c in support]] @ _directions(kind)[image]
    for index in likeness.argsort(descending=True).tolist():
        found.setdefault(support[index].thing, support[index])
        if len(found) == shots:
            break
    return list(found.values())[:shots][::-1]


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluate(reader: Reader, settings: Mapping[str, Any], split: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics, and what became of each test image."""
    metrics: dict[str, float] = {}
    items: dict[str, Any] = {}
    shots, near, others = (settings[name] for name in ("shots", "near", "others"))
    exams = {
        kind: exam(kind, split, settings["things"], settings["candidates"])
        for kind in ("names", "sentences", "keywords", "questions", "animations")
    }

    def ask(name: str, exam: Exam, prompts: list[Prompt], usual: Tensor) -> None:
        nats = reader.answer_nats(prompts, exam.candidates)
        own = nats.gather(1, exam.right[:, None])[:, 0]
        right = (nats - usual).argmin(dim=1) == exam.right
        metrics[f"{exam.kind}_nats_{name}"] = own.mean().item()
        metrics[f"{exam.kind}_right_{name}"] = 100 * right.double().mean().item()
        items[f"{exam.kind}_nats_{name}"] = [round(x, 3) for x in own.tolist()]
        items[f"{exam.kind}_right_{name}"] = right.int().tolist()

    for kind in ("names", "sentences", "questions"):
        found, usual = exams[kind], exams[kind].usual_nats(reader)
        for k in shots if kind == "names" else sorted({0, SHOTS} & set(shots)):
            ask(f"{k}", found, found.prompts(k), usual)
        for k in near if kind == "names" else ():
            ask(f"near_{k}", found, found.prompts(k, near=True), usual)
        for k in others if reader.sees else ():
            ask(f"other_{k}", found, found.prompts(k, others=True), usual)
    for order in ("ordered", "shuffled", "still") if reader.sees else ("ordered",):
        found = exams["animations"]
        ask(order, found, found.prompts(2, order=order), found.usual_nats(reader))

    for kind, tokens in (("names", 8), ("keywords", 16), ("sentences", 20)):
        for name in settings["written"] if reader.sees else ("own",):
            found = exams[kind]
            written = reader.write(found.prompts(SHOTS, others=name == "other"), tokens)
            if kind == "keywords":
                each = [precision(text, c) for text, c in zip(written, found.asked, strict=True)]
                metrics[f"keywords_precision_{name}"] = sum(each) / len(each)
            else:
                metrics[f"{kind}_cider_{name}"], each = cider(written, [[c.answer] for c in found.asked])
            items[f"{kind}_scores_{name}"] = [round(x, 1) for x in each]
            items[f"{kind}_written_{name}"] = written
    answered = reader.write(exams["questions"].prompts(0), 3)
    metrics |= accuracies(answered, exams["questions"].asked)
    items["questions_written_own"] = answered
    for kind in ("names", "questions") if reader.sees else ():
        for place, values in two_images(reader, exams[kind]).items():
            metrics[f"{kind}_{place}"] = 100 * sum(values) / len(values)
            items[f"{kind}_{place}"] = values
    pairs = pairs_of(exams["questions"])
    answered = reader.write([[_shown(exams["questions"], i) for i in pair] for pair in pairs], 3)
    for which, name in enumerate(("first", "second")):
        hits = [a == exams["questions"].asked[pair[which]].answer for a, pair in zip(answered, pairs, strict=True)]
        metrics[f"vqa_two_{name}"] = 100 * sum(hits) / len(hits)
    items["asked"] = {kind: [c.thing for c in found.asked] for kind, found in exams.items()}
    return metrics, items


def accuracies(answered: Sequence[str], asked: Sequence[Caption]) -> dict[str, float]:
    """Percent of the generated answers that are right, in all and of each kind; `blind`: the commonest of a kind."""
    right = [a == c.answer for a, c in zip(answered, asked, strict=True)]
    found = {"vqa": 100 * sum(right) / len(right)}
    best = 0
    for topic in QUESTIONS:
        chosen = [i for i, c in enumerate(asked) if c.topic == topic]
        found[f"vqa_{topic}"] = 100 * sum(right[i] for i in chosen) / len(chosen)
        best += max(Counter(asked[i].answer for i in chosen).values())
    return found | {"vqa_blind": 100 * best / len(asked)}


def two_images(reader: Reader, exam: Exam) -> dict[str, list[int]]:
    """Whether the first and the second answer are likelier than in the same text with its two images swapped."""
    pages = [[_shown(exam, i), _shown(exam, j)] for i, j in pairs_of(exam)]
    swapped = [[replace(a, image=b.image), replace(b, image=a.image)] for a, b in pages]
    answers = [[page[1].answer] for page in pages]
    own, others = ((reader.first_nats(shown), reader.answer_nats(shown, answers)[:, 0]) for shown in (pages, swapped))
    return {
        f"{place}_of_two": (a < b).int().tolist() for place, a, b in zip(("first", "second"), own, others, strict=True)
    }


def _shown(exam: Exam, index: int) -> Shown:
    caption = exam.asked[index]
    return Shown(exam.kind, caption.image, caption.question, caption.answer)


def pairs_of(exam: Exam) -> list[tuple[int, int]]:
    """Pairs of images with different answers; of questions, of one topic and not for yes or no."""
    usable = [i for i, c in enumerate(exam.asked) if c.topic != "yes or no"]
    found = []
    for i in usable:
        others = [
            j for j in usable
            if exam.asked[j].answer != exam.asked[i].answer
            and (exam.kind != "questions" or exam.asked[j].topic == exam.asked[i].topic)
        ]  # fmt: skip
        found.append((i, random.Random(i).choice(others)))
    return found


def cider(written: Sequence[str], truth: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """CIDEr, 100 times the library's, of lower-case words without punctuation; its mean and each text's."""
    from pycocoevalcap.cider.cider import Cider

    said = {i: [words(text)] for i, text in enumerate(written)}
    total, each = Cider().compute_score({i: [words(t) for t in texts] for i, texts in enumerate(truth)}, said)
    return 100 * float(total), [100 * float(x) for x in each]


def precision(written: str, caption: Caption) -> float:
    """Percent of the written keywords, each once, that are the concept's."""
    found = {words(word) for word in written.split(",")} - {""}
    return 100 * len(found & {words(word) for word in caption.words}) / max(1, len(found))


def words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


# ------------------------------------------------------------------------------------------------------------ report


def report(records: Sequence[Record], plots: Path) -> str:
    """More shots, controls, ablations, cost, and what the paired bootstrap says."""
    groups = tables.by_experiment(records)
    sizes = {kind: len(found) for kind, found in records[0].items["asked"].items()}
    main = groups.get(MAIN, [])
    settings = records[0].config["task"]
    chance = 100 / settings["candidates"]
    parts = [
        f"{sizes['names']} unseen emoji concepts, {sizes['sentences']} photos of unseen families, {sizes['questions']} "
        f"questions about test images, {sizes['animations']} animations of unseen concepts; mean ± standard deviation "
        f"over seeds. Right: percent of {settings['candidates']} candidates (chance {chance:.0f}), by the nats that each gains "
        "over the bare language model's; of questions all 13 answers (chance 8), by their nats. Nats: of the right answer.\n"
    ]
    if main:
        parts += ["\nMore shots, names of unseen concepts.\n\n" + more_shots(groups)]
        parts += ["\nThe same images, and another test image in their place.\n\n" + controls(main)]
    parts += [
        f"\nEverything at {SHOTS} shots; written without shots: answers to questions.\n\n" + _table(groups, MEASURES),
        "\nPrompts of two images, each with its answer. Names and questions: percent whose first and second answer is "
        "likelier than with the two images swapped (chance 50). Written: percent whose second question is answered "
        "with the second image's answer, and with the first's. And animations with their frames in order, shuffled, "
        "and the first alone.\n\n" + _table(groups, BINDING),
        "\nWhat it costs.\n\n" + costs(groups),
    ]
    if main:
        parts += [
            f"\nDifference from {main[0].label} with its 95 % interval, paired bootstrap over test images.\n\n"
            + differences(groups, main)
        ]
    return "".join(parts)


MAIN = "gated_xattn/last"
MEASURES = {
    f"names_right_{SHOTS}": "names right",
    f"names_nats_{SHOTS}": "nats",
    f"sentences_right_{SHOTS}": "sentences right",
    f"sentences_nats_{SHOTS}": "nats",
    "names_cider_own": "names’ CIDEr",
    "sentences_cider_own": "sentences’ CIDEr",
    "keywords_precision_own": "keywords right",
    "vqa": "questions answered",
    **{f"vqa_{topic}": topic for topic in QUESTIONS},
}
BINDING = {
    "names_first_of_two": "names: first",
    "names_second_of_two": "second",
    "questions_first_of_two": "questions: first",
    "questions_second_of_two": "second",
    "vqa_two_second": "written: the second’s",
    "vqa_two_first": "the first’s",
    "animations_right_ordered": "animations right",
    "animations_right_shuffled": "shuffled",
    "animations_right_still": "still",
}
CONTROLS = {
    f"names: right, {SHOTS} shots": (f"names_right_{SHOTS}", f"names_right_other_{SHOTS}"),
    f"names: nats, {SHOTS} shots": (f"names_nats_{SHOTS}", f"names_nats_other_{SHOTS}"),
    "names: right, no shots": ("names_right_0", "names_right_other_0"),
    f"sentences: right, {SHOTS} shots": (f"sentences_right_{SHOTS}", f"sentences_right_other_{SHOTS}"),
    f"sentences: nats, {SHOTS} shots": (f"sentences_nats_{SHOTS}", f"sentences_nats_other_{SHOTS}"),
    f"questions: right, {SHOTS} shots": (f"questions_right_{SHOTS}", f"questions_right_other_{SHOTS}"),
    "names: CIDEr": ("names_scores_own", "names_scores_other"),
    "sentences: CIDEr": ("sentences_scores_own", "sentences_scores_other"),
    "keywords: right": ("keywords_scores_own", "keywords_scores_other"),
}
"""Head: the items of the own images and those of others."""
DIFFERENCES = {
    "names right": f"names_right_{SHOTS}",
    "names, nats": f"names_nats_{SHOTS}",
    "sentences, nats": f"sentences_nats_{SHOTS}",
    "questions right": f"questions_right_{SHOTS}",
}


def _table(groups: summary.Groups, columns: Mapping[str, str]) -> str:
    rows = [
        [runs[0].label, str(len(runs)), *(_cell([r.metrics[m] for r in runs if m in r.metrics]) for m in columns)]
        for runs in groups.values()
    ]
    return tables.markdown(["", "seeds", *columns.values()], rows)


def _cell(values: Sequence[float], digits: int = 1) -> str:
    return tables.mean_spread(values, digits) if values else ""


def more_shots(groups: summary.Groups) -> str:
    """Rows of every experiment that has more than two numbers of shots, drawn and nearest."""
    rows = []
    for runs in groups.values():
        shots = runs[0].config["task"]["shots"]
        if len(shots) < 3:
            continue
        for head, infix, digits in (("right", "right", 1), ("nats", "nats", 2)):
            for way, prefix in (("drawn", ""), ("nearest", "near_")):
                found = [[r.metrics.get(f"names_{infix}_{prefix if k else ''}{k}") for r in runs] for k in shots]
                cells = [_cell([v for v in values if v is not None], digits) for values in found]
                rows.append([f"{runs[0].label}: {head}, {way} shots", *cells])
    shots = max((runs[0].config["task"]["shots"] for runs in groups.values()), key=len)
    return tables.markdown(["", *(str(k) for k in shots)], rows)


def controls(runs: Sequence[Record]) -> str:
    rows = []
    for head, (own, other) in CONTROLS.items():
        if own not in runs[0].items or other not in runs[0].items:
            continue
        factor = 100 if "_right_" in own else 1
        each = {
            name: [factor * sum(r.items[name]) / len(r.items[name]) for r in runs] for name in (own, other)
        }  # fmt: skip
        found = paired(runs, runs, own, other)
        rows.append([head, *(tables.mean_spread(each[name]) for name in (own, other)), tables.difference(found)])
    return tables.markdown([f"{runs[0].label}", "own images", "others’", "difference"], rows)


def paired(a: Sequence[Record], b: Sequence[Record], own: str, other: str) -> PairedDifference:
    """Bootstrap over test images of a's item minus b's, each the mean over seeds."""
    kind = own.partition("_")[0]
    factor = 100 if "_right_" in own else 1
    left, right = (
        [factor * statistics.fmean(values) for values in zip(*(r.items[name] for r in runs), strict=True)]
        for runs, name in ((a, own), (b, other))
    )
    groups: list[Hashable] = list(a[0].items["asked"][kind])
    return paired_bootstrap(left, right, groups)


def differences(groups: summary.Groups, main: Sequence[Record]) -> str:
    rows = [
        [runs[0].label, *(tables.difference(paired(runs, main, item, item)) for item in DIFFERENCES.values())]
        for name, runs in groups.items()
        if name != MAIN
    ]
    return tables.markdown(["", *DIFFERENCES], rows)


def costs(groups: summary.Groups) -> str:
    """Trained parameters, the file, and a step's processor seconds relative to the main row's."""
    reference = [r.cost["step_processor_seconds"] for r in groups.get(MAIN, [])]
    rows = []
    for runs in groups.values():
        cost = runs[0].cost
        row = [runs[0].label, tables.count(cost["trainable_parameters"]), tables.megabytes(cost["adapter_bytes"])]
        if "step_processor_seconds" in cost:
            step = tables.median(r.cost["step_processor_seconds"] for r in runs)
            relative = f"{step / tables.median(reference):.2f}" if reference else ""
            row += [relative, f"{runs[0].config['training']['learning_rate']:g}"]
        rows.append(row + [""] * (5 - len(row)))
    return tables.markdown(["", "trained parameters", "file, MB", "step / GatedXAttn", "learning rate"], rows)
