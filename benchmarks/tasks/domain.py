"""Domain: the English CLIP learns a narrow domain from a pool in which most pairs are general ones that it knows.

Two pools, each one part domain to about six parts general pairs; only the oracle knows which is which:

| pool | domain | general |
| --- | --- | --- |
| `photos` | cut-out photos with sentences | emoji of training concepts in the styles the CLIP was made with |
| `style` | emoji of some training concepts in a style that it has never seen | those of other concepts in its own styles |

General pairs are known ones: the CLIP finds image and name among a style's thousand at rank 10 or better, on the mean
of both directions. The rest of its own styles, a fifth, is as hard to it as a new domain, and would be no general data.

Measured are recall in both directions and zero-shot accuracy on unseen images of the domain, and recall on unseen
concepts in the CLIP's own styles: the general score, whose fall is what was forgotten.

| `task` setting | content |
| --- | --- |
| `pools` | the pools to train on, one after the other |
| `all_domain_pairs` | the domain's pairs are all that there are, not as many as the general ones allow for |
| `noise` | share of the pool's captions that are shuffled among themselves |
| `bank` | fields of `HardSampling`; null without a bank |
| `share_of` | instead of a bank: an experiment; an oracle draws the domain as often as its run with this seed did |
| `keep_close` | lambda of the term that keeps embeddings near the unadapted model's |
| `frozen_vision_layers` | whose outputs are computed once and kept |

A setting is chosen by the mean of the domain's recall and the general one on validation data, over both pools.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from peft_multimodal import ContrastiveTrainer, HardSampleBank
from peft_multimodal.evaluation import compute_embeddings, forgetting
from peft_multimodal.training.hard_samples import hash_ids

from .. import measure
from .. import report as tables
from ..assets import english_clip
from ..assets.images import LARGEST_FAMILY, NEW_STYLE, OLD_STYLES, split_families
from ..assets.photos import photos
from ..experiment import Experiment
from ..records import RESULTS, Record, read_json, record_path
from . import Split
from .language import GROUPS
from .retrieval import (
    KeptStatesCollator,
    as_lists,
    kept_states,
    load_model,
    load_processor,
    lower_outputs,
    ranks_of,
    recalls,
    select_images,
    skip_lower_layers,
)

POOLS = {"photos": "photos", "style": "an unseen style"}


def run(experiment: Experiment, seed: int, split: Split) -> dict[str, Any]:
    """Train on each pool, then measure its domain and the general ability."""
    metrics: dict[str, float] = {}
    items: dict[str, Any] = {"base": english_clip().name}
    costs = {}
    for pool in experiment.settings["pools"]:
        found, items[pool], costs[pool] = adapt(experiment, seed, split, pool)
        metrics |= {f"{pool}_{name}": value for name, value in found.items()}
    return {"metrics": metrics, "items": items, "cost": costs[experiment.settings["pools"][0]] | {"pools": costs}}


def score(metrics: Mapping[str, float]) -> float:
    """The mean of the domain's and the general mean recall, over the pools."""
    names = [f"{pool}_{what}" for pool in POOLS for what in ("domain", "general")]
    return statistics.fmean(metrics[name] for name in names if name in metrics)


# ----------------------------------------------------------------------------------------------------------- training


def adapt(
    experiment: Experiment, seed: int, split: Split, pool: str
) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    """One pool: (metrics, items, cost)."""
    settings = experiment.settings
    layers = settings["frozen_vision_layers"]
    model: Any = load_model()
    adapted = measure.prepare(model, experiment)  # looks at the model as it is
    skip_lower_layers(model, layers)
    model = adapted
    metrics, cost = {}, {"trainable_parameters": 0, "adapter_bytes": 0}
    if experiment.trains:
        pairs = POOL[pool](seed, settings["all_domain_pairs"], settings["noise"], layers)
        bank = make_bank(model, pairs, settings)
        collator = CountingCollator(load_processor())
        trainer: Any = ContrastiveTrainer
        if settings["share_of"] is not None:
            trainer = partial(OracleTrainer, share=share_of(settings["share_of"], seed, pool))
        cost = measure.fit(
            model,
            pairs,
            collator,
            experiment.training,
            seed,
            trainer,
            hard_samples=bank,
            keep_close=settings["keep_close"],
        ) | {"pairs": len(pairs), "domain_pairs": sum(pairs.domain)}
        metrics = {"share": 100 * statistics.fmean(collator.domain)} | describe(bank, pairs)
    reached, items = evaluate(model, pool, split, layers)
    return metrics | reached, items, cost


