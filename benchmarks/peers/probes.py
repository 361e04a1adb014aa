"""Few-shot classifiers on frozen CLIP embeddings: linear probes and Tip-Adapter-F.

v (n, e) are images' embeddings and W (C, e) class weights, both of norm 1 unless said; s is the model's logit scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearProbe(nn.Module):
    """logits = s v W^T, W being what minimises  CE(s v W^T, y) + penalty |W - W_start|^2.

    With W_start = 0 the probe of CLIP (Radford et al. 2021, arXiv 2103.00020); with W_start the texts' features a probe that
    starts from the zero-shot classifier and stays as near to it as the images let it.

    Args:
        start: W_start (C, e); its rows need no norm.
        scale: s.
        penalty: Above 0, so that the minimum is one.
    """

    def __init__(self, start: Tensor, scale: float, penalty: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.clone())
        self.start, self.scale, self.penalty = start.clone(), scale, penalty

    def forward(self, v: Tensor) -> Tensor:
        return self.scale * v @ self.weight.T

    def fit(self, v: Tensor, labels: Tensor, steps: int = 200) -> None:
        """Minimise by L-BFGS, as CLIP's probe does."""
        optimizer = torch.optim.LBFGS([self.weight], max_iter=steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(self(v), labels) + self.penalty * (self.weight - self.start).square().sum()
            value.backward()
            return value

        optimizer.step(loss)


class TipAdapterF(nn.Module):
    """logits = s v W^T + alpha exp(-beta (1 - v K^T)) Y, with keys K that train.

    Zhang et al. 2022, arXiv 2207.09519. K (n, e) starts from the training images' embeddings, Y (n, C) are their labels.

    Args:
        v: The training images' embeddings (n, e).
        labels: (n)
        text: W, the texts' features; they stay.
        alpha, beta: How much the cache counts, and how sharply it looks. alpha is relative to s = 100, CLIP's, and scaled with s.
    """

    def __init__(self, v: Tensor, labels: Tensor, text: Tensor, scale: float, alpha: float, beta: float) -> None:
        super().__init__()
        self.keys = nn.Parameter(v.clone())
        self.values = F.one_hot(labels, len(text)).to(v)
        self.text, self.scale, self.alpha, self.beta = text, scale, alpha * scale / 100, beta

    def forward(self, v: Tensor) -> Tensor:
        near = (-self.beta * (1 - v @ self.keys.T)).exp()
        return self.scale * v @ self.text.T + self.alpha * near @ self.values

    def fit(
        self, v: Tensor, labels: Tensor, learning_rate: float = 1e-3, epochs: int = 20, batch_size: int = 256
    ) -> None:
        """Its code's training: AdamW with eps 1e-4 and a cosine, 20 epochs; by the global generator's order."""
        optimizer = torch.optim.AdamW([self.keys], lr=learning_rate, eps=1e-4)
        batches = epochs * -(-len(v) // batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches)
        for _ in range(epochs):
            for rows in torch.randperm(len(v)).split(batch_size):
                F.cross_entropy(self(v[rows]), labels[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
