"""Ranks and recall of retrieval over a whole set."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Ids = Sequence[Hashable] | Tensor

# Cosines are compared in float64, and nearer than this they are a tie: duplicates must not be ranked by rounding noise.
TIE = 1e-9


def codes_of(query_ids: Ids | None, gallery_ids: Ids | None, queries: int, items: int) -> tuple[Tensor, Tensor]:
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
    query, gallery = codes_of(query_ids, gallery_ids, *similarity.shape)
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
    query, gallery = codes_of(query_ids, gallery_ids, len(query_embeds), len(gallery_embeds))
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

    A query counts when at least one item with its id is among its k nearest, ties counted against it. Give each image
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
        codes, gallery = codes_of(query_ids, item_ids, len(queries), len(items))
        ranks_of = []
        for row, (query, code) in enumerate(zip(queries, codes, strict=True)):
            cosine, index = (items @ query).topk(top)
            pair = (index, torch.full_like(index, row))
            pair_score = score(*(pair if flip else pair[::-1])).detach().cpu().double()
            if pair_score.shape != index.shape:
                raise ValueError(f"score gave shape {tuple(pair_score.shape)} for {top} pairs, not ({top},).")
            final = torch.full((1, len(items)), -torch.inf, dtype=torch.float64)
            final[0, index] = pair_score + similarity_weight * cosine
            ranks_of.append(_ranks(final, (gallery == code)[None], TIE))
        return torch.cat(ranks_of)

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