def make_bank(model: nn.Module, pairs: Pairs, settings: Mapping[str, Any]) -> HardSampleBank | None:
    """The pool's bank, from the unadapted model."""
    if settings["bank"] is None:
        return None
    collator = KeptStatesCollator(load_processor())
    return HardSampleBank.from_model(model, pairs, collator=collator, progress=False, **settings["bank"])


def describe(bank: HardSampleBank | None, pairs: Pairs) -> dict[str, float]:
    """What the bank found hard: the domain before training, and shuffled captions after it."""
    if bank is None:
        return {}
    rows = bank.rows(hash_ids(pairs.ids))
    base, last = bank.base_difficulty[rows], bank.difficulty[rows]
    domain, shuffled = np.array(pairs.domain), np.array(pairs.shuffled)
    found = {
        "domain_base_difficulty": float(base[domain & ~shuffled].mean()),
        "general_base_difficulty": float(base[~domain & ~shuffled].mean()),
    }
    if shuffled.any():
        suspects = np.isin(bank.keys[rows], bank.suspects)
        found |= {
            "noise_auc_base": auc(base[shuffled], base[~shuffled]),
            "noise_auc": auc(last[shuffled], last[~shuffled]),
            "suspects": float(suspects.sum()),
            "suspects_shuffled": float((suspects & shuffled).sum()),
        }
    return found


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The chance that a positive value is above a negative one, ties counting half, in percent."""
    above = np.sign(positive[:, None] - negative[None, :])
    return float(100 * (above.mean() + 1) / 2)


class OracleTrainer(ContrastiveTrainer):
    """Draws domain pairs in a given share."""

    def __init__(self, *args: Any, share: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.share = share

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        pairs: Any = self.train_dataset
        return OracleSampler(pairs.domain, self.share, self._train_batch_size, self.args.seed)


class OracleSampler(Sampler[int]):
    """Batches with a given share of domain pairs, on the mean; none has a pair twice."""

    def __init__(self, domain: Sequence[bool], share: float, batch_size: int, seed: int) -> None:
        self.domain = np.flatnonzero(domain)
        self.general = np.flatnonzero(~np.asarray(domain))
        self.share, self.batch_size = share, batch_size
        self.rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self.domain) + len(self.general)

    def __iter__(self) -> Any:
        for _ in range(len(self) // self.batch_size):
            count = self.rng.binomial(self.batch_size, self.share)
            batch = [
                self.rng.choice(rows, size, replace=False)
                for rows, size in ((self.domain, count), (self.general, self.batch_size - count))
            ]
            yield from self.rng.permutation(np.concatenate(batch)).tolist()


def share_of(experiment: str, seed: int, pool: str) -> float:
    """The domain's share in the batches of another experiment's run with this seed."""
    path = record_path("domain", experiment, seed, RESULTS)
    record = read_json(path)
    if record is None:
        raise FileNotFoundError(f"The oracle draws as often as {experiment} with seed {seed}: run that first.")
    return record["metrics"][f"{pool}_share"] / 100


# -------------------------------------------------------------------------------------------------------------- pools


@dataclass
class Pairs(torch.utils.data.Dataset):
    """Images as the outputs of the frozen layers, with captions; who is who is for the oracle and the report."""

    ids: list[str]
    states: list[Tensor]
    captions: list[str]
    domain: list[bool]
    shuffled: list[bool]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "id": self.ids[index],
            "states": self.states[index],
            "label_en": self.captions[index],
            "domain": self.domain[index],
        }


class CountingCollator(KeptStatesCollator):
    """Remembers of each row that it saw whether it was the domain's."""

    def __init__(self, processor: Any) -> None:
        super().__init__(processor)
        self.domain: list[bool] = []

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        self.domain += [row["domain"] for row in rows]
        return super().__call__(rows)


DOMAIN_PAIRS, GENERAL_PAIRS = 200, 1200
KNOWN_RANK = 10


def photo_pool(seed: int, all_there_are: bool, noise: float, layers: int) -> Pairs:
    """Photos among emoji of all training concepts."""
    rows, states = photo_rows("train"), photo_states("train", layers)
    chosen = range(len(rows)) if all_there_are else sample(range(len(rows)), DOMAIN_PAIRS, seed)
    domain = [(f"photo {i}", states[i], rows[i]["caption_en"], True) for i in chosen]
    return shuffle_captions(domain + general(set(), seed, layers), noise, seed)


