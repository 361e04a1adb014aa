"""Evaluation over whole test sets: retrieval recall, VQA accuracy, bootstrap errors, retention.

The measures are pure functions of embeddings, scores or answers; `RetrievalRecall` and `VQAAccuracy` wrap two of them
as `evaluate.Metric`s that need no network. Accuracies, recalls and retention are in percent.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..core.anatomy import base_model
from ..data import evaluating, without_loss

Ids = Sequence[Hashable] | Tensor

# Cosines are compared in float64, and nearer than this they are a tie: duplicates must not be ranked by rounding noise.
TIE = 1e-9


# --------------------------------------------------------------------------------------------------------- retrieval


def _codes(query_ids: Ids | None, gallery_ids: Ids | None, queries: int, items: int) -> tuple[Tensor, Tensor]:
    """Both sides' ids as int64 codes of one numbering; without ids row i matches row i."""
    if query_ids is None and gallery_ids is None:
        if queries != items:
            raise ValueError(f"{queries} queries and {items} items don't match row by row: pass the ids of both.")
        return torch.arange(queries), torch.arange(items)
    if query_ids is None or gallery_ids is None:
        raise ValueError("Pass the ids of both sides, or of neither.")
    query_ids, gallery_ids = (ids.tolist() if hasattr(ids, "tolist") else list(ids) for ids in (query_ids, gallery_ids))
    if (len(query_ids), len(gallery_ids)) != (queries, items):
        raise ValueError(
            f"{len(query_ids)} and {len(gallery_ids)} ids were given for {queries} queries, {items} items."
        )
    number: dict[Hashable, int] = {}
    gallery = torch.tensor([number.setdefault(i, len(number)) for i in gallery_ids], dtype=torch.long)
    if missing := list(dict.fromkeys(i for i in query_ids if i not in number)):
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise ValueError(f"Queries without a match in the gallery, ids: {missing[:10]}{more}.")
    return torch.tensor([number[i] for i in query_ids], dtype=torch.long), gallery


def _ranks(similarity: Tensor, match: Tensor, tie: float = 0.0) -> Tensor:
    if similarity.isnan().any():
        raise ValueError("The similarities contain NaN.")
    best = similarity.masked_fill(~match, -torch.inf).amax(dim=1, keepdim=True)
    return 1 + ((similarity >= best - tie) & ~match).sum(dim=1)


def retrieval_ranks(similarity: Tensor, query_ids: Ids | None = None, gallery_ids: Ids | None = None) -> Tensor:
    """Rank of the best matching item for each query; 1 is the top.

    The rank is pessimistic: an item that doesn't match counts as before one that does when their scores are equal, so
    that constant scores earn no recall. Other matching items never push a query back.

    Args:
        similarity: Scores, `(queries, items)`, the higher the nearer; -inf is allowed, NaN is not.
        query_ids: One hashable per query. A query matches every item with its id; by default row i matches item i.
        gallery_ids: One hashable per item.

    Returns:
        int64 `(queries,)`, on the CPU.

    Raises:
        ValueError: A query matches nothing (its ids are named), the sizes disagree, or a score is NaN.
    """
    similarity = torch.as_tensor(similarity).detach().cpu().double()
    query, gallery = _codes(query_ids, gallery_ids, *similarity.shape)
    return _ranks(similarity, query[:, None] == gallery)


