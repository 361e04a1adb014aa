"""A frozen text tower reads prompts whose embeddings are given, each token once as far as that is exact.

The tower is the library's own, not a copy of it. The vectors take the place of its token embeddings before it adds
positions, and its own pooling finds the token it pools, for the ids are those of a real text: what the tokenizer puts
around every text stays in its place, and the first of that stands for the vectors.

    T = [lead] prompt and words [tail]          lead, tail: what the tokenizer puts around every text

Sequences are trimmed to their real length, save for towers that read their padding too (SigLIP). Where a tower is
causal, many sequences that begin alike share what their common prefix leaves behind: each layer's keys and values,

    h_i = softmax([q_i K_prefix^T, q_i K_own^T] / sqrt(d_h)) [V_prefix; V_own]

which reach the layers through transformers' attention interface. Whether a tower does all this is measured, not known.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..anatomy import device_of
from ..tuner import CallScope

ATTENTION = "structured_prompt"  # the name under which transformers knows the attention that can continue a prefix


# --- sequences -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A stretch of one or many sequences. `keep` is False at padding; None means that there is none."""

    embeds: Tensor  # (rows, L, d_t)
    ids: Tensor  # (rows, L)
    keep: Tensor | None = None  # (rows, L)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: Any) -> Piece:
        return Piece(self.embeds[index], self.ids[index], None if self.keep is None else self.keep[index])

    def repeat_each(self, times: int) -> Piece:
        """Each row so many times: a a b b."""
        return self.rows(torch.arange(len(self), device=self.ids.device).repeat_interleave(times))

    def repeat_all(self, times: int) -> Piece:
        """All rows so many times: a b a b."""
        return self.rows(torch.arange(len(self), device=self.ids.device).repeat(times))


def join(*pieces: Piece) -> Piece:
    """The pieces one behind the other, padding last, trimmed to the longest. A single row goes with every row."""
    rows = max(len(piece) for piece in pieces)
    embeds = torch.cat([p.embeds.expand(rows, -1, -1) for p in pieces], dim=1)
    ids = torch.cat([p.ids.expand(rows, -1) for p in pieces], dim=1)
    if all(piece.keep is None for piece in pieces):
        return Piece(embeds, ids)
    kept = [torch.ones_like(p.ids, dtype=torch.bool) if p.keep is None else p.keep for p in pieces]
    keep = torch.cat([k.expand(rows, -1) for k in kept], dim=1)
    order = (~keep).byte().argsort(dim=1, stable=True)
    if not torch.compiler.is_compiling():
        order = order[:, : int(keep.sum(dim=1).max())]
    taken = torch.take_along_dim(embeds, order[..., None], dim=1)
    return Piece(taken, ids.gather(1, order), keep.gather(1, order))


@dataclass(frozen=True)
class Frame:
    """What a tokenizer puts around every text, and what it fills up with."""

    lead: tuple[int, ...]
    tail: tuple[int, ...]
    pad: int
    stand_in: int  # the id of tokens whose embeddings are given: an ordinary one to every rule of pooling

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


@dataclass(frozen=True)
class Texts:
    """The words of class names or captions, padded; `keep` is None where all are equally long."""

    words: Tensor  # (C, L)
    keep: Tensor | None
    groups: Tensor | None = None  # (C): which domain context each one takes
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.words)

    def rows(self, index: Any) -> Texts:
        keep, groups = (None if t is None else t[index] for t in (self.keep, self.groups))
        return Texts(self.words[index], keep, groups)

    def chunks(self, size: int) -> Iterator[Texts]:
        return (self.rows(slice(start, start + size)) for start in range(0, len(self), size))

    def sizes(self) -> list[int]:
        """Words of each text."""
        return [self.words.shape[1]] * len(self) if self.keep is None else self.keep.sum(dim=1).tolist()

    @classmethod
    def of_lists(cls, rows: Sequence[Sequence[int]], pad: int, device: Any, **fields: Any) -> Texts:
        longest = max(len(row) for row in rows)
        words = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], dtype=torch.long, device=device)
        sizes = torch.tensor([len(row) for row in rows], device=device)
        ragged = any(len(row) < longest for row in rows)
        keep = torch.arange(longest, device=device) < sizes[:, None] if ragged else None
        return cls(words.reshape(len(rows), longest), keep, **fields)

    @classmethod
    def of_batch(cls, input_ids: Tensor, attention_mask: Tensor | None, frame: Frame) -> Texts:
        """The words of tokenised captions (N, L): without padding and what the tokenizer put around them."""
        real = input_ids != frame.pad if attention_mask is None else attention_mask.bool()
        place, size = real.int().cumsum(dim=1) - 1, real.sum(dim=1, keepdim=True)
        words = real
        for j, token in enumerate(frame.lead):
            words = words & ~((place == j) & (input_ids == token))
        for j, token in enumerate(frame.tail):
            words = words & ~((place == size - len(frame.tail) + j) & (input_ids == token))
        return cls(torch.where(words, input_ids, frame.pad), words)


