"""How hard a pair is among the latest pairs that training has seen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .settings import HardSampling


class FeatureQueue:
    """The K latest pairs' unit embeddings, in half precision, and their keys: the negatives of every difficulty."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pointer = self.filled = 0
        self.parts: dict[str, Tensor] = {}

    @torch.no_grad()
    def push(self, image: Tensor, text: Tensor, keys: Mapping[str, Tensor]) -> None:
        """Put B pairs in; the oldest fall out."""
        new = {"image": image.half(), "text": text.half(), "image_keys": keys["image"], "text_keys": keys["text"]}
        if not self.parts:
            self.parts = {name: value.new_zeros(self.size, *value.shape[1:]) for name, value in new.items()}
        count = min(len(image), self.size)
        places = (torch.arange(count, device=image.device) + self.pointer) % self.size
        for name, value in new.items():
            self.parts[name] = self.parts[name].to(value.device)
            self.parts[name][places] = value[-count:]
        self.pointer = (self.pointer + count) % self.size
        self.filled = min(self.size, self.filled + count)

    def shrink(self) -> None:
        """Hold no more than there is, where a data set turned out to be smaller than the queue."""
        if self.filled < self.size:
            self.parts = {name: part[: self.filled].clone() for name, part in self.parts.items()}
            self.size, self.pointer = self.filled, 0

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name][: self.filled]


@torch.no_grad()
def difficulties(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    keys: Mapping[str, Tensor],
    queue: FeatureQueue,
    how: HardSampling,
) -> Tensor:
    """The module docstring's difficulty of B pairs, float32 (B,).

    Args:
        image: Unit embeddings (B, d).
        text: (B, d), row i the match of image i.
        scale: 1 / tau.
        keys: "image" and "text", int64 (B,): who shares one with a pair is no negative of it.
        queue: Into which these pairs have been pushed.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text = image.float(), text.float()
        same = keys["image"][:, None] == queue["image_keys"]
        same |= keys["text"][:, None] == queue["text_keys"]
        match = (image * text).sum(-1, keepdim=True) * scale
        sides = [
            torch.cat([match, (one @ other.float().T * scale).masked_fill(same, -torch.inf)], dim=1)
            for one, other in ((image, queue["text"]), (text, queue["image"]))
        ]
        if how.difficulty == "margin":
            gaps = torch.stack([match[:, 0] - side[:, 1:].amax(dim=1) for side in sides])
            return torch.sigmoid((how.margin - gaps.mean(0) / scale) / how.margin_width)
        log_p = torch.stack([side.log_softmax(dim=1)[:, 0] for side in sides])
        if how.difficulty == "prob":
            return -torch.expm1(log_p).mean(0)
        negatives = (~same).sum(dim=1)
        return -log_p.mean(0) / torch.log1p(negatives.clamp_min(1))
