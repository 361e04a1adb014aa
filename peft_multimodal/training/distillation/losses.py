"""Distances of an adapter's outputs from the frozen tower's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.anatomy import base_model, describe, dtype_of, image_sizes
from ...core.modes import eval_mode
from ...languages import multilingual_tower


@dataclass
class DistillationLoss:
    """Weights of the terms by which `CrossLingualTrainer` distils; 0 switches one off.

    Args:
        mse: Weight of the mean squared error of the pooled outputs (B, d_t).
        cosine: Weight of 1 - cos of the pooled outputs.
        contrastive: Weight of the pooled outputs' InfoNCE, each pair against the others of its batch.
        tokens: Weight of the token states' term; None is 1 where the adapter has level="tokens", and 0 elsewhere.
        functional: Weight of the distance of what the fusion encoder makes of both texts beside the same images.
        temperature: tau of the contrastive term.

    Examples:
        >>> DistillationLoss(mse=1, cosine=0, contrastive=0)  # Multilingual-CLIP's
    """

    mse: float = 1.0
    cosine: float = 1.0
    contrastive: float = 0.1
    tokens: float | None = None
    functional: float = 0.0
    temperature: float = 0.05

    def __post_init__(self) -> None:
        weights = (self.mse, self.cosine, self.contrastive, self.tokens or 0.0, self.functional)
        if not all(isinstance(w, (int, float)) and 0 <= w < math.inf for w in weights) or not any(weights):
            raise ValueError(f"The losses' weights must be numbers >= 0, one of them > 0: {self}.")
        if not (isinstance(self.temperature, (int, float)) and 0 < self.temperature < math.inf):
            raise ValueError(f"temperature must be > 0, got {self.temperature!r}.")

    def pooled(self, y: Tensor, e: Tensor, projection: nn.Module | None) -> Tensor:
        """L_mse, L_cos and L_con, weighted, of y and e (B, d_t), in float32."""
        with _float32(y):
            y, e = y.float(), e.float()
            loss = self.mse * F.mse_loss(y, e)
            if self.cosine or self.contrastive:
                z, target = (_unit(x, projection) for x in (y, e))
                loss = loss + self.cosine * (1 - (z * target).sum(-1)).mean()
                if self.contrastive:
                    loss = loss + self.contrastive * in_batch_contrast(z, target, self.temperature)
            return loss


def _unit(x: Tensor, projection: nn.Module | None) -> Tensor:
    if projection is not None:
        x = projection(x.to(next(projection.parameters()).dtype)).float()
    return F.normalize(x, dim=-1)


def in_batch_contrast(z: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Symmetric cross-entropy of unit vectors (B, d) with their targets; equal targets are no negatives of each other."""
    logits = z @ target.t() / temperature
    same = (target @ target.t()) > 1 - 1e-6
    same.fill_diagonal_(False)
    labels = torch.arange(len(z), device=z.device)
    rows = F.cross_entropy(logits.masked_fill(same, float("-inf")), labels)
    columns = F.cross_entropy(logits.t().masked_fill(same, float("-inf")), labels)
    return 0.5 * (rows + columns)


def soft_alignment_loss(Y: Tensor, E: Tensor, mask: Tensor, target_mask: Tensor) -> Tensor:
    """Token states of two languages matched without an aligner, in both directions.

    With S_ji = E_j . Y_i / sqrt(d), every teacher token is to be a mixture of student tokens (coverage, the softmax
    over i), and every student token one of teacher tokens (precision; the softmax over j without gradient, lest the
    student escapes by moving its weights). Coverage alone lets student tokens that nobody looks at drift.

    Args:
        Y: (B, L_s, d) of the student, mask (B, L_s).
        E: (B, L_t, d) of the teacher, target_mask (B, L_t).
    """
    with _float32(Y):
        Y, E = Y.float(), E.float()
        scores = E @ Y.transpose(1, 2) / Y.shape[-1] ** 0.5  # B x L_t x L_s
        over_student = scores.masked_fill(~mask[:, None, :], float("-inf")).softmax(dim=-1)
        over_teacher = scores.detach().masked_fill(~target_mask[:, :, None], float("-inf")).softmax(dim=1)
        coverage = (E - over_student @ Y).square().mean(-1)
        precision = (Y - over_teacher.transpose(1, 2) @ E).square().mean(-1)
        return _masked_mean(coverage, target_mask) + _masked_mean(precision, mask)