# --- prefixes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrefixStates:
    """What the layers of a causal tower keep of a prefix: all that a continuation needs of it."""

    layers: tuple[tuple[Tensor, Tensor], ...]  # keys and values (rows, heads, P, d_h)
    keep: Tensor | None  # (rows, P)

    def __len__(self) -> int:
        return len(self.layers[0][0])

    def rows(self, index: Any) -> PrefixStates:
        layers = tuple((keys[index], values[index]) for keys, values in self.layers)
        return PrefixStates(layers, None if self.keep is None else self.keep[index])

    @classmethod
    def cat(cls, parts: Sequence[PrefixStates]) -> PrefixStates:
        layers = tuple(
            (torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer]))
            for layer in zip(*(part.layers for part in parts), strict=True)
        )
        keep = None if parts[0].keep is None else torch.cat([part.keep for part in parts if part.keep is not None])
        return cls(layers, keep)

    def extended(self, layers: Sequence[tuple[Tensor, Tensor]], text: Piece) -> PrefixStates:
        """This one row, as it is continued by each row of `text`, of which the layers kept `layers`."""

        def behind(one: Tensor, own: Tensor) -> Tensor:
            return torch.cat([one.expand(len(own), -1, -1, -1), own], dim=2)

        both = tuple(
            (behind(k, own_k), behind(v, own_v)) for (k, v), (own_k, own_v) in zip(self.layers, layers, strict=True)
        )
        if text.keep is None:
            return PrefixStates(both, None)
        whole = text.keep.new_ones(len(text), self.layers[0][0].shape[2])
        return PrefixStates(both, torch.cat([whole, text.keep], dim=1))

    def lengths(self) -> Tensor:
        """(rows)"""
        keys = self.layers[0][0]
        if self.keep is None:
            return torch.full((len(self),), keys.shape[2], device=keys.device)
        return self.keep.sum(dim=1)


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any):
    """transformers' own scaled dot-product attention, unless the call begins or continues a prefix."""
    prefix = kwargs.pop("prompt_prefix", None)
    if prefix is None:
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)
    return prefix(query, key, value, kwargs["scaling"]).transpose(1, 2).contiguous(), None


def prefix_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return AttentionMaskInterface()["sdpa"](*args, **kwargs)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, prefix_mask)


