"""Measures as `evaluate.Metric`s that need no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import torch

from .answers import vqa_accuracy
from .retrieval import Ids, retrieval_recall

_TEXT = datasets.Value("string")
_VECTOR = datasets.Sequence(datasets.Value("float32"))


class RetrievalRecall(evaluate.Metric):
    """`retrieval_recall` as an `evaluate.Metric` that works offline.

    `compute` takes predictions, image embeddings `(n, d)`, and references, the same rows' text embeddings `(n, d)`.
    It also takes the other arguments of `retrieval_recall`: `image_ids`, `text_ids` and `ks`. It gives recalls in
    percent.

    Args:
        config_name: As of `evaluate.Metric`, and so are the other arguments.

    Examples:
        >>> import torch
        >>> metric = RetrievalRecall()
        >>> metric.add_batch(predictions=torch.eye(6), references=torch.eye(6))
        >>> metric.compute(ks=(1, 5))["mean_recall"]
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Recall@k of image-to-text and text-to-image retrieval over the whole set, in percent.",
            citation="",
            inputs_description="predictions: image embeddings; references: text embeddings; and image_ids, text_ids, ks.",
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
    """`vqa_accuracy` as an `evaluate.Metric` that works offline: it gives `{"accuracy": percent}`.

    `compute` takes predictions, a string each, and references, a string or a list of human answers each.

    Args:
        config_name: As of `evaluate.Metric`, and so are the other arguments.

    Examples:
        >>> VQAAccuracy().compute(predictions=["red", "two"], references=[["red", "red", "dark red"], ["2", "2"]])
    """

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
