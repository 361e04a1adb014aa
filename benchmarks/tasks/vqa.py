"""VQA: a BLIP question answerer learns new colours and is tested on other images of them, and of the old ones.

The base knows the questions, the shapes and the old colours. It trains on questions about images of the new colours,
by `transformers.Trainer` and the model's own answer loss. Questions for the colour and for the shape are balanced, and
so are their answers, so that always giving the best answer of a kind reaches the `blind` accuracy. Answers are generated greedily, and ranked: of all
answers of the data set the one of least negative log-likelihood. As the control, the questions about the new colours
are asked of each other's images.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BlipForQuestionAnswering, BlipProcessor

from peft_multimodal import QuestionAnswerCollator
from peft_multimodal.evaluation import vqa_accuracy, vqa_scores

from .. import measure, summary
from .. import report as tables
from ..assets.blip_vqa import KINDS, balanced, blip_vqa, question_length, vqa_questions
from ..assets.easy_vqa import easy_vqa
from ..experiment import Experiment
from ..records import Record
from . import Split

PARTS = ("new", "old")
WAYS = ("generated", "ranked")


def run(experiment: Experiment, seed: int, split: Split) -> dict[str, Any]:
    """Adapt to the new colours, then answer the split's questions about both parts of the colours."""
    folder = blip_vqa()
    model: Any = BlipForQuestionAnswering.from_pretrained(folder)
    model.accepts_loss_kwargs = False  # its loss is a mean over its own batch
    processor: Any = BlipProcessor.from_pretrained(folder)
    length = question_length(processor.tokenizer)
    training, settings = experiment.training, experiment.settings
    collator = QuestionAnswerCollator(processor, model=model, padding="max_length", max_length=length)

    model = measure.prepare(model, experiment)
    cost: dict[str, Any] = measure.footprint(model)
    if experiment.trains:
        size = training["max_steps"] * training["per_device_train_batch_size"]
        train = balanced(questions("train", "new"), size, random.Random(seed))
        cost = measure.fit(model, train, collator, training, seed, rates=experiment.rates)

    parts = PARTS if split == "test" else PARTS[:1]
    tests = {part: test_questions(split, part, settings["questions"]) for part in parts}
    asking = QuestionAnswerCollator(processor, answer_column=None, padding="max_length", max_length=length)
    said = {part: answer(model, processor, asking, rows, settings["eval_batch_size"]) for part, rows in tests.items()}
    found = metrics(said, tests)
    if split == "test":
        shuffled = other_images(tests["new"])
        control = answer(model, processor, asking, shuffled, settings["eval_batch_size"])
        found["shuffled_generated"] = vqa_accuracy(control["generated"], shuffled["answer"])
    return {
        "metrics": found,
        "items": {
            "pictures": {part: list(rows["image_id"]) for part, rows in tests.items()},
            "right": {
                part: {way: vqa_scores(said[part][way], rows["answer"]).tolist() for way in WAYS}
                for part, rows in tests.items()
            },
        },
        "cost": cost,
    }


def score(metrics: Mapping[str, float]) -> float:
    """Accuracy of the generated answers about the new colours."""
    return metrics["new_generated"]


# --------------------------------------------------------------------------------------------------------------- data


@lru_cache(maxsize=1)
def _questions() -> datasets.Dataset:
    datasets.disable_progress_bars()
    return vqa_questions()


def questions(split: str, part: str) -> datasets.Dataset:
    """The split's questions about the old or the new colours."""
    return _questions().filter(lambda s, p: s == split and p == part, input_columns=["split", "colours"])


def test_questions(split: str, part: str, size: int) -> datasets.Dataset:
    """The same balanced `size` questions in every run."""
    return balanced(questions(split, part), size, random.Random(0))


def other_images(rows: datasets.Dataset) -> datasets.Dataset:
    """The same questions and answers, each with the image of the next row."""
    moved = rows.select([*range(1, len(rows)), 0]).select_columns(["image"])
    return datasets.concatenate_datasets([rows.remove_columns("image"), moved], axis=1)