def hard_alignment_loss(
    Y: Tensor, E: Tensor, pairs: Sequence[Sequence[Sequence[int]]], mask: Tensor, target_mask: Tensor
) -> Tensor:
    """Mean square distance of aligned tokens; both first ones always match.

    Args:
        pairs: `pairs[b]` holds (student token, teacher token).
        Y, E, mask, target_mask: As for `soft_alignment_loss`.
    """
    places = []
    lengths = zip(pairs, mask.sum(1).tolist(), target_mask.sum(1).tolist(), strict=True)
    for b, (aligned, students, teachers) in enumerate(lengths):
        for student, teacher in {(0, 0), *((int(s), int(t)) for s, t in aligned)}:
            if not (0 <= student < students and 0 <= teacher < teachers):
                raise ValueError(
                    f"Pair ({student}, {teacher}) of row {b} is outside its {students} and {teachers} tokens."
                )
            places.append((b, student, teacher))
    rows, i, j = (list(part) for part in zip(*places, strict=True))
    return F.mse_loss(Y[rows, i].float(), E[rows, j].float())


def alignment_loss(Y: Tensor, E: Tensor, pairs: Sequence[Any], mask: Tensor, target_mask: Tensor) -> Tensor:
    """Hard for the rows whose tokens are aligned, soft for the others; each row weighs the same."""
    hard = [i for i, aligned in enumerate(pairs) if aligned]
    soft = [i for i, aligned in enumerate(pairs) if not aligned]
    loss = Y.new_zeros((), dtype=torch.float32)
    if hard:
        aligned = hard_alignment_loss(Y[hard], E[hard], [pairs[i] for i in hard], mask[hard], target_mask[hard])
        loss = loss + len(hard) / len(pairs) * aligned
    if soft:
        loss = loss + len(soft) / len(pairs) * soft_alignment_loss(Y[soft], E[soft], mask[soft], target_mask[soft])
    return loss


def _float32(x: Tensor) -> Any:
    """Mixed precision switched off, for sums and products that need their digits."""
    return torch.autocast(x.device.type, enabled=False)


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


# --- beside images ----------------------------------------------------------------------------------------------------


def functional_loss(
    model: nn.Module, Y: Tensor, E: Tensor, mask: Tensor, target_mask: Tensor, pixels: Tensor
) -> Tensor:
    """What the frozen fusion encoder makes of the two texts beside the same images: free of length and order.

    The states that are compared are those before the text's: the image's, and a class token's.

    Args:
        model: The whole model, with a language at level="tokens".
        pixels: (B, 3, H, W); random ones do.
    """
    tower, base = multilingual_tower(model), base_model(model)
    dtype = dtype_of(tower.host())
    stack: Any = base.get_submodule(next(t.path for t in describe(model).towers if t.name == "fusion"))
    outputs = []
    with eval_mode(base):  # the frozen encoders have no dropout, as when the text tower teaches
        for states, text_mask in ((Y, mask), (E, target_mask)):
            kept: list[Tensor] = []
            handle = stack[-1].register_forward_hook(
                lambda m, a, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out)
            )
            try:
                with tower.standing_in(states.to(dtype)):
                    tokens = {"input_ids": text_mask.long(), "attention_mask": text_mask.long()}
                    model(**tokens, pixel_values=pixels.to(dtype))
            finally:
                handle.remove()
            outputs.append(kept[-1][:, : kept[-1].shape[1] - states.shape[1]])
    return F.mse_loss(outputs[0].float(), outputs[1].detach().float())


def random_images(model: Any, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Noise of the size that the model's vision tower reads: (count, 3, H, W)."""
    return torch.randn(count, 3, *next(image_sizes(base_model(model))), generator=generator)
