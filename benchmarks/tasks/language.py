"""Language: the English CLIP learns to read other languages from translation pairs alone.

The text tower's place is taken by the frozen encoder e5-small under a small head, which is distilled on translation
pairs to what the English tower makes of the translation; no image is needed, and images' embeddings stay as they
are. Measured on the images of concepts whose names no training pair holds, in the styles that the CLIP was made with:
retrieval by the names in the language, and zero-shot classification into the emoji's groups. Both are compared with
English names in the English CLIP.

| `task` setting | content |
| --- | --- |
| `head` | `own`: the English tower; `adapter`: the method's; `linear` and `mlp`, trained by the same loss, and `ridge`, in closed form, read the mean over a text's tokens; `tuned`: a linear head over an encoder that trains by the experiment's LoRA; `both_ways`: the adapter, with kept outputs and without |
| `languages` | those that are tested |
| `train_languages` | those of the pairs, where others; `en` pairs English with itself, what the encoder then reads |
| `kinds` | of the pairs, see `translation_pairs` |
| `pairs` | so many of them, drawn by the seed; null for all |
| `label_weight` | a label, which is what the tests are about, counts so many times a word or a sentence |
| `with_test` | the test concepts' own pairs train too, an oracle |
| `hidden`, `ridge`, `loss` | of the MLP, of the ridge regression, and of `DistillationLoss` |

The frozen towers' outputs are computed once and kept (`cache_dir() / "language-outputs"`).
"""

from __future__ import annotations

import itertools
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer, TrainerCallback

from peft_multimodal import CrossLingualTrainer, DistillationLoss, LanguageProcessor
from peft_multimodal.evaluation import retention
from peft_multimodal.methods.cross_lingual_adapter import LanguageTower
from peft_multimodal.training.distillation import KeptOutputs, PairCollator

from .. import measure
from .. import report as tables
from ..assets import english_clip
from ..assets.e5_small import e5_small
from ..assets.fetch import cache_dir
from ..assets.languages import LANGUAGES, emoji_labels, translation_pairs
from ..experiment import Experiment
from ..records import Record
from . import Split
from .retrieval import DIRECTIONS, KS, as_lists, load_model, load_processor, ranks_of, recalls, select_images

STYLES = ("google", "twitter")
NAME = "language"
"""The adapter's."""
GROUPS = {
    "smileys-emotion": "smileys and emotion",
    "people-body": "people and body",
    "animals-nature": "animals and nature",
    "food-drink": "food and drink",
    "travel-places": "travel and places",
    "activities": "activities",
    "objects": "objects",
    "symbols": "symbols",
}
GROUP_NAMES = {
    "en": list(GROUPS.values()),
    "zh": ["表情与情感", "人物与身体", "动物与自然", "食物与饮料", "旅行与地点", "活动", "物品", "符号"],
    "ja": ["顔と感情", "人と体", "動物と自然", "食べ物と飲み物", "旅行と場所", "活動", "物", "記号"],
    "de": ["Smileys und Gefühle", "Menschen und Körper", "Tiere und Natur", "Essen und Trinken", "Reisen und Orte", "Aktivitäten", "Gegenstände", "Symbole"],
    "fa": ["شکلک‌ها و احساسات", "مردم و بدن", "حیوانات و طبیعت", "غذا و نوشیدنی", "سفر و مکان‌ها", "فعالیت‌ها", "اشیا", "نمادها"],
}  # fmt: skip
Read = Callable[[Sequence[str]], Tensor]
"""Texts to their embeddings in the CLIP's space, (texts, d)."""


def run(experiment: Experiment, seed: int, split: Split) -> dict[str, Any]:
    """Train on the pairs, then read each language's names of the split's concepts and of the groups."""
    read, cost = HEADS[experiment.settings["head"]](experiment, seed)
    metrics: dict[str, float] = {}
    items: dict[str, Any] = {
        "base": english_clip().name,
        "concepts": list(select_images(split, STYLES[0])["concept"]),
    }
    for language in experiment.settings["languages"]:
        found, items[language] = evaluate(read, language, split)
        metrics |= {f"{language}_{name}": value for name, value in found.items()}
    return {"metrics": metrics, "items": items, "cost": cost}


