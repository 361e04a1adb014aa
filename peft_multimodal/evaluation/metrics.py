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
