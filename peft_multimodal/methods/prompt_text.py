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
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..core.anatomy import device_of
from ..core.parts import CallScope
from ..text_limits import longest_text

ATTENTION = "structured_prompt"  # the name under which transformers knows the attention that can continue a prefix
ROWS_TO_SPARE = 512  # embeddings are filled up to a round number beyond their tokenizer's size
WIDEST = 128  # tokens of continuations side by side: more are masked in vain, fewer repeat their prefix more often


# --- sequences -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A stretch of one or many sequences. `keep` is False at padding; None means that there is none."""

    embeds: Tensor  # (rows, L, d_t)
    ids: Tensor  # (rows, L)
    keep: Tensor | None = None  # (rows, L)

    @property
    def count(self) -> int:
        """Rows; not `len`, which would fix a batch that `torch.export` keeps open to one size."""
        return self.ids.shape[0]

    def rows(self, index: Any) -> Piece:
        return Piece(self.embeds[index], self.ids[index], None if self.keep is None else self.keep[index])

    def repeat_each(self, times: int) -> Piece:
        """Each row so many times: a a b b."""
        return self.rows(torch.arange(self.count, device=self.ids.device).repeat_interleave(times))

    def repeat_all(self, times: int) -> Piece:
        """All rows so many times: a b a b."""
        return self.rows(torch.arange(self.count, device=self.ids.device).repeat(times))


def join(*pieces: Piece) -> Piece:
    """The pieces one behind the other, padding last, trimmed to the longest. A single row goes with every row."""
    rows = max(piece.count for piece in pieces)
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

    @property
    def count(self) -> int:
        return self.layers[0][0].shape[0] if self.layers else 0

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
            return torch.cat([one.expand(own.shape[0], -1, -1, -1), own], dim=2)

        both = tuple(
            (behind(k, own_k), behind(v, own_v)) for (k, v), (own_k, own_v) in zip(self.layers, layers, strict=True)
        )
        if text.keep is None:
            return PrefixStates(both, None)
        whole = text.keep.new_ones(text.count, self.layers[0][0].shape[2])
        return PrefixStates(both, torch.cat([whole, text.keep], dim=1))

    def lengths(self) -> Tensor:
        """(rows)"""
        keys = self.layers[0][0]
        if self.keep is None:
            return torch.full((self.count,), keys.shape[2], device=keys.device)
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


class Begin:
    """Attention of a prefix; notes each layer's keys and values."""

    def __init__(self, note: list[tuple[Tensor, Tensor]]) -> None:
        self.note = note

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(rows, heads, P, d_h) each, of one layer."""
        self.note.append((key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)


class BeginAlike:
    """Attention of what prefixes have in common and of how each goes on, in one call: a small one costs as much as a
    larger one, for the weights are read. Notes each layer's keys and values of the former and of the latter.

    Args:
        front: So many rows of the call lie in front, and hold what is common one behind the other.
        length: Its tokens; what is left of these rows is filling.
    """

    def __init__(
        self, front: int, length: int, note: list[tuple[Tensor, Tensor]], own_note: list[tuple[Tensor, Tensor]]
    ) -> None:
        self.front, self.length, self.note, self.own_note = front, length, note, own_note

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(front + C, heads, L, d_h) each, of one layer."""
        L, filling = query.shape[2], self.front * query.shape[2] - self.length
        q, k, v = (in_one(x[: self.front], self.front)[:, :, : self.length] for x in (query, key, value))
        begun = in_many(F.pad(Begin(self.note)(q, k, v, scaling), (0, 0, 0, filling)), L)
        query, key, value = (x[self.front :] for x in (query, key, value))
        self.own_note.append((key, value))
        return torch.cat([begun, continue_prefix(query, key, value, k, v, None, 1, scaling)])