def score(metrics: Mapping[str, float]) -> float:
    """Mean recall, of several languages their mean."""
    found = [value for name, value in metrics.items() if name.endswith("_mean_recall")]
    return sum(found) / len(found)


# -------------------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(read: Read, language: str, split: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Means over the styles of the recalls and of zero-shot accuracy, in percent, and each item's outcome."""
    names = labels(language)
    texts = read([names[concept] for concept in select_images(split, STYLES[0])["concept"]])
    groups = nn.functional.normalize(read(GROUP_NAMES[language]), dim=-1)
    ranks, right = {}, {}
    for style in STYLES:
        images, truth = embedded_images(split, style)
        ranks[style] = ranks_of({"image_embeds": images, "text_embeds": texts})
        right[style] = ((images @ groups.T).argmax(dim=1) == truth).int()
    by_style = [recalls(ranks[s]) | {"zero_shot": 100 * right[s].double().mean().item()} for s in STYLES]
    metrics = {name: sum(found[name] for found in by_style) / len(STYLES) for name in by_style[0]}
    return metrics, {
        "ranks": {style: as_lists(found) for style, found in ranks.items()},
        "right": {style: found.tolist() for style, found in right.items()},
    }


def labels(language: str) -> dict[str, str]:
    """The concepts' names."""
    if language != "en":
        return emoji_labels(language)
    rows = [select_images(split, STYLES[0]) for split in ("train", "validation", "test")]
    return {c: name for part in rows for c, name in zip(part["concept"], part["label_en"], strict=True)}


@cache
@torch.inference_mode()
def embedded_images(split: str, style: str) -> tuple[Tensor, Tensor]:
    """The frozen images' embeddings (images, d), in the order of `select_images`, and their groups' indices."""
    model, processor, rows = load_model().eval(), load_processor().image_processor, select_images(split, style)
    images = list(rows["image"])
    batches = [processor(images[i : i + 64], return_tensors="pt") for i in range(0, len(images), 64)]
    found = [model.get_image_features(**batch).pooler_output for batch in batches]
    return torch.cat(found), torch.tensor([list(GROUPS).index(group) for group in rows["group"]])


# ---------------------------------------------------------------------------------------------------------- the heads


class MeanHead(nn.Module):
    """In an adapter's place: the mean over a text's tokens, then a linear map, or an MLP of one hidden layer."""

    def __init__(self, width: int, output_dim: int, hidden: int | None, dropout: float) -> None:
        super().__init__()
        sizes = [width, output_dim] if hidden is None else [width, hidden, output_dim]
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        nn.init.zeros_(self.up.bias)

    @property
    def down(self) -> Any:
        return self.layers[0]

    @property
    def up(self) -> Any:
        return self.layers[-1]

    def forward(self, H: Tensor, mask: Tensor, tokens: bool = True) -> tuple[Tensor | None, Tensor]:
        """(B, L, d_s) and a boolean mask (B, L) -> (B, 1, d_t), which nobody reads, or None, and y (B, d_t)."""
        y = self.dropout(means(self.norm(H), mask))
        for layer in self.layers[:-1]:
            y = nn.functional.gelu(layer(y))
        y = self.up(y)
        return y[:, None] if tokens else None, y