def style_pool(seed: int, all_there_are: bool, noise: float, layers: int) -> Pairs:
    """The new style of some concepts, or of all, among the old ones of others."""
    concepts = list(select_images("train", NEW_STYLE)["concept"])
    chosen = set(sample(concepts, DOMAIN_PAIRS, seed))
    left_out = set() if all_there_are else set(concepts) - chosen
    domain = emoji((NEW_STYLE,), layers, left_out, domain=True)
    return shuffle_captions(domain + general(chosen, seed, layers), noise, seed)


POOL: dict[str, Callable[[int, bool, float, int], Pairs]] = {"photos": photo_pool, "style": style_pool}
Pair = tuple[str, Tensor, str, bool]


def sample(items: Sequence[Any], count: int, seed: int) -> list[Any]:
    """So many of them."""
    return random.Random(seed).sample(list(items), count)


def general(without: set[str], seed: int, layers: int) -> list[Pair]:
    """Pairs that the CLIP knows."""
    return sample(emoji(OLD_STYLES, layers, without, domain=False), GENERAL_PAIRS, seed)


def emoji(styles: Sequence[str], layers: int, without: set[str], domain: bool) -> list[Pair]:
    """The training concepts' images in these styles, named; general ones as far as the CLIP knows them."""
    found = []
    for style in styles:
        rows, states = select_images("train", style), kept_states("train", style, layers)
        known = [True] * len(rows) if domain else known_pairs(style, layers)
        for concept, name, state, is_known in zip(rows["concept"], rows["label_en"], states, known, strict=True):
            if concept not in without and is_known:
                found.append((f"{style} {concept}", state, name, domain))
    return found


@cache
def known_pairs(style: str, layers: int) -> list[bool]:
    """Of a style's training pairs, whether the CLIP finds the one by the other."""
    ranks = ranks_of(
        embed(open_model(layers), kept_states("train", style, layers), list(select_images("train", style)["label_en"]))
    )
    return ((ranks["t2i"] + ranks["i2t"]) / 2 <= KNOWN_RANK).tolist()


def shuffle_captions(pairs: Sequence[Pair], noise: float, seed: int) -> Pairs:
    """A share of the captions go round among their pairs."""
    ids, states, captions, domain = (list(column) for column in zip(*pairs, strict=True))
    chosen = random.Random(seed).sample(range(len(pairs)), round(noise * len(pairs)))
    moved = list(captions)
    for here, there in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        moved[here] = captions[there]
    return Pairs(ids, states, moved, domain, [a != b for a, b in zip(captions, moved, strict=True)])


@cache
def photo_rows(split: str) -> list[dict[str, Any]]:
    """The photos of one split, drawings and symbols left out; in validation and test data a caption occurs once."""
    rows = [dict(row) for row in photos() if row["kind"] == "photo" and row["category"] != "symbols"]
    dealt = split_families((row["family"] for row in rows), TEST_PHOTOS, VALIDATION_PHOTOS, LARGEST_FAMILY, seed=0)
    rows = [row for row in rows if dealt[row["family"]] == split]
    return rows if split == "train" else list({row["caption_en"]: row for row in rows}.values())


TEST_PHOTOS, VALIDATION_PHOTOS = 150, 60


@cache
def photo_states(split: str, layers: int) -> Tensor:
    return lower_outputs([row["image"] for row in photo_rows(split)], layers, f"{split} photos")


# --------------------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(model: Any, pool: str, split: Split, layers: int) -> tuple[dict[str, float], dict[str, Any]]:
    """The domain's recall and accuracy, and the general score with what was forgotten."""
    images, names, groups, prompts = DOMAIN[pool](split, layers)

    model.eval()
    embeds = embed(model, images, names)
    ranks = ranks_of(embeds)
    texts = embed(model, images[: len(prompts)], prompts)["text_embeds"]
    right = ((embeds["image_embeds"] @ texts.T).argmax(dim=1) == torch.tensor(groups)).int()

    general: list[dict[str, dict[str, Tensor]]] = []

    def general_score(adapted: Any) -> float:
        general.append(general_ranks(adapted, split, layers))
        return mean_recall(general[-1])

    kept = forgetting(model, general_score, general_before(split, layers))
    metrics = {f"domain_{name}": value for name, value in recalls(ranks).items()}
    metrics |= {
        "domain": metrics["domain_mean_recall"],
        "accuracy": 100 * right.double().mean().item(),
        "general": kept.on,
        "forgotten": kept.forgotten,
    }
    if kept.off is not None:
        metrics["forgotten_off"] = kept.before - kept.off
    items = {
        "ranks": as_lists(ranks),
        "right": right.tolist(),
        "general": {style: as_lists(found) for style, found in general[0].items()},
    }
    return metrics, items


