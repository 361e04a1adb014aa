"""Few-shot classification: the frozen English CLIP learns classes of images from a few labelled ones.

Two sets: emoji by subgroup, trained in the old styles and tested on unseen concepts in all three, and cut-out photos and
drawings by category. The setting `protocol` says what is learned from:

| protocol | training images | test |
| --- | --- | --- |
| `shots` | 1, 2, 4, 8, 16 a class | all classes |
| `shares` | 12.5, 25, 50, 100 % of all | all classes |
| `base_to_new` | 16 a class of every other class | those classes among themselves, and the others |

The images that are drawn depend on the seed alone, so methods can be compared pair by pair. `classifier` names the
method. The vision tower is frozen, and what it makes of the images is kept (`kept_images.py`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import VisionTextDualEncoderModel, VisionTextDualEncoderProcessor

from peft_multimodal.methods.structured_prompt.dual_encoder import scaled

from .. import measure
from .. import report as tables
from ..assets import english_clip
from ..assets.categories import CLASSES
from ..experiment import Experiment
from ..kept_images import LOWER, KeptImages, as_pixels, kept_images, look_up, look_up_lower
from ..peers.probes import LinearProbe, TipAdapterF
from ..peers.prompts import CoCoOp, TemplateClassifier
from ..records import Record
from . import Split

OLD, NEW = {"emoji": ("google", "twitter"), "photos": None}, {"emoji": "fluent"}
TEMPLATE, CONTEXT = "a photo of a {}", "a photo of a"


def run(experiment: Experiment, seed: int, split: Split) -> dict[str, Any]:
    """Train one classifier for each set and amount of data, and classify the split's images."""
    metrics: dict[str, float] = {}
    hits: dict[str, str] = {}
    costs: list[dict[str, Any]] = []
    means: list[float] = []
    for lesson in lessons(experiment.settings, seed, split):
        learned = CLASSIFIERS[experiment.settings["classifier"]](experiment, lesson)
        costs.append(learned.cost)
        metrics |= {f"{lesson.key}_{name}": value for name, value in learned.traits.items()}
        accuracies = []
        for part, names in lesson.tests.items():
            rows, labels = lesson.test(split, names)
            right = learned.predict(rows, names).argmax(dim=1) == labels
            key = lesson.key + part
            metrics[key] = percent(right)
            accuracies.append(metrics[key])
            hits[key] = "".join("1" if hit else "0" for hit in right.tolist())
            if new := NEW.get(lesson.data):
                styled = [lesson.images.styles[row] == new for row in rows.tolist()]
                metrics[f"{key}_{new}"] = percent(right[torch.tensor(styled)])
        if len(accuracies) > 1:
            metrics[f"{lesson.key}_harmonic"] = statistics.harmonic_mean(accuracies)
        means.append(statistics.harmonic_mean(accuracies))
    metrics["mean"] = statistics.fmean(means)
    concepts = {
        data: [kept_images(data).concepts[row] for row in kept_images(data).rows(split).tolist()]
        for data in experiment.settings["data"]
    }
    return {"metrics": metrics, "items": {"hits": hits, "concepts": concepts}, "cost": total(costs)}


def score(metrics: Mapping[str, float]) -> float:
    """Mean accuracy over the sets and amounts of data; of base classes and new ones their harmonic mean."""
    return metrics["mean"]


def percent(right: Tensor) -> float:
    return 100 * right.double().mean().item()