class Continue:
    """Attention of sequences that continue prefixes: row g n + i of a call continues prefix g. Padding stands behind.

    The n continuations of a prefix are its queries side by side, so that its keys and values are never repeated.

    Args:
        prefix: None for sequences that continue nothing.
        times: n.
        note: Where each layer's keys and values are put.
    """

    def __init__(
        self, prefix: PrefixStates | None, times: int, note: list[tuple[Tensor, Tensor]] | None = None
    ) -> None:
        self.layers = None if prefix is None else iter(prefix.layers)
        self.keep = None if prefix is None else prefix.keep
        self.shape = (0 if prefix is None else len(prefix), times)
        self.note = note

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(G n, heads, L, d_h) each, of one layer."""
        if self.note is not None:
            self.note.append((key, value))
        if self.layers is None:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        keys, values = next(self.layers)  # (G, heads, P, d_h)
        L, P = query.shape[2], keys.shape[2]
        before = self._aside(query) @ keys.mT  # (G, heads, n L, P)
        if self.keep is not None:
            before = before.masked_fill(~self.keep[:, None, None], float("-inf"))
        own = (query @ key.mT).masked_fill(~query.new_ones(L, L, dtype=torch.bool).tril(), float("-inf"))
        scores = torch.cat([self._apart(before, L), own], dim=-1) * scaling
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
        before, own = weights.split([P, L], dim=-1)
        return self._apart(self._aside(before) @ values, L) + own @ value

    def _aside(self, x: Tensor) -> Tensor:
        """(G n, heads, L, d) -> (G, heads, n L, d)"""
        return x.unflatten(0, self.shape).transpose(1, 2).flatten(2, 3)

    def _apart(self, x: Tensor, L: int) -> Tensor:
        """(G, heads, n L, d) -> (G n, heads, L, d)"""
        return x.unflatten(2, (self.shape[1], L)).transpose(1, 2).flatten(0, 1)


# --- the tower -------------------------------------------------------------------------------------------------------


class PromptReader:
    """Features of prompts by a model's own text tower.

    Args:
        model: A dual encoder with `get_text_features`.
        tower: Its text tower.
        embedding: The tower's token embedding.
    """

    def __init__(self, model: Any, tower: nn.Module, embedding: nn.Embedding) -> None:
        self.model, self.tower, self.embedding = model, tower, embedding
        self.scope = CallScope()  # the embeddings of a call
        self.longest = longest_text(tower)
        self.reads_padding = False
        self.frame: Frame | None = None
        self._own_attention: list[tuple[Any, str]] = []

    def tokenizer_frame(self) -> Frame:
        """The frame of the tokenizer that was measured.

        Raises:
            ValueError: there was none.
        """
        if self.frame is None:
            raise ValueError(
                "No classes are set: call model.set_classes(names, tokenizer) first, or model.set_tokenizer(tokenizer) where "
                "captions come with the batch. Neither is part of an adapter's file, so it is called after loading too."
            )
        return self.frame

    def room(self, context: int = 0) -> float:
        """Tokens that the tower can read beside the frame and a context."""
        frame = self.tokenizer_frame()
        return (self.longest or math.inf) - len(frame.lead) - len(frame.tail) - context

    def replace(self, embedding: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Forward hook of the token embedding: the given vectors in place of the tokens' own."""
        return self.scope.values.get("embeds")

    def embed(self, ids: Tensor) -> Tensor:
        """(rows, L) -> (rows, L, d_t): the frozen embeddings of tokens."""
        weight = self.embedding.weight
        if weight.ndim != 2 or hasattr(weight, "full_tensor"):
            raise RuntimeError(
                "FSDP has taken the text tower apart, and prompts read its layers more than once in a step, their common "
                "part alone: set auto_wrap_policy to NO_WRAP (fsdp_auto_wrap_policy in accelerate's config)."
            )
        return self.embedding.forward(ids)  # not called: `replace` is one of its hooks

    def tokens(self, ids: Sequence[int]) -> Piece:
        """A piece of real tokens, one row."""
        row = torch.tensor([ids], dtype=torch.long, device=device_of(self.embedding))
        return Piece(self.embed(row), row)

    def lead(self) -> Piece:
        return self.tokens(self.tokenizer_frame().lead)

    def tail(self) -> Piece:
        return self.tokens(self.tokenizer_frame().tail)

    def words(self, texts: Texts) -> Piece:
        return Piece(self.embed(texts.words), texts.words, texts.keep)

    def vectors(self, embeds: Tensor) -> Piece:
        """A piece of given vectors (rows, L, d_t)."""
        ids = torch.full(embeds.shape[:2], self.tokenizer_frame().stand_in, dtype=torch.long, device=embeds.device)
        return Piece(embeds.to(self.embedding.weight.dtype), ids)

    def features(self, text: Piece) -> Tensor:
        """(rows, e): the features of whole sequences, of norm 1."""
        keep = torch.ones_like(text.ids) if text.keep is None else text.keep.long()
        if not self.reads_padding:
            return self._run(text, attention_mask=keep)
        missing = (self.longest or 0) - text.ids.shape[1]
        return self._run(join(text, self.tokens([self.tokenizer_frame().pad] * missing)) if missing > 0 else text)

    def prefix(self, common: Piece, own: Piece | None = None) -> PrefixStates | Piece:
        """What `continued` takes for the beginnings of sequences: their states, or themselves if the tower can't reuse these.

        Args:
            common: One row, with which all begin.
            own: How each of them goes on.
        """
        if not self.reuses_prefix():
            return common if own is None else join(common, own)
        if own is None or not common.ids.shape[1]:
            return self.states(join(common, own) if own is not None else common)
        return self.states(own, self.states(common))

    def states(self, text: Piece, after: PrefixStates | None = None) -> PrefixStates:
        """What the layers keep of sequences, which all continue `after`, of one row."""
        note: list[tuple[Tensor, Tensor]] = []
        if after is None:
            self._run(text, prompt_prefix=Continue(None, 1, note))
            return PrefixStates(tuple(note), text.keep)
        self._run(text, position_ids=self._places(after, text), prompt_prefix=Continue(after, len(text), note))
        return after.extended(note, text)

    def continued(self, prefix: PrefixStates | Piece, text: Piece) -> Tensor:
        """(G, n, e): the features of sequences, of which row g n + i of `text` continues prefix g."""
        shape = (len(prefix), len(text) // len(prefix))
        if isinstance(prefix, Piece):
            return self.features(join(prefix.repeat_each(shape[1]), text)).unflatten(0, shape)
        going_on = Continue(prefix, shape[1])
        return self._run(text, position_ids=self._places(prefix, text), prompt_prefix=going_on).unflatten(0, shape)

    def _places(self, prefix: PrefixStates, text: Piece) -> Tensor:
        """(rows, L): positions behind the prefixes."""
        places = prefix.lengths()[:, None] + torch.arange(text.ids.shape[1], device=text.ids.device)
        return places.repeat_interleave(len(text) // len(prefix), dim=0)

    def _run(self, text: Piece, **kwargs: Any) -> Tensor:
        with in_eval(self.tower):
            self.scope.open()
            self.scope.values["embeds"] = text.embeds
            try:
                out = self.model.get_text_features(input_ids=text.ids, return_dict=True, **kwargs)
            finally:
                self.scope.close()
        return F.normalize(out.pooler_output, dim=-1)

    # --- what the tower does, measured ---

    def measure(self, tokenizer: Any) -> None:
        """Learn the tokenizer's frame, whether the tower reads its padding, and whether it can continue a prefix."""
        frame = Frame.of(tokenizer)
        if self.frame == frame:
            return
        self.frame = frame
        self.restore_attention()
        self.reads_padding = False
        width, generator = self.embedding.embedding_dim, torch.Generator().manual_seed(0)
        some = torch.arange(min(self.embedding.num_embeddings, 1024), device=device_of(self.embedding))
        spread = self.embed(some).detach().float().std().item()
        given = spread * torch.randn(3, 4, width, generator=generator)
        begin, other, end = (self.vectors(row[None].to(device_of(self.embedding))) for row in given)
        tail = self.tokens(frame.tail)
        with torch.no_grad():
            whole = self.features(join(begin, end, tail)).float()
            padded = join(begin, end, tail, self.tokens([frame.pad]))
            keep = torch.arange(padded.ids.shape[1], device=padded.ids.device) < padded.ids.shape[1] - 1
            moved = self.features(Piece(padded.embeds, padded.ids, keep[None])).float() - whole
            self.reads_padding = bool(moved.norm() > (1e-3 if self.embedding.weight.dtype == torch.float32 else 5e-2))
            if self.reads_padding:
                return
            # As near to the whole sequence as can be told from one with another prefix.
            apart = (self.features(join(other, end, tail)).float() - whole).norm()
            self._take_attention()
            try:
                states = self.states(begin)
                exact = len(states) > 0 and (self.continued(states, join(end, tail))[0].float() - whole).norm()
            except (TypeError, IndexError):  # a tower without position_ids; one that hands nothing to its attention
                exact = apart
            reusable = bool(exact < 0.05 * apart)
            others = [own for _, own in self._own_attention if own != "sdpa"]
            if others or not reusable:
                self.restore_attention()
            if others and reusable:
                warnings.warn(
                    f"The text tower's attention is {others[0]!r}: what prompts have in common is read anew for each of "
                    "them. With attn_implementation='sdpa' it is read once, and the results are the same.",
                    stacklevel=4,  # where set_classes or set_tokenizer is called
                )

    def reuses_prefix(self) -> bool:
        return bool(self._own_attention) and all(c._attn_implementation == ATTENTION for c, _ in self._own_attention)

    def _take_attention(self) -> None:
        """Let the tower's attention go through `attend`, which without a prefix is the library's "sdpa"."""
        found: list[Any] = [m.config for m in self.tower.modules() if hasattr(m, "config")]
        configs = {id(config): config for config in found}.values()
        own = [config._attn_implementation for config in configs]  # ATTENTION where two models have one config
        self._own_attention = [(c, "sdpa" if name == ATTENTION else name) for c, name in zip(configs, own, strict=True)]
        for config in configs:
            config._attn_implementation = ATTENTION

    def restore_attention(self) -> None:
        for config, own in self._own_attention:
            if config._attn_implementation == ATTENTION:
                config._attn_implementation = own
        self._own_attention = []


def longest_text(tower: nn.Module) -> int | None:
    """How many tokens the tower can read; None where there is no limit."""
    limits = [
        module.num_embeddings
        - (0 if module.padding_idx is None else module.padding_idx + 1)  # RoBERTa counts from there
        for path, module in tower.named_modules()
        if isinstance(module, nn.Embedding) and re.search(r"position", path.rpartition(".")[2])
    ]
    return min(limits, default=None)


@contextmanager
def in_eval(module: nn.Module) -> Iterator[None]:
    """Without dropout and without checkpoints of its own: what is frozen gives the same at each call."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True