def photo_domain(split: Split, layers: int) -> tuple[Tensor, list[str], list[int], list[str]]:
    """(states, captions, index of each one's category, the categories' names)."""
    rows = photo_rows(split)
    kinds = sorted({row["category"] for row in rows})
    return (
        photo_states(split, layers),
        [row["caption_en"] for row in rows],
        [kinds.index(row["category"]) for row in rows],
        kinds,
    )


def style_domain(split: Split, layers: int) -> tuple[Tensor, list[str], list[int], list[str]]:
    """The same of unseen concepts in the new style."""
    rows = select_images(split, NEW_STYLE)
    groups = [list(GROUPS).index(group) for group in rows["group"]]
    return kept_states(split, NEW_STYLE, layers), list(rows["label_en"]), groups, list(GROUPS.values())


DOMAIN = {"photos": photo_domain, "style": style_domain}


def embed(model: Any, states: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """Unit embeddings of images and captions, row by row."""
    rows = [{"states": s, "label_en": c} for s, c in zip(states, captions, strict=True)]
    return compute_embeddings(model, Rows(rows), KeptStatesCollator(load_processor()), progress=False)


class Rows(torch.utils.data.Dataset):
    """A list as a data set."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def general_ranks(model: Any, split: Split, layers: int) -> dict[str, dict[str, Tensor]]:
    """Unseen concepts' ranks in each of the styles that the CLIP was made with."""
    return {
        style: ranks_of(embed(model, kept_states(split, style, layers), list(select_images(split, style)["label_en"])))
        for style in OLD_STYLES
    }


def mean_recall(ranks: Mapping[str, Mapping[str, Tensor]]) -> float:
    return statistics.fmean(recalls(found)["mean_recall"] for found in ranks.values())


@cache
def general_before(split: Split, layers: int) -> float:
    """The general score of the unadapted model."""
    return mean_recall(general_ranks(open_model(layers), split, layers))


def open_model(layers: int) -> Any:
    """The unadapted model, without its lower layers."""
    model = load_model().eval()
    skip_lower_layers(model, layers)
    return model


# ------------------------------------------------------------------------------------------------------------- report

UNIFORM = {"hard_sample_domain_adapter": "hard_sample_domain_adapter/uniform", "lora": "lora/uniform"}
"""What each method's rows are compared with: itself without bank."""
ORDER = ("base", "full", "lora", "hard_sample_domain_adapter")


def report(records: Sequence[Record], plots: Path) -> str:
    """Both pools, clean and with shuffled captions; paired differences; what the bank found; cost; a plot."""
    found = sorted(records, key=lambda r: (ORDER.index(r.experiment.partition("/")[0]), r.experiment, r.seed))
    groups: dict[str, list[Record]] = {}
    for record in found:
        groups.setdefault(record.experiment, []).append(record)
    for pool in POOLS:
        draw(groups, pool, plots)
    noise = max(r.config["task"]["noise"] for r in records)
    text = (
        f"Pools of {DOMAIN_PAIRS} domain pairs among {GENERAL_PAIRS:,} general ones; percent. Recall is the mean of R@1, 5 "
        "and 10 in both directions, accuracy that of naming an unseen image's category; the general score is recall of "
        "unseen concepts in the CLIP's own styles, and what is forgotten its fall from the frozen base's, with the adapter "
        "on and off. Domain share is that of the training batches.\n"
    )
    for noisy in (False, True):
        chosen = {n: runs for n, runs in groups.items() if (runs[0].config["task"]["noise"] > 0) == noisy}
        for pool, title in POOLS.items():
            if rows := [quality(runs, pool) for runs in chosen.values() if f"{pool}_domain" in runs[0].metrics]:
                head = f"{title}, {100 * noise:.0f} % of the captions shuffled" if noisy else title
                text += f"\n{tables.markdown([head, *QUALITY], rows)}"
    text += (
        "\nDifference to the same method, steps and seed without a bank: mean over seeds ± standard error.\n\n"
        + tables.markdown(
            ["", "seeds", *(f"{t}: {w}" for t in POOLS.values() for w in ("domain", "general"))], gains(groups)
        )
        + f"\nWhat the bank finds hard, as 1 - p of the open model; and with {100 * noise:.0f} % of the captions shuffled, how "
        "well difficulty finds those (AUC), before training and after it, and the guard's suspects.\n\n"
        + tables.markdown(
            ["", "pool", "domain", "general", "AUC before", "after", "suspects", "of them shuffled"], bank_rows(groups)
        )
        + "\nCost; seconds are the processor's. The bank's pass over the pool is beside training.\n\n"
        + tables.markdown(["", "trained parameters", "file, MB", "seconds / step", "learning rate"], costs(groups))
    )
    return (
        text
        + "".join(f"\n![Domain and general recall, {t}](results/domain_{pool}.png)" for pool, t in POOLS.items())
        + "\n"
    )


QUALITY = ("seeds", "domain recall", "accuracy", "general", "forgotten", "switched off", "domain share")


def quality(runs: Sequence[Record], pool: str) -> list[str]:
    """A row of the tables."""
    row = [runs[0].label, str(len(runs))]
    for name in ("domain", "accuracy", "general", "forgotten", "forgotten_off", "share"):
        values = [r.metrics[f"{pool}_{name}"] for r in runs if f"{pool}_{name}" in r.metrics]
        row.append(tables.mean_spread(values) if values else "")
    return row


def gains(groups: Mapping[str, Sequence[Record]]) -> list[list[str]]:
    """Each row that draws or weighs otherwise, against the method alone."""
    rows = []
    for name, runs in groups.items():
        noisy = "_noise" if runs[0].config["task"]["noise"] else ""
        other = {r.seed: r for r in groups.get(f"{UNIFORM.get(name.partition('/')[0])}{noisy}", ())}
        pairs = [(r, other[r.seed]) for r in runs if r.seed in other and r is not other[r.seed]]
        if pairs:
            cells = [
                with_error([a.metrics[f"{pool}_{what}"] - b.metrics[f"{pool}_{what}"] for a, b in pairs])
                for pool in POOLS
                for what in ("domain", "general")
            ]
            rows.append([runs[0].label + (", shuffled captions" if noisy else ""), str(len(pairs)), *cells])
    return rows


def with_error(differences: Sequence[float]) -> str:
    """`+1.2 ± 0.4`: mean and standard error."""
    mean = f"{statistics.fmean(differences):+.1f}"
    return mean if len(differences) < 2 else f"{mean} ± {statistics.stdev(differences) / len(differences) ** 0.5:.1f}"


def bank_rows(groups: Mapping[str, Sequence[Record]]) -> list[list[str]]:
    """Of each row with a bank."""
    rows = []
    for runs in groups.values():
        for pool, title in POOLS.items():
            metrics = [r.metrics for r in runs if f"{pool}_domain_base_difficulty" in r.metrics]
            if not metrics:
                continue
            row = [runs[0].label, title]
            for name, digits in (
                ("domain_base_difficulty", 2), ("general_base_difficulty", 2), ("noise_auc_base", 1), ("noise_auc", 1),
                ("suspects", 0), ("suspects_shuffled", 0),
            ):  # fmt: skip
                values = [m[f"{pool}_{name}"] for m in metrics if f"{pool}_{name}" in m]
                row.append(f"{statistics.fmean(values):.{digits}f}" if values else "")
            rows.append(row)
    return rows


def costs(groups: Mapping[str, Sequence[Record]]) -> list[list[str]]:
    return [
        [
            runs[0].label,
            tables.count(runs[0].cost["trainable_parameters"]),
            tables.megabytes(runs[0].cost["adapter_bytes"]),
            f"{tables.median(r.cost['step_processor_seconds'] for r in runs):.2f}",
            f"{runs[0].config['training']['learning_rate']:g}",
        ]
        for runs in groups.values()
        if "step_processor_seconds" in runs[0].cost and not runs[0].config["task"]["noise"]
    ]


def draw(groups: Mapping[str, Sequence[Record]], pool: str, plots: Path) -> None:
    """Domain recall against what is left of the general one, clean pools."""
    points = [
        tables.Point(
            runs[0].label,
            [r.metrics[f"{pool}_general"] for r in runs],
            [r.metrics[f"{pool}_domain"] for r in runs],
            name.startswith("hard_sample"),
        )
        for name, runs in groups.items()
        if f"{pool}_domain" in runs[0].metrics and not runs[0].config["task"]["noise"]
    ]
    tables.plot_points(points, plots / f"domain_{pool}.png", "general recall, %", "domain recall, %")
