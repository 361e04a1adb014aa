"""Distillation of the English text tower into another language's adapter, from translation pairs alone.

For the adapter's y and the frozen tower's e of the translation, both before the model's text projection W, with
z = norm(W y) and z' = norm(W e):

    L_mse = ||y - e||^2 / d_t                                          keeps norm and offset, needs no large batch
    L_cos = 1 - z . z'
    L_con = (CE(z Z'^T / tau) + CE(z' Z^T / tau)) / 2                  in the batch, tau = 0.05
    L_tok = alignment of the token states, where a fusion encoder reads them

Neither tower is trained, so their outputs are computed once and kept on disk; an epoch then costs the adapter alone.
"""

from .kept import KeptOutputs, frozen_outputs
from .losses import (
    DistillationLoss,
    alignment_loss,
    functional_loss,
    hard_alignment_loss,
    in_batch_contrast,
    random_images,
    soft_alignment_loss,
)
from .pairs import FullPairs, PairCollator
from .trainer import CrossLingualTrainer

__all__ = [
    "CrossLingualTrainer",
    "DistillationLoss",
    "FullPairs",
    "KeptOutputs",
    "PairCollator",
    "alignment_loss",
    "frozen_outputs",
    "functional_loss",
    "hard_alignment_loss",
    "in_batch_contrast",
    "random_images",
    "soft_alignment_loss",
]