def total(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sums of seconds, the medians of a step's, and the most of everything else."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for cost in costs for name in cost):
        values = [cost[name] for cost in costs if name in cost]
        merge: Callable[..., Any] = (
            statistics.median if name.startswith("step_") else sum if name.endswith("seconds") else max
        )
        found[name] = merge(values)
    return found


# -------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Lesson:
    """What one classifier learns from."""

    data: str
    key: str
    """`emoji_16`, `emoji_50%`, `emoji_base`."""
    names: list[str]
    """The classes that it learns."""
    rows: Tensor
    """Numbers of its training images."""
    labels: Tensor
    """Their classes' places in `names`."""
    seed: int
    tests: dict[str, list[str]]
    """What is added to the key, and the classes that it is tested among."""

    @property
    def images(self) -> KeptImages:
        return kept_images(self.data)

    def test(self, split: Split, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Numbers of the split's images of these classes, and the classes' places in `names`."""
        place = torch.full((len(self.images.names),), -1)
        place[[self.images.names.index(name) for name in names]] = torch.arange(len(names))
        rows = self.images.rows(split)
        labels = place[self.images.labels[rows]]
        return rows[labels >= 0], labels[labels >= 0]


def lessons(settings: Mapping[str, Any], seed: int, split: Split) -> Iterator[Lesson]:
    """What the protocol asks for; on validation data fewer amounts."""
    protocol = settings["protocol"]
    amounts = settings["validation_shots" if split == "validation" and protocol == "shots" else protocol]
    for data in settings["data"]:
        images = kept_images(data)
        for amount in amounts:
            names = images.names
            tests = {"": names}
            if protocol == "base_to_new":
                tests = {"_base": names[::2], "_new": names[1::2]}
                names = names[::2]
            rows = draw(images, names, amount, protocol == "shares", seed)
            place = {images.names.index(name): i for i, name in enumerate(names)}
            labels = torch.tensor([place[label] for label in images.labels[rows].tolist()])
            key = f"{data}_{amount:g}%" if protocol == "shares" else f"{data}_{amount}"
            yield Lesson(data, key, list(names), rows, labels, seed, tests)


def draw(images: KeptImages, names: Sequence[str], amount: float, share: bool, seed: int) -> Tensor:
    """So many training images of each class, or so many percent of them; fewer ones are among the more."""
    generator = torch.Generator().manual_seed(seed)
    train = images.rows("train", OLD[images.data])
    drawn = []
    for label, name in enumerate(images.names):
        own = train[images.labels[train] == label]
        order = own[torch.randperm(len(own), generator=generator)]
        if name in names:
            drawn.append(order[: math.ceil(len(own) * amount / 100) if share else int(amount)])
    return torch.cat(drawn)


class Numbered(torch.utils.data.Dataset):
    """A lesson's images for `Trainer`."""

    def __init__(self, lesson: Lesson) -> None:
        self.lesson = lesson

    def __len__(self) -> int:
        return len(self.lesson.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.lesson.rows[index], self.lesson.labels[index]


def collate(rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*rows, strict=True)
    return {"pixel_values": as_pixels(torch.stack(images)), "labels": torch.stack(labels)}


# ------------------------------------------------------------------------------------------------------- classifiers


class Learned(NamedTuple):
    """A classifier that has learned."""

    predict: Callable[[Tensor, Sequence[str]], Tensor]
    """Numbers of images (n) and names of classes (C) to logits (n, C)."""
    cost: dict[str, Any]
    traits: dict[str, float]
    """What else there is to say of it."""


def load_clip() -> tuple[Any, Any]:
    """The English CLIP and its tokenizer."""
    model = VisionTextDualEncoderModel.from_pretrained(english_clip()).eval()
    return model, VisionTextDualEncoderProcessor.from_pretrained(english_clip()).tokenizer


@torch.no_grad()
def text_features(names: Sequence[str]) -> tuple[Tensor, float]:
    """The template's features (C, e), of norm 1, and the logit scale."""
    model, tokenizer = load_clip()
    texts = tokenizer([TEMPLATE.format(name) for name in names], padding=True, return_tensors="pt")
    features = F.normalize(model.get_text_features(**texts, return_dict=True).pooler_output, dim=-1)
    return features, model.logit_scale.exp().item()


def zero_shot(experiment: Experiment, lesson: Lesson) -> Learned:
    """The template; nothing trains."""

    def predict(rows: Tensor, names: Sequence[str]) -> Tensor:
        return lesson.images.embeds[rows] @ text_features(names)[0].T

    return Learned(predict, {"trainable_parameters": 0, "adapter_bytes": 0}, {})


def probe(experiment: Experiment, lesson: Lesson) -> Learned:
    """A linear probe on the embeddings, from zero or from the template's features."""
    text, scale = text_features(lesson.names)
    start = text if experiment.settings["start"] == "text" else torch.zeros_like(text)
    return on_embeddings(LinearProbe(start, scale, experiment.settings["penalty"]), experiment, lesson)


def tip_adapter(experiment: Experiment, lesson: Lesson) -> Learned:
    """Tip-Adapter-F."""
    text, scale = text_features(lesson.names)
    embeds = lesson.images.embeds[lesson.rows]
    settings = experiment.settings
    adapter = TipAdapterF(embeds, lesson.labels, text, scale, settings["alpha"], settings["beta"])
    return on_embeddings(adapter, experiment, lesson)


def on_embeddings(model: Any, experiment: Experiment, lesson: Lesson) -> Learned:
    """Fit what reads images' embeddings."""
    measure.prepare(model, experiment)
    started = time.process_time()
    model.fit(lesson.images.embeds[lesson.rows], lesson.labels)
    cost = measure.footprint(model) | {"train_processor_seconds": time.process_time() - started}

    @torch.no_grad()
    def predict(rows: Tensor, names: Sequence[str]) -> Tensor:
        if list(names) != lesson.names:
            raise ValueError("A probe knows the classes that it was trained for.")
        return model(lesson.images.embeds[rows])

    return Learned(predict, cost, {})


def template(experiment: Experiment, lesson: Lesson) -> Learned:
    """The template's text and the images through towers that the experiment's adapter trains."""
    model, tokenizer = load_clip()
    classifier = TemplateClassifier(look_up_lower(model, lesson.images, LOWER), tokenizer, TEMPLATE)
    return by_gradient(measure.prepare(classifier, experiment), classifier.set_classes, experiment, lesson)


def cocoop(experiment: Experiment, lesson: Lesson) -> Learned:
    """CoCoOp, trimmed and with images side by side."""
    model, tokenizer = load_clip()
    classifier = CoCoOp(look_up(model, lesson.images), tokenizer, CONTEXT)
    return by_gradient(measure.prepare(classifier, experiment), classifier.set_classes, experiment, lesson)


def prompt(experiment: Experiment, lesson: Lesson) -> Learned:
    """The package's prompts: CoOp as their general part alone, and the structured ones.

    For the first `static_share` of the steps every image's instance part is Q, so that a step reads one text a class and
    has `static_batch_size` images; the other steps have `instance_learning_rate`, for g starts from 0. `shuffled`: the instance part looks at another image.
    """
    settings, peft, training = experiment.settings, dict(experiment.peft or {}), experiment.training
    if peft.get("domain") == "per_class":
        peft["num_domains"] = len(lesson.names)
    model, tokenizer = load_clip()
    look_up(model, lesson.images, another_image(lesson) if settings["shuffled"] else None)
    wrapped: Any = measure.prepare(model, replace(experiment, peft=peft))

    def set_classes(names: Sequence[str]) -> None:
        wrapped.set_classes(list(names), tokenizer)

    set_classes(lesson.names)
    static = round(settings["static_share"] * training["max_steps"])
    before: dict[str, Any] = {}
    if static:
        first = training | {"max_steps": static, "per_device_train_batch_size": settings["static_batch_size"]}
        started = time.process_time()
        before = measure.fit(StaticPrompts(wrapped), Numbered(lesson), collate, first, lesson.seed)
        before["train_processor_seconds"] = time.process_time() - started
        rest = {"max_steps": training["max_steps"] - static, "learning_rate": settings["instance_learning_rate"]}
        training = training | rest
    learned = by_gradient(wrapped, set_classes, replace(experiment, training=training), lesson)
    for name in ("train_seconds", "train_processor_seconds"):
        learned.cost[name] += before.get(name, 0)
    return learned._replace(traits=traits(wrapped, lesson))


def another_image(lesson: Lesson) -> Tensor:
    """For each image another one of its split."""
    generator = torch.Generator().manual_seed(lesson.seed)
    partner = torch.arange(len(lesson.images.labels))
    for split in ("train", "validation", "test"):
        rows = lesson.images.rows(split)
        cycle = rows[torch.randperm(len(rows), generator=generator)]
        partner[cycle] = cycle.roll(1)
    return partner


class StaticPrompts(nn.Module):
    """The structured prompts with I(x) = Q: what they say of no image in particular."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        part = self.model.base_model.classifier()
        (adapter_name,) = part.live_adapters()
        v = part.look(pixel_values).v
        w = part.static(adapter_name)
        logits = scaled(self.model.get_base_model(), v @ w.T)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def by_gradient(
    model: Any, set_classes: Callable[[Sequence[str]], None], experiment: Experiment, lesson: Lesson
) -> Learned:
    """Train by `Trainer`."""
    set_classes(lesson.names)
    started = time.process_time()
    cost = measure.fit(model, Numbered(lesson), collate, experiment.training, lesson.seed)
    cost["train_processor_seconds"] = time.process_time() - started
    model.eval()

    @torch.no_grad()
    def predict(rows: Tensor, names: Sequence[str]) -> Tensor:
        set_classes(names)
        parts = rows.split(experiment.settings["eval_batch_size"])
        logits = torch.cat([model(pixel_values=as_pixels(part))["logits"] for part in parts])
        set_classes(lesson.names)
        return logits

    return Learned(predict, cost, {})


@torch.no_grad()
def traits(model: Any, lesson: Lesson, images: int = 16, listed: int = 48) -> dict[str, float]:
    """Of an instance part, on test images: how it looks, how far it is open, and what it changes.

    Returns:
        gate: g.
        seen: |g MHA| relative to |Q + g MHA|, what the image adds to the instance context (or to the class features).
        entropy: Of the attention, relative to that of looking at all patches alike.
        swap: Mean distance 1 - cos between a class's features for one image and for another, and
        apart: between two classes' features for one image, to compare with.
        recall: With a shortlist, the share of images in percent whose winner is on it.
    """
    part = model.base_model.classifier()
    (adapter_name,) = part.live_adapters()
    context, config = part.structured_prompt_context[adapter_name], model.peft_config[adapter_name]
    if context.attention is None:
        return {}
    model.eval()
    generator = torch.Generator().manual_seed(0)
    rows = lesson.images.rows("test")
    rows = rows[torch.randperm(len(rows), generator=generator)]
    weights = model.instance_attention(as_pixels(rows[:images]))
    entropy = -(weights * weights.clamp_min(1e-12).log()).sum(dim=-1).mean() / math.log(weights.shape[-1])
    Z = part.look(as_pixels(rows[:images])).Z
    prompts = part.prompts(adapter_name)
    feature = config.mode == "feature"
    static = part.static(adapter_name) if feature else context.instance
    looked = context.attention(static, Z)
    w = F.normalize(looked, dim=-1) if feature else prompts.features(prompts.named(part.listed(adapter_name)), looked)
    found = {
        "gate": context.attention.gate_norm.item(),
        "seen": ((looked - static).norm(dim=-1) / looked.norm(dim=-1)).mean().item(),
        "entropy": entropy.item(),
        "swap": (1 - (w * w.roll(1, dims=0)).sum(dim=-1)).mean().item(),
        "apart": (1 - (w * w.roll(1, dims=1)).sum(dim=-1)).mean().item(),
    }
    if config.shortlist is not None:
        found["recall"] = model.shortlist_recall(as_pixels(rows[:listed]), ks=(config.shortlist,))[config.shortlist]
    return found


CLASSIFIERS: dict[str, Callable[[Experiment, Lesson], Learned]] = {
    "zero_shot": zero_shot,
    "probe": probe,
    "tip_adapter": tip_adapter,
    "template": template,
    "cocoop": cocoop,
    "prompt": prompt,
}


# ------------------------------------------------------------------------------------------------------------ report

OURS = "structured_prompt/shots"
ORDER = (
    "zero_shot", "probe", "probe_from_text", "tip_adapter", "lora", "coop", "cocoop", "structured_prompt",
)  # fmt: skip
AGAINST = (
    "zero_shot/shots",
    "coop/shots",
    "probe_from_text/shots",
    "lora/shots",
    "structured_prompt/no_instance",
    "structured_prompt/shuffled",
)
DRAWN = ("zero_shot/shots", "probe_from_text/shots", "coop/shots", "structured_prompt/shuffled", OURS)
TRAITS = {
    "gate": "gate",
    "seen": "of the instance context, seen in the image",
    "entropy": "attention entropy / uniform",
    "swap": "features' distance, another image",
    "apart": "another class",
    "recall": "winner on the shortlist, %",
}
Groups = Mapping[str, Sequence[Record]]


def report(records: Sequence[Record], plots: Path) -> str:
    """Accuracy by shots and its differences, what the instance part does, shares, new classes, cost; one plot."""
    place = {name: i for i, name in enumerate(ORDER)}
    groups: dict[str, list[Record]] = {}
    for record in sorted(
        records, key=lambda r: (place[r.experiment.partition("/")[0]], r.experiment != OURS, r.experiment, r.seed)
    ):
        groups.setdefault(record.experiment, []).append(record)
    by_protocol = {
        protocol: {name: runs for name, runs in groups.items() if runs[0].config["task"]["protocol"] == protocol}
        for protocol in ("shots", "shares", "base_to_new")
    }
    text = ""
    if shots := by_protocol["shots"]:
        draw_shots(shots, plots)
        text += shots_report(shots)
    if shares := by_protocol["shares"]:
        keys = [f"{share:g}%" for share in next(iter(shares.values()))[0].config["task"]["shares"]]
        text += (
            "\nBy the share of the training images that is learned from, mean ± standard deviation over seeds:\n\n"
            + amounts_table(shares, keys)
            + "\nDifferences with the 95 % interval, paired bootstrap over test concepts, each one's mean over seeds:\n\n"
            + shares_differences(shares)
        )
    if new := by_protocol["base_to_new"]:
        text += (
            "\nBase to new: 16 images of every other class train; accuracy among those classes, among the others, and "
            "the harmonic mean.\n\n"
            + amounts_table(new, [f"16_{part}" for part in ("base", "new", "harmonic")], mean=False)
        )
    return (
        text
        + "\nWhat it costs; seconds are the processor's, for all sets and amounts of a row together.\n\n"
        + costs(groups)
    )


def shots_report(groups: Groups) -> str:
    """Accuracy, paired differences, and the instance part's traits."""
    longest = max((runs[0].config["task"]["shots"] for runs in groups.values()), key=len)
    sizes = {data: len(found) for data, found in concepts_of(groups).items()}
    text = (
        "Accuracy in percent by training images a class, mean ± standard deviation over seeds. Test images: "
        + ", ".join(f"{size} {data}" for data, size in sizes.items())
        + f"; classes: {', '.join(f'{len(CLASSES[data])} {data}' for data in sizes)}.\n\n"
        + amounts_table(groups, [str(k) for k in longest])
    )
    if any("emoji_16_fluent" in runs[0].metrics for runs in groups.values()):
        text += "\nEmoji in the unseen style alone:\n\n" + amounts_table(
            {name: runs for name, runs in groups.items() if "emoji" in runs[0].config["task"]["data"]},
            [f"{k}_fluent" for k in longest],
            sets=["emoji"],
        )
    if OURS in groups:
        rows = []
        for other in (name for name in AGAINST if name in groups):
            for data in sizes:
                both = [set(groups[name][0].config["task"]["shots"]) - {0} or set(longest) for name in (OURS, other)]
                shared = sorted(both[0] & both[1])
                cells = [difference(groups[OURS], groups[other], data, [k]) if k in shared else "" for k in longest]
                label = f"− {groups[other][0].label}, {data}"
                rows.append([label, *cells, difference(groups[OURS], groups[other], data, shared)])
        text += (
            f"\n{groups[OURS][0].label} minus other rows with the 95 % interval, paired bootstrap over test concepts, each "
            "one's mean over seeds:\n\n" + tables.markdown(["", *map(str, longest), "all of these"], rows)
        )
    rows = [
        [
            f"{runs[0].label}, {data}",
            *(trait(runs, f"{data}_{runs[0].config['task']['shots'][-1]}_{name}") for name in TRAITS),
        ]
        for runs in groups.values()
        for data in runs[0].config["task"]["data"]
        if any(key.endswith("_gate") for key in runs[0].metrics)
    ]
    if rows:
        text += (
            "\nThe instance part after the most images. Entropy is that of the attention relative to looking at all "
            "patches alike; distances are 1 - cos between a class's features for two images, and between two classes' "
            "for one image.\n\n" + tables.markdown(["", *TRAITS.values()], rows)
        )
    return text + "\n![Accuracy against shots](results/few_shot_accuracy.png)\n"


def trait(runs: Sequence[Record], key: str) -> str:
    return tables.mean_spread([r.metrics[key] for r in runs], 3) if key in runs[0].metrics else ""


def amounts_table(groups: Groups, keys: Sequence[str], sets: Sequence[str] | None = None, mean: bool = True) -> str:
    """Accuracy by set and amount; a cell that was not run is empty."""
    sets = sets or list(dict.fromkeys(data for runs in groups.values() for data in runs[0].config["task"]["data"]))
    rows = []
    for runs in groups.values():
        row = [runs[0].label, str(len(runs))]
        for data in sets:
            found = [[accuracy(run, data, key) for run in runs] for key in keys]
            row += [
                tables.mean_spread([v for v in values if v is not None]) if None not in values else ""
                for values in found
            ]
            if mean:
                whole = all(None not in values for values in found)
                row.append(tables.mean_spread([statistics.fmean(v) for v in zip(*found, strict=True)]) if whole else "")
        rows.append(row)
    heads = [f"{data} {key.replace('_', ' ')}" for data in sets for key in [*keys, *(["mean"] if mean else [])]]
    return tables.markdown(["", "seeds", *heads], rows)


def accuracy(record: Record, data: str, amount: str) -> float | None:
    """The metric, that of no images where nothing is learned."""
    none = "_".join(["0", *amount.split("_")[1:]])
    return record.metrics.get(f"{data}_{amount}", record.metrics.get(f"{data}_{none}"))


def concepts_of(groups: Groups) -> dict[str, list[str]]:
    return {data: found for runs in groups.values() for data, found in runs[0].items["concepts"].items()}


def difference(a: Sequence[Record], b: Sequence[Record], data: str, shots: Sequence[int]) -> str:
    """The paired difference over these shots, where both have the set."""
    if not shots or not all(data in runs[0].config["task"]["data"] for runs in (a, b)):
        return ""
    keys = [f"{data}_{k}" for k in shots]
    return hits_difference(a, b, data, keys, keys)


def hits_difference(
    a: Sequence[Record], b: Sequence[Record], data: str, keys: Sequence[str], others: Sequence[str]
) -> str:
    """a's hits at `keys` minus b's at `others`, paired over test concepts."""
    taken = {b[0].experiment: others, a[0].experiment: keys}

    def values(record: Record) -> tuple[Sequence[float], Sequence[Hashable]]:
        hits = record.items["hits"]
        columns = [hits.get(key, hits.get(f"{data}_0")) for key in taken[record.experiment]]
        return [100 * statistics.fmean(map(int, item)) for item in zip(*columns, strict=True)], record.items[
            "concepts"
        ][data]

    return tables.difference(tables.paired(a, b, values))


def shares_differences(groups: Groups) -> str:
    """What the instance part adds with all of the training images, and half of them against a probe with all."""
    rows = []
    for name in ("structured_prompt/shares", "structured_prompt/feature_shares"):
        for data in groups[name][0].config["task"]["data"] if name in groups else ():
            row = [f"{groups[name][0].label}, {data}"]
            for share, other in (
                ("100%", "structured_prompt/no_instance_shares"),
                ("100%", f"{name}_shuffled"),
                ("100%", "probe/shares"),
                ("50%", "probe/shares"),
                ("50%", "probe_from_text/shares"),
            ):
                found = groups.get(other)
                keys = [f"{data}_{share}"], [f"{data}_100%"]
                row.append(hits_difference(groups[name], found, data, *keys) if found else "")
            rows.append(row)
    heads = ["all − no instance part", "all − shuffled images", "all − probe, all", "half − probe, all"]
    return tables.markdown(["", *heads, "half − probe from text, all"], rows)


def costs(groups: Groups) -> str:
    """Parameters, file, seconds and the settings taken."""
    rows = []
    for runs in groups.values():
        cost, training = runs[0].cost, runs[0].config["training"]
        row = [f"{runs[0].label}, {runs[0].config['task']['protocol'].replace('_', ' ')}"]
        row += [tables.count(cost["trainable_parameters"]), tables.megabytes(cost["adapter_bytes"])]
        if "train_processor_seconds" in cost:
            row.append(f"{tables.median(r.cost['train_processor_seconds'] for r in runs):.0f}")
            row.append(
                f"{training['learning_rate']:g}" if "step_seconds" in cost and "learning_rate" in training else ""
            )
        rows.append(row + [""] * (5 - len(row)))
    return tables.markdown(["", "trained parameters", "file, MB", "training, s", "learning rate"], rows)


def draw_shots(groups: Groups, plots: Path) -> None:
    """Accuracy against shots with the seeds' spread, a panel a set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sets = list(concepts_of(groups))
    figure, panels = plt.subplots(1, len(sets), figsize=(6 * len(sets), 4.5), layout="constrained", squeeze=False)
    for panel, data in zip(panels[0], sets, strict=True):
        for name in (name for name in DRAWN if name in groups):
            runs, shots = groups[name], [k for k in groups[name][0].config["task"]["shots"] if k]
            if not shots:
                panel.axhline(
                    accuracy(runs[0], data, "0"), linestyle="--", color="tab:blue", linewidth=1, label=runs[0].label
                )
                continue
            values = [[run.metrics[f"{data}_{k}"] for run in runs] for k in shots]
            own = name == OURS
            panel.errorbar(
                shots,
                [statistics.fmean(v) for v in values],
                yerr=[statistics.stdev(v) if len(v) > 1 else 0 for v in values],
                marker="o",
                capsize=3,
                label=runs[0].label,
                **({"color": "tab:red", "linewidth": 2} if own else {"linewidth": 1}),
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        panel.set_title(data)
        panel.set_xlabel("training images a class")
        panel.set_ylabel("accuracy, %")
    panels[0][0].legend(fontsize=8)
    plots.mkdir(parents=True, exist_ok=True)
    figure.savefig(plots / "few_shot_accuracy.png", dpi=120)
    plt.close(figure)
