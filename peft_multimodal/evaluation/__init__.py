"""Evaluation over whole test sets: retrieval recall, VQA accuracy, bootstrap errors, retention.

The measures are pure functions of embeddings, scores or answers; `RetrievalRecall` and `VQAAccuracy` wrap two of them
as `evaluate.Metric`s that need no network. Accuracies, recalls and retention are in percent.
"""

from .answers import vqa_accuracy, vqa_scores
from .bootstrap import BootstrapEstimate, PairedDifference, bootstrap_error, paired_bootstrap
from .embeddings import compute_embeddings
from .general_ability import Forgetting, forgetting, retention
from .metrics import RetrievalRecall, VQAAccuracy
from .retrieval import embedding_ranks, rerank_recall, retrieval_ranks, retrieval_recall
from .scales import ScaleCurve, scale_curve

__all__ = [
    "BootstrapEstimate",
    "Forgetting",
    "PairedDifference",
    "RetrievalRecall",
    "ScaleCurve",
    "VQAAccuracy",
    "bootstrap_error",
    "compute_embeddings",
    "embedding_ranks",
    "forgetting",
    "paired_bootstrap",
    "rerank_recall",
    "retention",
    "retrieval_ranks",
    "retrieval_recall",
    "scale_curve",
    "vqa_accuracy",
    "vqa_scores",
]
