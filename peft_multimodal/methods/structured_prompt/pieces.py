"""Pieces of prompts: stretches of embeddings, and the texts and the tokenizer's frame that they are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A stretch of one or many sequences. `mask` is False at padding; None means that there is none."""

    embeds: Tensor  # (rows, L, d_t)
    mask: Tensor | None = None  # (rows, L)

    @property
    def count(self) -> int:
        """Rows; not `len`, which would fix a batch that `torch.export` keeps open to one size."""
        return self.embeds.shape[0]

    @property
    def length(self) -> int:
        return self.embeds.shape[1]

    def rows(self, index: Any) -> Piece:
        return Piece(self.embeds[index], None if self.mask is None else self.mask[index])

    def repeat_each(self, times: int) -> Piece:
        """Each row so many times: a a b b."""
        return self.rows(torch.arange(self.count, device=self.embeds.device).repeat_interleave(times))

    def repeat_all(self, times: int) -> Piece:
        """All rows so many times: a b a b."""
        return self.rows(torch.arange(self.count, device=self.embeds.device).repeat(times))

    def filled(self, length: int, padding: Tensor) -> Piece:
        """With the embedding `padding` (d_t) behind it, up to a length."""
        missing = max(length - self.length, 0)
        mask = self.embeds.new_ones(self.embeds.shape[:2], dtype=torch.bool) if self.mask is None else self.mask
        filling = padding.to(self.embeds.dtype).expand(self.count, missing, -1)
        return Piece(torch.cat([self.embeds, filling], dim=1), F.pad(mask, (0, missing)))


def join(*pieces: Piece) -> Piece:
    """The pieces one behind the other, padding last, trimmed to the longest. A single row goes with every row."""
    rows = max(piece.count for piece in pieces)
    embeds = torch.cat([p.embeds.expand(rows, -1, -1) for p in pieces], dim=1)
    if all(piece.mask is None for piece in pieces):
        return Piece(embeds)
    masks = [p.embeds.new_ones(p.embeds.shape[:2], dtype=torch.bool) if p.mask is None else p.mask for p in pieces]
    mask = torch.cat([m.expand(rows, -1) for m in masks], dim=1)
    order = (~mask).byte().argsort(dim=1, stable=True)
    if not torch.compiler.is_compiling():
        order = order[:, : int(mask.sum(dim=1).max())]
    return Piece(torch.take_along_dim(embeds, order[..., None], dim=1), mask.gather(1, order))


@dataclass(frozen=True)
class Frame:
    """What a tokenizer puts around every text, and what it fills up with."""

    lead: tuple[int, ...]
    tail: tuple[int, ...]
    pad: int
    stand_in: int  # the id of any token that isn't pooled

    @classmethod
    def of(cls, tokenizer: Any) -> Frame:
        empty, word = list(tokenizer("").input_ids), list(tokenizer("a").input_ids)
        lead = 0
        while lead < min(len(empty), len(word)) and empty[lead] == word[lead]:
            lead += 1
        tail = tuple(empty[lead:])
        pad = tokenizer.pad_token_id
        pad = pad if pad is not None else tail[0] if tail else 0
        return cls(tuple(empty[:lead]), tail, pad, empty[0] if lead else word[0])

    def words(self, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text without the frame."""
        ids = tokenizer(list(texts)).input_ids if texts else []
        return [list(row[len(self.lead) : len(row) - len(self.tail)]) for row in ids]

    def placeholders(self, text: Piece) -> Tensor:
        """(rows, L): ids by which a tower finds the token that it pools in texts that end in the tail."""
        place = torch.arange(text.length, device=text.embeds.device)
        size: Any = text.length if text.mask is None else text.mask.sum(dim=1, keepdim=True)
        ids = torch.full(text.embeds.shape[:2], self.stand_in, dtype=torch.long, device=text.embeds.device)
        for back, token in enumerate(reversed(self.tail), 1):
            ids = ids.where(place != size - back, token)
        return ids if text.mask is None else ids.where(text.mask, self.pad)


@dataclass(frozen=True)
class Texts:
    """The token ids of class names or captions, without frame; `mask` is None where all are equally long."""

    ids: Tensor  # (C, L)
    mask: Tensor | None
    domains: Tensor | None = None  # (C): which domain context each one takes, where there is one for each
    names: tuple[str, ...] | None = None  # of a class list

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: Any) -> Texts:
        mask, domains = (None if t is None else t[index] for t in (self.mask, self.domains))
        return Texts(self.ids[index], mask, domains)

    def chunks(self, size: int) -> Iterator[Texts]:
        return (self.rows(slice(start, start + size)) for start in range(0, len(self), size))

    @classmethod
    def of_lists(cls, rows: Sequence[Sequence[int]], pad: int, device: Any, **fields: Any) -> Texts:
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], dtype=torch.long, device=device)
        sizes = torch.tensor([len(row) for row in rows], device=device)
        ragged = any(len(row) < longest for row in rows)
        mask = torch.arange(longest, device=device) < sizes[:, None] if ragged else None
        return cls(ids.reshape(len(rows), longest), mask, **fields)

    @classmethod
    def of_batch(cls, input_ids: Tensor, attention_mask: Tensor | None, frame: Frame) -> Texts:
        """Of tokenised captions (N, L): what is no padding, and not put around them by the tokenizer."""
        real = input_ids != frame.pad if attention_mask is None else attention_mask.bool()
        place, size = real.int().cumsum(dim=1) - 1, real.sum(dim=1, keepdim=True)
        words = real
        for j, token in enumerate(frame.lead):
            words = words & ~((place == j) & (input_ids == token))
        for j, token in enumerate(frame.tail):
            words = words & ~((place == size - len(frame.tail) + j) & (input_ids == token))
        return cls(torch.where(words, input_ids, frame.pad), words)