def means(states: Tensor, mask: Tensor) -> Tensor:
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class PairTrainer(CrossLingualTrainer):
    """`measure.fit` passes a collator; this trainer has its own."""

    def __init__(self, *args: Any, data_collator: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class Clock(TrainerCallback):
    """Processor seconds of each epoch, making batches among them."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self._started = 0.0

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.process_time()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.epochs.append(time.process_time() - self._started)


def own(experiment: Experiment, seed: int) -> tuple[Read, dict[str, Any]]:
    """The English tower, whatever the language."""
    return partial(read, load_model().eval(), language_processor(), "en"), {"trainable_parameters": 0}


def trained(experiment: Experiment, seed: int) -> tuple[Read, dict[str, Any]]:
    """The adapter, or another head in its place, by `CrossLingualTrainer`."""
    model, part = with_language(experiment)
    settings = experiment.settings
    if settings["head"] in ("linear", "mlp", "tuned"):
        put_head(part, settings["hidden"], (experiment.peft or {}).get("dropout", 0.0))
    if settings["head"] == "tuned":
        tune_encoder(part, experiment)
    cost = distil(model, experiment, seed, cache=settings["head"] != "tuned", folder=outputs_folder())
    return partial(read, model.eval(), language_processor(), NAME), cost


def distil(model: Any, experiment: Experiment, seed: int, cache: bool, folder: Path) -> dict[str, Any]:
    """`measure.fit`, with the loop's processor seconds and those of a late epoch, and with what came before the loop."""
    clock, pairs, started = Clock(), training_pairs(experiment.settings, seed), time.process_time()
    cost = measure.fit(
        model,
        pairs,
        None,
        experiment.training,
        seed,
        PairTrainer,
        processing_class=language_processor(),
        loss=DistillationLoss(**experiment.settings["loss"]),
        cache=cache,
        cache_dir=folder,
        callbacks=[clock],
    )
    return cost | {
        "pairs": len(set(zip(pairs["source"], pairs["target"], strict=True))),
        "train_processor_seconds": round(sum(clock.epochs), 2),
        "epoch_processor_seconds": round(statistics.median(clock.epochs), 2),
        "whole_processor_seconds": round(time.process_time() - started, 2),
    }


def both_ways(experiment: Experiment, seed: int) -> tuple[Read, dict[str, Any]]:
    """The adapter with kept outputs, which are made anew, and with both towers in every step."""
    costs = {}
    for way, kept in (("kept", True), ("both_towers", False)):
        model, _ = with_language(experiment)
        with tempfile.TemporaryDirectory() as folder:
            costs[way] = distil(model, experiment, seed, kept, Path(folder))
    return partial(read, model.eval(), language_processor(), NAME), costs["kept"] | {
        "both_towers": costs["both_towers"]
    }


def ridge(experiment: Experiment, seed: int) -> tuple[Read, dict[str, Any]]:
    """The closed form of the linear head: least squares from the mean vector to the tower's output."""
    model, part = with_language(replace(experiment, peft={"peft_type": "CROSS_LINGUAL_ADAPTER"}))
    head = put_head(part, None)
    processor = language_processor()
    pairs = list(training_pairs(experiment.settings, seed))
    kept = KeptOutputs(part, NAME, pairs, PairCollator(processor, NAME), cache_dir=outputs_folder())
    rows, started = kept.__getitems__(list(range(len(kept)))), time.process_time()
    x = torch.stack([head.norm(torch.tensor(row["student"])).mean(0) for row in rows]).double()
    y = torch.stack([torch.tensor(row["teacher"][0]) for row in rows]).double()
    solve_ridge(head.up, x, y, experiment.settings["ridge"])
    cost = {"trainable_parameters": 0, "map_parameters": sum(p.numel() for p in head.parameters())}
    return partial(read, model.eval(), processor, NAME), cost | {
        "train_processor_seconds": round(time.process_time() - started, 2)
    }


@torch.no_grad()
def solve_ridge(layer: nn.Linear, x: Tensor, y: Tensor, strength: float) -> None:
    """Fit `layer` to x (n, d) -> y (n, d_t), the penalty in units of x's mean variance."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    covariance = (x - mean_x).T @ (x - mean_x) / len(x)
    penalty = strength * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=x.dtype)
    weight = torch.linalg.solve(covariance + penalty, (x - mean_x).T @ (y - mean_y) / len(x))
    layer.weight.copy_(weight.T)
    layer.bias.copy_(mean_y - mean_x @ weight)


HEADS: dict[str, Callable[[Experiment, int], tuple[Read, dict[str, Any]]]] = {
    "own": own, "ridge": ridge, "linear": trained, "mlp": trained, "adapter": trained, "tuned": trained,
    "both_ways": both_ways,
}  # fmt: skip


def with_language(experiment: Experiment) -> tuple[Any, LanguageTower]:
    """The English CLIP with the experiment's adapter over e5-small."""
    settings = dict(experiment.peft or {}) if experiment.settings["head"] != "tuned" else {}
    settings = {"peft_type": "CROSS_LINGUAL_ADAPTER"} | settings | {"encoder": str(e5_small())}
    warnings.filterwarnings("ignore", message="The adapter's folder names its language encoder")
    config = replace(experiment, peft=settings).peft_config()
    model: Any = get_peft_model(load_model().requires_grad_(False), config, adapter_name=NAME)
    return model, model.base_model.language_tower()


def put_head(part: LanguageTower, hidden: int | None, dropout: float = 0.0) -> MeanHead:
    """Another head in the adapter's place."""
    adapter = part.cross_lingual_adapter_language[NAME]
    head = MeanHead(adapter.down.in_features, adapter.up.out_features, hidden, dropout)
    part.cross_lingual_adapter_language[NAME] = head
    return head


def tune_encoder(part: LanguageTower, experiment: Experiment) -> None:
    """Let the encoder train, by the experiment's LoRA."""
    (key,) = part.encoders
    part.encoders[key] = get_peft_model(part.encoders[key], experiment.peft_config())
    with_gradients: Any = LanguageTower.encode.__wrapped__  # type: ignore[attr-defined]
    part.encode = partial(with_gradients, part)  # type: ignore[method-assign]


@torch.inference_mode()
def read(model: Any, processor: LanguageProcessor, language: str, texts: Sequence[str]) -> Tensor:
    """The texts' embeddings, by the tokenizer that `processor` has for `language`."""
    starts = range(0, len(texts), 64)
    batches = (processor(list(texts[i : i + 64]), language=language) for i in starts)
    return torch.cat([model.get_text_features(**batch).pooler_output for batch in batches])


# --------------------------------------------------------------------------------------------------------------- data


@cache
def language_processor() -> LanguageProcessor:
    """The CLIP's tokenizer, and e5-small's for every other language."""
    tokenizers = {"en": load_processor().tokenizer, NAME: AutoTokenizer.from_pretrained(e5_small())}
    return LanguageProcessor(**tokenizers)


def outputs_folder() -> Path:
    """Where the frozen towers' outputs are kept."""
    return cache_dir() / "language-outputs"


def training_pairs(settings: Mapping[str, Any], seed: int) -> datasets.Dataset:
    """Pairs of the training split in the experiment's languages, English with itself for `en`."""
    splits = {"train", "test"} if settings["with_test"] else {"train"}
    pairs: list[dict[str, str]] = []
    for language in settings["train_languages"] or settings["languages"]:
        found = translation_pairs("zh" if language == "en" else language)
        side = "source" if language == "en" else "target"
        rows = ({"source": r["source"], "target": r[side], "kind": r["kind"]} for r in found if r["split"] in splits)
        pairs += [row for row in rows if row["kind"] in settings["kinds"]]
    if settings["pairs"] is not None:
        pairs = random.Random(seed).sample(pairs, settings["pairs"])
    pairs += [pair for pair in pairs if pair["kind"] == "label"] * (settings["label_weight"] - 1)
    return datasets.Dataset.from_list(pairs)


# ------------------------------------------------------------------------------------------------------------- report

METHODS = ("english", "raw", "ridge", "linear", "mlp", "lora", "cross_lingual_adapter")
PEERS = ("ridge", "linear", "mlp")
OURS = ("cross_lingual_adapter/n1", "cross_lingual_adapter/n2")
ENGLISH, SPEED = "english/frozen", "speed/outputs"


def report(records: Sequence[Record], plots: Path) -> str:
    """Chinese in full, the other languages in short, paired differences, cost, and the number of pairs."""
    found = sorted(
        records,
        key=lambda r: (
            r.experiment == SPEED,
            METHODS.index(method) if (method := r.experiment.partition("/")[0]) in METHODS else 0,
            r.cost.get("pairs", 0),
            r.experiment,
            r.seed,
        ),
    )
    groups: dict[str, list[Record]] = {}
    for record in found:
        groups.setdefault(record.experiment, []).append(record)
    speed = groups.pop(SPEED, None)
    english = groups[ENGLISH][0].metrics
    words = {"t2i": "text to image", "i2t": "image to text"}
    single = {f"{d}_r@{k}": f"{words[d]} R@{k}" for d in DIRECTIONS for k in KS}
    shown = [language for language in GROUP_NAMES if any(f"{language}_mean_recall" in r.metrics for r in records)]
    draw(groups, english["en_mean_recall"], plots)
    text = (
        f"{len(records[0].items['concepts'])} unseen concepts in each of two styles, whose mean is given; percent. Mean recall "
        "is that of the six recalls, kept the share of what English names reach in the English CLIP.\n\n"
        + tables.markdown(
            ["Chinese", "seeds", *single.values(), "mean recall", "kept", "zero-shot, 8 groups", "kept"],
            [quality(runs, language, english, single) for runs, language in rows_in(groups, ("en", "zh"))],
        )
    )
    if len(shown) > 2:
        text += "\n" + tables.markdown(
            ["other languages", "seeds", "mean recall", "kept", "zero-shot, 8 groups", "kept"],
            [
                [f"{LANGUAGES[language]}: {row[0]}", *row[1:]]
                for language in shown[2:]
                for row in (quality(runs, language, english, {}) for runs, _ in rows_in(groups, (language,)))
            ],
        )
    text += (
        "\nThe adapter minus the best of ridge, linear and MLP by mean recall on these concepts, with the 95 % interval of "
        "the paired bootstrap over them (each concept's mean over seeds).\n\n"
        + tables.markdown(["", "of", "mean recall", "zero-shot"], differences(groups, shown[1:]))
        + "\nWhat training costs, the frozen towers' outputs being kept already; seconds are the processor's.\n\n"
        + tables.markdown(
            ["", "pairs", "steps", "parameters", "file, MB", "seconds", "ms / step", "peak extra, MB", "learning rate"],
            costs(groups),
        )
    )
    if speed:
        text += "\n" + speed_line(speed[0].cost)
    return text + "\n![Mean recall on Chinese against the number of pairs](results/language_pairs.png)\n"


def rows_in(groups: Mapping[str, list[Record]], languages: Sequence[str]) -> list[tuple[list[Record], str]]:
    """The experiments that were tested on one of the languages, and on which."""
    return [(runs, n) for runs in groups.values() for n in languages if f"{n}_mean_recall" in runs[0].metrics]


def quality(
    runs: Sequence[Record], language: str, english: Mapping[str, float], single: Mapping[str, str]
) -> list[str]:
    """A row of the tables; `single` names the recalls to show one by one."""
    row = [runs[0].label, str(len(runs))]
    row += [tables.mean_spread([r.metrics[f"{language}_{name}"] for r in runs]) for name in single]
    for name in ("mean_recall", "zero_shot"):
        values = [r.metrics[f"{language}_{name}"] for r in runs]
        row += [tables.mean_spread(values), f"{retention(statistics.fmean(values), english[f'en_{name}']):.0f} %"]
    return row


def concept_recalls(language: str, record: Record) -> tuple[list[float], list[Hashable]]:
    """Each concept's share in the mean recall, in percent, and the concepts."""
    ranks = torch.tensor([record.items[language]["ranks"][s][d] for s in STYLES for d in DIRECTIONS])
    hits = torch.stack([(ranks <= k).double() for k in KS])
    return (100 * hits.mean(dim=(0, 1))).tolist(), record.items["concepts"]


def concept_accuracies(language: str, record: Record) -> tuple[list[float], list[Hashable]]:
    """The share of each concept's images that are in the right group, in percent, and the concepts."""
    right = torch.tensor([record.items[language]["right"][s] for s in STYLES]).double()
    return (100 * right.mean(dim=0)).tolist(), record.items["concepts"]


def differences(groups: Mapping[str, list[Record]], languages: Sequence[str]) -> list[list[str]]:
    """Ours in each language against the best peer's runs on the same pairs."""
    rows = []
    for language in languages:
        metric = f"{language}_mean_recall"
        peers = [groups[name] for name in (f"{peer}/{language}" for peer in PEERS) if name in groups]
        own = [
            runs
            for name in OURS
            for n in (name, f"{name}_{language}")
            if (runs := groups.get(n)) and metric in runs[0].metrics
        ]
        if not peers:
            continue
        best = max(peers, key=lambda runs: statistics.fmean(r.metrics[metric] for r in runs))
        for runs in own:
            found = [
                tables.difference(tables.paired(runs, best, partial(values, language)))
                for values in (concept_recalls, concept_accuracies)
            ]
            rows.append([f"{LANGUAGES[language]}: {runs[0].label} − {best[0].label}", *found])
    return rows


def costs(groups: Mapping[str, list[Record]]) -> list[list[str]]:
    rows = []
    for runs in groups.values():
        cost, training = runs[0].cost, runs[0].config["training"]
        if "step_processor_seconds" not in cost or "zh_mean_recall" not in runs[0].metrics:
            continue  # another language costs the same
        median = {
            name: tables.median(r.cost[name] for r in runs)
            for name in ("train_processor_seconds", "step_processor_seconds", "peak_extra_bytes")
        }
        rows.append(
            [
                runs[0].label,
                str(cost["pairs"]),
                str(training["max_steps"]),
                tables.count(cost["trainable_parameters"]),
                tables.megabytes(cost["adapter_bytes"]),
                f"{median['train_processor_seconds']:.0f}",
                f"{1000 * median['step_processor_seconds']:.0f}",
                tables.megabytes(median["peak_extra_bytes"]),
                f"{training['learning_rate']:g}",
            ]
        )
    return rows


def speed_line(cost: Mapping[str, Any]) -> str:
    """The ratios that the kept outputs bring."""
    both = cost["both_towers"]
    whole, epoch = (
        both[f"{name}_processor_seconds"] / cost[f"{name}_processor_seconds"] for name in ("whole", "epoch")
    )
    return (
        f"Five epochs of {cost['pairs']:,} pairs with kept outputs, which are made within them, take {cost['whole_processor_seconds']:.0f} seconds, and "
        f"{both['whole_processor_seconds']:.0f} with both towers in every step, {whole:.1f} times as long; an epoch takes "
        f"{cost['epoch_processor_seconds']:.1f} and {both['epoch_processor_seconds']:.1f} seconds, {epoch:.1f} times as long.\n"
    )


def draw(groups: Mapping[str, list[Record]], english: float, plots: Path) -> None:
    """Mean recall on Chinese against the number of Chinese pairs."""
    own = [runs for name, runs in groups.items() if name == OURS[0] or name.startswith(f"{OURS[0]}_pairs")]
    other = [runs for name, runs in groups.items() if name == "mlp/zh" or name.startswith("mlp/zh_pairs")]
    points = [
        tables.Point(
            runs[0].label, [r.cost["pairs"] for r in runs], [r.metrics["zh_mean_recall"] for r in runs], runs in own
        )
        for runs in (*other, *own)
    ]
    level = ("English names, English CLIP", english)
    tables.plot_points(
        points, plots / "language_pairs.png", "translation pairs", "mean recall, %", log=True, level=level
    )