def embedding_ranks(
    query_embeds: Tensor,
    gallery_embeds: Tensor,
    query_ids: Ids | None = None,
    gallery_ids: Ids | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """`retrieval_ranks` of cosine similarities, `chunk_size` queries at a time.

    The full `(queries, items)` matrix is never held. Cosines are float64 on the CPU; closer than 1e-9 is a tie.

    Args:
        query_embeds: `(queries, d)`.
        gallery_embeds: `(items, d)`.
    """
    query_embeds, gallery_embeds = _unit(query_embeds), _unit(gallery_embeds)
    query, gallery = _codes(query_ids, gallery_ids, len(query_embeds), len(gallery_embeds))
    chunks = zip(query_embeds.split(chunk_size), query.split(chunk_size), strict=True)
    return torch.cat([_ranks(embeds @ gallery_embeds.T, ids[:, None] == gallery, TIE) for embeds, ids in chunks])


def retrieval_recall(
    image_embeds: Tensor,
    text_embeds: Tensor,
    image_ids: Ids | None = None,
    text_ids: Ids | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall@k by cosine similarity over a whole set, image to text and text to image.

    A query counts when at least one item with its id is among its k nearest, ties counted against it. Give each picture
    once, with all of its captions: repeated gallery items crowd out others.

    Args:
        image_embeds: `(images, d)`.
        text_embeds: `(texts, d)`.
        image_ids: One hashable per image, equal to the `text_ids` of its captions; by default row i matches row i.
        text_ids: One hashable per text.

    Returns:
        Percent: `{"i2t_r@1", ..., "t2i_r@1", ..., "mean_recall"}`, the last the mean of the others.

    Raises:
        ValueError: As `retrieval_ranks`; or NaN or infinite embeddings.
    """
    return _recall(
        embedding_ranks(image_embeds, text_embeds, image_ids, text_ids),
        embedding_ranks(text_embeds, image_embeds, text_ids, image_ids),
        ks,
    )


def rerank_recall(
    image_embeds: Tensor,
    text_embeds: Tensor,
    score: Callable[[Tensor, Tensor], Tensor],
    image_ids: Ids | None = None,
    text_ids: Ids | None = None,
    ks: Sequence[int] = (1, 5, 10),
    candidates: int = 128,
    similarity_weight: float = 1.0,
) -> dict[str, float]:
    """Recall@k where each query's nearest `candidates` are re-ranked by a pair score (ALBEF, BLIP).

    Final score of a candidate: `score(image, text) + similarity_weight * cosine`, weight 1 as in BLIP's released
    evaluation, whose `score` is the match logit of the image-text matching head. The rest rank below every candidate.

    Args:
        score: Takes int64 `(n,)` row numbers of the images and of the texts, returns `(n,)` scores; called once for
            each query and direction with `n = min(candidates, gallery size)`.

    Returns:
        The keys of `retrieval_recall`.
    """
    images, texts = _unit(image_embeds), _unit(text_embeds)

    def ranks(queries: Tensor, items: Tensor, query_ids: Ids | None, item_ids: Ids | None, flip: bool) -> Tensor:
        top = min(candidates, len(items))
        if top < min(max(ks), len(items)):
            raise ValueError(f"candidates={candidates} can't give recall@{max(ks)}.")
        codes, gallery = _codes(query_ids, item_ids, len(queries), len(items))
        found = []
        for row, (query, code) in enumerate(zip(queries, codes, strict=True)):
            cosine, index = (items @ query).topk(top)
            pair = (index, torch.full_like(index, row))
            pair_score = score(*(pair if flip else pair[::-1])).detach().cpu().double()
            if pair_score.shape != index.shape:
                raise ValueError(f"score gave shape {tuple(pair_score.shape)} for {top} pairs, not ({top},).")
            final = torch.full((1, len(items)), -torch.inf, dtype=torch.float64)
            final[0, index] = pair_score + similarity_weight * cosine
            found.append(_ranks(final, (gallery == code)[None], TIE))
        return torch.cat(found)

    with torch.no_grad():
        i2t = ranks(images, texts, image_ids, text_ids, flip=False)
        t2i = ranks(texts, images, text_ids, image_ids, flip=True)
    return _recall(i2t, t2i, ks)


def _unit(embeds: Tensor) -> Tensor:
    embeds = torch.as_tensor(embeds).detach().cpu().double()
    if embeds.ndim != 2 or not len(embeds):
        raise ValueError(f"Embeddings have shape {tuple(embeds.shape)}, not (rows, width).")
    if not embeds.isfinite().all():
        raise ValueError("The embeddings contain NaN or infinite values.")
    return F.normalize(embeds, dim=-1)


def _recall(i2t: Tensor, t2i: Tensor, ks: Sequence[int]) -> dict[str, float]:
    if not ks or min(ks) < 1:
        raise ValueError(f"ks={tuple(ks)}: recall@k needs k >= 1.")
    fewest = min(len(i2t), len(t2i))  # each side is the other's gallery
    if trivial := [k for k in ks if k >= fewest]:
        warnings.warn(
            f"Recall@{trivial[0]} among {fewest} items is 100 % for any model, and mean_recall counts it: pass ks= below "
            "the number of items, or evaluate on more.",
            stacklevel=3,
        )
    sides = {"i2t": i2t, "t2i": t2i}
    recall = {f"{side}_r@{k}": 100 * (ranks <= k).double().mean().item() for side, ranks in sides.items() for k in ks}
    return recall | {"mean_recall": sum(recall.values()) / len(recall)}


def compute_embeddings(
    model: nn.Module,
    dataset: Any,
    collator: Callable[[list[Any]], Mapping[str, Any]],
    batch_size: int = 64,
    progress: bool = True,
    encode: Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Unit-length embeddings of a dataset's images and texts, in its order.

    Of rows with several captions each caption is embedded, and the result has the ids that say whose it is: so
    `retrieval_recall(**compute_embeddings(...))` counts any caption of an image. Each module's train or eval mode is
    what it was before, also after an error.

    Args:
        model: Dual encoder with `get_image_features` and `get_text_features`, bare or in a `PeftModel`. Each gets the
            batch's entries that its signature names.
        collator: Makes a batch of rows; `ImageTextCollator` draws no captions here. With no `pixel_values` (no `input_ids`) only texts (images) are embedded.
        encode: `(model, batch) -> (image_embeds, text_embeds)` for models without those two methods, such as
            `training.losses.retrieval_embeddings` for BLIP's retrieval model.

    Returns:
        `{"image_embeds": (rows, d), "text_embeds": (texts, d)}`, float32 on the CPU. Where a row has several captions
        also `image_ids` int64 `(rows,)` and `text_ids` int64 `(texts,)`, the rows' numbers.

    Raises:
        ValueError: The batch has an entry that neither method reads (`return_loss`, `labels`, `ids` apart).
    """
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    parts: dict[str, list[Tensor]] = {}
    loader = DataLoader(
        dataset, batch_size=batch_size, collate_fn=evaluating(without_loss(collator, model), every_text=True)
    )
    rows_of_texts: list[Tensor] = []
    seen = 0
    model.eval()
    try:
        with torch.no_grad():
            for batch in tqdm(loader, desc="Embedding", unit="batch", disable=not progress):
                batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                text_rows = batch.pop("text_rows", None)
                if encode is None:
                    embeds = _features(model, batch)
                else:
                    embeds = dict(zip(("image_embeds", "text_embeds"), encode(model, batch), strict=True))
                for name, rows in embeds.items():
                    parts.setdefault(name, []).append(F.normalize(rows.float(), dim=-1).cpu())
                if text_rows is not None:
                    rows_of_texts.append(text_rows.cpu() + seen)
                    seen += len(embeds["image_embeds"])
    finally:
        for module, mode in modes.items():
            module.training = mode
    found = {name: torch.cat(rows) for name, rows in parts.items()}
    if rows_of_texts and len(text_ids := torch.cat(rows_of_texts)) != seen:  # else row i matches row i
        found |= {"image_ids": torch.arange(seen), "text_ids": text_ids}
    return found


def _features(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    batch = {name: value for name, value in batch.items() if name not in ("return_loss", "labels", "ids")}
    embeds: dict[str, Tensor] = {}
    read: set[str] = set()
    for side, key in (("image", "pixel_values"), ("text", "input_ids")):
        method = getattr(model, f"get_{side}_features", None)
        if method is None:
            raise TypeError(f"{type(model).__name__} has no get_{side}_features: pass encode=.")
        own = getattr(type(base_model(model)), f"get_{side}_features", method)  # an adapter may stand before it
        named = {*inspect.signature(method).parameters, *inspect.signature(own).parameters}
        inputs = {name: value for name, value in batch.items() if name in named}
        read |= inputs.keys()
        if key in batch:
            output = method(**inputs)  # an output object since transformers 5, a tensor before
            embeds[f"{side}_embeds"] = output if isinstance(output, Tensor) else output.pooler_output
    if unread := sorted(batch.keys() - read):
        raise ValueError(f"{unread}: neither get_image_features nor get_text_features reads this.")
    return embeds


# ------------------------------------------------------------------------------------------------------- VQA answers

_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {word: str(n) for n, word in enumerate(_WORDS)}
_DROPPED = re.compile(r"['’]|[.](?!\d)|(?<=\d),(?=\d)")
_SPACED = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`,?!“”，。？！；：、（）]")


def _normalise(answer: str) -> str:
    text = _SPACED.sub(" ", _DROPPED.sub("", answer.lower()))
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def vqa_scores(predictions: Iterable[str], references: Iterable[str | Sequence[str]]) -> np.ndarray:
    """Score of each answer in [0, 1] (Antol et al. 2015, https://visualqa.org/evaluation.html).

    Against several human answers: `min(1, n / 3)` where n others gave the prediction, averaged over leaving out each
    human in turn, which fewer than four humans can't bring to 1. Against one answer: 1 if equal, else 0. Compared in
    lower case without articles, punctuation and apostrophes, small numbers as digits.
    """
    scores = []
    for prediction, reference in zip(predictions, references, strict=True):
        answers = [reference] if isinstance(reference, str) else list(reference)
        if not answers:
            raise ValueError(f"The prediction {prediction!r} has no reference answer.")
        same = [_normalise(prediction) == _normalise(answer) for answer in answers]
        if len(same) == 1:
            scores.append(float(same[0]))
        else:
            scores.append(sum(min(1.0, (sum(same) - left_out) / 3) for left_out in same) / len(same))
    return np.array(scores)


def vqa_accuracy(predictions: Iterable[str], references: Iterable[str | Sequence[str]]) -> float:
    """Mean of `vqa_scores` in percent.

    Args:
        predictions: One answer per question.
        references: The right answer, or a list of human answers (ten in VQAv2), per question.

    Raises:
        ValueError: The lengths differ, there is no question, or one has no answer.
    """
    scores = vqa_scores(predictions, references)
    if not scores.size:
        raise ValueError("There are no predictions.")
    return 100 * float(scores.mean())


# ------------------------------------------------------------------------------------------------- errors, retention


@dataclass(frozen=True)
class BootstrapEstimate:
    """Mean, its standard error and 95 % interval, in the unit of the values."""

    mean: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """`mean(a) - mean(b)`, its standard error and 95 % interval, in the unit of the values."""

    difference: float
    standard_error: float
    low: float
    high: float


def bootstrap_error(
    values: Sequence[float] | np.ndarray | Tensor,
    groups: Ids | None = None,
    samples: int = 10_000,
    seed: int = 0,
) -> BootstrapEstimate:
    """Percentile bootstrap of the mean over test items.

    Args:
        values: One value per item, `(n,)`.
        groups: One hashable per item. Items of a group (the pictures of a concept) are drawn together, which is right
            where they aren't independent: the mean of a draw is its items' sum over its items' number.
        samples: Draws with replacement.

    Raises:
        ValueError: Fewer than two items or groups, NaN, or sizes that disagree.
    """
    mean, error, low, high = _bootstrap(values, groups, samples, seed)
    return BootstrapEstimate(mean, error, low, high)


def paired_bootstrap(
    a: Sequence[float] | np.ndarray | Tensor,
    b: Sequence[float] | np.ndarray | Tensor,
    groups: Ids | None = None,
    samples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Bootstrap of `mean(a) - mean(b)` where `a[i]` and `b[i]` are two models' values on the same item.

    The arguments are those of `bootstrap_error`. Exchanging a and b negates the difference and the interval.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a and b are not paired: shapes {a.shape} and {b.shape}.")
    difference, error, low, high = _bootstrap(a - b, groups, samples, seed)
    return PairedDifference(difference, error, low, high)


def _bootstrap(values: Any, groups: Ids | None, samples: int, seed: int) -> tuple[float, float, float, float]:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"Values must be finite and of shape (items,), not {values.shape}.")
    if samples < 2:
        raise ValueError(f"samples={samples}: at least 2 are needed.")
    code, _ = _codes(groups, groups, len(values), len(values))
    sums, sizes = np.bincount(code, values), np.bincount(code)
    if len(sizes) < 2:
        raise ValueError(f"A bootstrap needs at least 2 items (groups), not {len(sizes)}.")
    rng, means = np.random.default_rng(seed), []
    for start in range(0, samples, 500):  # times each group is drawn, 500 draws at a time to bound the memory
        drawn = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=min(500, samples - start))
        means.append((drawn @ sums) / (drawn @ sizes))
    mean = np.concatenate(means)
    low, high = np.percentile(mean, [2.5, 97.5])
    return float(values.mean()), float(mean.std(ddof=1)), float(low), float(high)


def retention(adapted: float, reference: float) -> float:
    """What is left of an ability after adaptation: `100 * adapted / reference` percent; forgetting is 100 minus it.

    Raises:
        ValueError: The reference isn't positive, so that there was nothing to retain.
    """
    if not reference > 0:
        raise ValueError(f"reference={reference}: retention needs a positive score before adaptation.")
    return 100 * adapted / reference


@dataclass(frozen=True)
class Forgetting:
    """A general score before and after adaptation, in its own unit.

    `forgotten` is before - on; `exact_off` says whether the model with its adapters off scores as before to the last
    bit, None where nothing can be switched off.
    """

    before: float
    on: float
    off: float | None

    @property
    def forgotten(self) -> float:
        return self.before - self.on

    @property
    def exact_off(self) -> bool | None:
        return None if self.off is None else self.off == self.before


def forgetting(model: Any, score: Callable[[Any], float], before: float) -> Forgetting:
    """What an adapted model has forgotten: its general score with adapters on and off, against that of the open model.

    Each module's train or eval mode is what it was before, also after an error.

    Args:
        model: In a `PeftModel`; or fully fine-tuned, which can't be switched off.
        score: The general ability of a model as one number, the more the better, such as
            `lambda m: retrieval_recall(**compute_embeddings(m, general, collator))["mean_recall"]`.
        before: What `score` gave for the model before it was adapted.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        on, off = float(score(model)), None
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                off = float(score(model))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return Forgetting(float(before), on, off)


# ----------------------------------------------------------------------------------------------------------- metrics

_TEXT = datasets.Value("string")
_VECTOR = datasets.Sequence(datasets.Value("float32"))


class RetrievalRecall(evaluate.Metric):
    """`retrieval_recall` as a metric: predictions are image embeddings, references the same rows' text embeddings.

    Example:
        >>> metric = RetrievalRecall()
        >>> for image_embeds, text_embeds in batches:
        ...     metric.add_batch(predictions=image_embeds, references=text_embeds)
        >>> metric.compute(image_ids=concepts, text_ids=concepts, ks=(1, 5))
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Recall@k of image-to-text and text-to-image retrieval over the whole set, in percent.",
            citation="",
            inputs_description="predictions: image embeddings; references: text embeddings; compute() takes image_ids, "
            "text_ids and ks.",
            features=datasets.Features({"predictions": _VECTOR, "references": _VECTOR}),
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        image_ids: Ids | None = None,
        text_ids: Ids | None = None,
        ks: Sequence[int] = (1, 5, 10),
    ) -> dict[str, float]:
        return retrieval_recall(torch.tensor(predictions), torch.tensor(references), image_ids, text_ids, ks)


class VQAAccuracy(evaluate.Metric):
    """`vqa_accuracy` as a metric: references are strings or lists of human answers; gives `{"accuracy": percent}`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy of short answers by the VQA rule, in percent.",
            citation="",
            inputs_description="predictions: answers; references: the answer, or the list of human answers.",
            features=[
                datasets.Features({"predictions": _TEXT, "references": datasets.Sequence(_TEXT)}),
                datasets.Features({"predictions": _TEXT, "references": _TEXT}),
            ],
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": vqa_accuracy(predictions, references)}