class Continue:
    """Attention of sequences that continue prefixes: row g n + i of a call continues prefix g. Padding stands behind."""

    def __init__(self, prefix: PrefixStates) -> None:
        self.layers, self.keep = iter(prefix.layers), prefix.keep

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(G n, heads, L, d_h) each, of one layer."""
        keys, values = next(self.layers)
        times = query.shape[0] // keys.shape[0]
        copies, together = side_by_side(times, query.shape[2])
        query, key, value = (fill_up(x, times, copies * together) for x in (query, key, value))
        h = continue_prefix(query, key, value, keys, values, self.keep, together, scaling)
        return h.unflatten(0, (keys.shape[0], -1))[:, :times].flatten(0, 1)


def side_by_side(times: int, length: int) -> tuple[int, int]:
    """Into how many sequences the continuations of a prefix go, each of `length` tokens, and how many into each."""
    if not isinstance(times, int):  # torch.export keeps the batch open: no layout fits all sizes
        return times, 1
    copies = -(-times // max(WIDEST // length, 1))
    return copies, -(-times // copies)


def continue_prefix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    keep: Tensor | None,
    together: int,
    scaling: float,
) -> Tensor:
    """h (G n, heads, L, d_h) of n continuations of each of G prefixes.

    Args:
        keys: Of the prefixes (G, heads, P, d_h), like `values`.
        keep: (G, P), False at their padding.
        together: So many continuations of a prefix are one sequence to the attention, behind one copy of the prefix; a
            mask keeps them apart, as long as they are finite.
    """
    P, L = keys.shape[2], query.shape[2]
    copies = query.shape[0] // keys.shape[0] // together
    q, k, v = (in_one(x, together) for x in (query, key, value))
    place = torch.arange(together * L, device=query.device)
    own = (place[:, None] // L == place // L) & (place[:, None] >= place)
    mask = F.pad(own, (P, 0), value=True)
    if keep is not None:
        mask = mask & F.pad(keep, (0, together * L), value=True).repeat_interleave(copies, dim=0)[:, None, None]
    k = torch.cat([keys.to(k.dtype).repeat_interleave(copies, dim=0), k], dim=2)
    v = torch.cat([values.to(v.dtype).repeat_interleave(copies, dim=0), v], dim=2)
    return in_many(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling), L)


def fill_up(x: Tensor, times: int, to: int) -> Tensor:
    """(G times, heads, L, d) -> (G to, heads, L, d)"""
    if to == times:
        return x
    return F.pad(x.unflatten(0, (-1, times)), (0, 0, 0, 0, 0, 0, 0, to - times)).flatten(0, 1)


def in_one(x: Tensor, together: int) -> Tensor:
    """(rows, heads, L, d) -> (rows / together, heads, together L, d)"""
    return x.transpose(1, 2).unflatten(0, (-1, together)).flatten(1, 2).transpose(1, 2)


def in_many(x: Tensor, L: int) -> Tensor:
    """(rows, heads, n L, d) -> (rows n, heads, L, d)"""
    return x.transpose(1, 2).unflatten(1, (-1, L)).flatten(0, 1).transpose(1, 2)


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
        if own is None or not common.ids.shape[1] or not own.ids.shape[1]:
            return self.states(join(common, own) if own is not None else common)
        return self.states_alike(common, own)

    def states(self, text: Piece) -> PrefixStates:
        """What the layers keep of sequences."""
        note: list[tuple[Tensor, Tensor]] = []
        self._run(text, prompt_prefix=Begin(note))
        return PrefixStates(tuple(note), text.keep)

    def states_alike(self, common: Piece, own: Piece) -> PrefixStates:
        """What the layers keep of sequences that begin with `common`, one row, and go on with a row of `own` each."""
        P, L = common.ids.shape[1], own.ids.shape[1]
        front = -(-P // L)
        filled = join(common, self.vectors(common.embeds.new_zeros(1, front * L - P, common.embeds.shape[2])))
        embeds = torch.cat([filled.embeds.unflatten(1, (front, L))[0], own.embeds])
        ids = torch.cat([filled.ids.unflatten(1, (front, L))[0], own.ids])
        front_places = torch.arange(front * L, device=ids.device).clamp(max=P - 1).view(front, L)
        places = torch.cat([front_places, P + torch.arange(L, device=ids.device).expand(own.count, L)])
        note: list[tuple[Tensor, Tensor]] = []
        own_note: list[tuple[Tensor, Tensor]] = []
        self._run(Piece(embeds, ids), position_ids=places, prompt_prefix=BeginAlike(front, P, note, own_note))
        return PrefixStates(tuple(note), None).extended(own_note, own)

    def continued(self, prefix: PrefixStates | Piece, text: Piece) -> Tensor:
        """(G, n, e): the features of sequences, of which row g n + i of `text` continues prefix g."""
        shape = (prefix.count, text.count // prefix.count)
        if isinstance(prefix, Piece):
            return self.features(join(prefix.repeat_each(shape[1]), text)).unflatten(0, shape)
        places = prefix.lengths()[:, None] + torch.arange(text.ids.shape[1], device=text.ids.device)
        places = places.repeat_interleave(shape[1], dim=0)
        # A mask alone doesn't keep a spoilt picture's rows from those beside them: 0 * nan is nan.
        sound = text.embeds.isfinite().all(dim=-1).all(dim=-1)[:, None]
        text = replace(text, embeds=text.embeds.where(sound[..., None], 0))
        w = self._run(text, position_ids=places, prompt_prefix=Continue(prefix))
        return w.where(sound, torch.nan).unflatten(0, shape)

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
        self._check_size(tokenizer)
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
            if torch.equal(self.features(join(begin, other, tail)).float(), whole) and not whole.is_meta:
                self.frame = None
                raise ValueError(
                    f"With this tokenizer, whose texts end in {list(frame.tail)}, {type(self.tower).__name__} doesn't read what "
                    f"stands in a text: its config looks for eos_token_id {getattr(self.tower.config, 'eos_token_id', None)}. "
                    "Pass the tokenizer of the base model; if this is it, another adapter may act on the token embedding, which then "
                    "passes prompts over."
                )
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
                exact = states.count > 0 and (self.continued(states, join(end, tail))[0].float() - whole).norm()
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

    def _check_size(self, tokenizer: Any) -> None:
        """Refuse a tokenizer whose ids the tower doesn't have; warn of one with far fewer."""
        rows, size = self.embedding.num_embeddings, len(tokenizer)
        sizes = f"The tokenizer knows {size} tokens, the text tower {rows}"
        if tokenizer.vocab_size > rows:
            raise ValueError(f"{sizes}: it belongs to another model. Pass the tokenizer of the base model.")
        if size < rows - ROWS_TO_SPARE:
            warnings.warn(
                f"{sizes}: it looks like another model's, and then all names mean something else. Pass the tokenizer of the "
                "base model.",
                stacklevel=5,  # where set_classes or set_tokenizer is called
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