# -------------------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def answer(
    model: Any, processor: Any, collator: QuestionAnswerCollator, rows: datasets.Dataset, batch_size: int
) -> dict[str, list[str]]:
    """The answers to all rows, generated and ranked: `{"generated": [...], "ranked": [...]}`."""
    model.eval()
    candidates = sorted(set(easy_vqa()["answer"]))
    tokens = processor.tokenizer(candidates, padding=True, return_tensors="pt")
    tokens["input_ids"][:, 0] = model.decoder_start_token_id
    said: dict[str, list[str]] = {way: [] for way in WAYS}
    longest = tokens["input_ids"].shape[1]
    for start in range(0, len(rows), batch_size):
        batch = collator([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        found: Tensor = model.generate(**batch, max_new_tokens=longest)
        said["generated"] += [text.strip() for text in processor.batch_decode(found, skip_special_tokens=True)]
        best = answer_nll(model, batch, tokens).argmin(dim=1)
        said["ranked"] += [candidates[i] for i in best.tolist()]
    return said


def answer_nll(model: Any, batch: Mapping[str, Tensor], candidates: Mapping[str, Tensor]) -> Tensor:
    """Negative log-likelihood of every candidate, its end token included, for each question: `(questions, n)`.

    Args:
        candidates: input_ids and attention_mask `(n, L)`, each `[start] answer [sep] [pad]...`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids, mask = candidates["input_ids"], candidates["attention_mask"]
    states = base.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state
    fused = base.text_encoder(
        batch["input_ids"], attention_mask=batch["attention_mask"], encoder_hidden_states=states
    ).last_hidden_state
    size, n = len(fused), len(ids)
    logits = base.text_decoder(
        ids.repeat(size, 1), attention_mask=mask.repeat(size, 1), encoder_hidden_states=fused.repeat_interleave(n, 0)
    ).logits[:, :-1]
    target = ids.repeat(size, 1)[:, 1:]
    loss = F.cross_entropy(logits.transpose(1, 2), target, reduction="none") * mask.repeat(size, 1)[:, 1:]
    return loss.sum(dim=1).view(size, n)


def metrics(said: Mapping[str, Mapping[str, list[str]]], tests: Mapping[str, datasets.Dataset]) -> dict[str, float]:
    """Accuracies in percent: `{part}_{way}`, `{part}_{way}_{kind}`, and `{part}_blind`."""
    flat: dict[str, float] = {}
    for part, rows in tests.items():
        flat[f"{part}_blind"] = blind_accuracy(rows)
        for way in WAYS:
            flat[f"{part}_{way}"] = vqa_accuracy(said[part][way], rows["answer"])
            for kind in KINDS:
                chosen = [i for i, k in enumerate(rows["kind"]) if k == kind]
                answers = [rows["answer"][i] for i in chosen]
                flat[f"{part}_{way}_{kind}"] = vqa_accuracy([said[part][way][i] for i in chosen], answers)
    return flat


def blind_accuracy(rows: datasets.Dataset) -> float:
    """Accuracy of the commonest answer of each kind."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for kind, text in zip(rows["kind"], rows["answer"], strict=True):
        counts[kind][text] += 1
    return 100 * sum(max(found.values()) for found in counts.values()) / len(rows)


# ------------------------------------------------------------------------------------------------------------ report


def report(records: Sequence[Record], plots: Path) -> str:
    """Accuracies, cost and what the paired bootstrap says."""
    groups = tables.by_experiment(records)
    blind = " and ".join(f"{records[0].metrics[f'{part}_blind']:.1f} ({part} colours)" for part in PARTS)
    count = len(records[0].items["pictures"]["new"])
    totals = {f"{part}_{way}": f"{part}, {way}" for part in PARTS for way in WAYS}
    return (
        f"{count} questions about test images of each part of the colours; accuracy in percent, mean ± standard "
        f"deviation over seeds. Answering blindly with the commonest answer of each kind of question gives {blind}; the "
        "last column asks the questions about the new colours of other images.\n\n"
        + summary.quality(groups, totals | {"shuffled_generated": "new, images shuffled"})
        + "\nGenerated answers by the kind of question.\n\n"
        + summary.quality(groups, {f"{part}_generated_{kind}": f"{part}: {kind}" for part in PARTS for kind in KINDS})
        + "\nWhat it costs.\n\n"
        + summary.costs(groups)
        + "\nDifference in the generated answers' accuracy with its 95 % interval, paired bootstrap over test images.\n\n"
        + summary.differences(groups, {part: lambda r, part=part: question_scores(r, part) for part in PARTS})  # type: ignore[misc]
    )


def question_scores(record: Record, part: str) -> tuple[list[float], list[Hashable]]:
    """Each question's accuracy in percent by its generated answer, and its image."""
    return [100 * x for x in record.items["right"][part]["generated"]], record.items["pictures"][part]
