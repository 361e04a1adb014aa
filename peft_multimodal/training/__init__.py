"""Losses and Trainer integration; names are imported when they are first used."""

from importlib import import_module
from typing import Any

_WHERE = {
    "contrastive_loss": "losses",
    "contrastive_loss_func": "losses",
    "hard_negative_indices": "losses",
    "matching_loss": "losses",
    "retrieval_embeddings": "losses",
    "retrieval_loss": "losses",
    "sigmoid_loss": "losses",
    "sigmoid_pair_losses": "losses",
    "similarity_loss": "losses",
    "dual_embeddings": "losses",
    "pair_losses": "losses",
    "AdapterCallback": "callback",
    "CheckTraining": "checking",
    "check_training": "check",
    "last_checkpoint": "checkpoints",
    "ContrastiveTrainer": "contrastive",
    "CrossLingualTrainer": "distillation",
    "DistillationLoss": "distillation",
    "HardSampleBank": "hard_samples",
    "HardSampleSampler": "hard_samples",
    "HardSampling": "hard_samples",
    "ImageTextRetrievalTrainer": "trainer",
    "SumTree": "hard_samples.draws",
    "parameter_groups": "learning_rates",
    "weighted_order": "hard_samples.draws",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
