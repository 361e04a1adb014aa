"""A frozen text tower reads prompts whose embeddings are given, each token once as far as that is exact.

The tower is the library's own, not a copy of it. The vectors take the place of its token embeddings before it adds
positions, and its own pooling finds the token it pools by placeholder ids: what the tokenizer puts behind every text
stays in its place.

    T = [lead] prompt and words [tail]          lead, tail: what the tokenizer puts around every text

Sequences are trimmed to their real length, save for towers that read their padding too (SigLIP). Where a tower is
causal, sequences that begin alike share what their common prefix leaves behind (`nn/known_prefix.py`). Whether a tower
does all this is measured, not known.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.modes import eval_mode
from ...core.modules import device_of
from ...core.parts import CallScope
from ...nn import known_prefix
from ...nn.known_prefix import Begin, BeginAlike, Continue, PrefixAttention, PrefixStates
from ...text_limits import longest_text
from .pieces import Frame, Piece, join

ROWS_TO_SPARE = 512  # embeddings are filled up to a round number beyond their tokenizer's size

Prefix: TypeAlias = PrefixStates | Piece
"""Beginnings of sequences: what the tower's layers keep of them, or themselves where it can't reuse that."""


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
        self.attention = PrefixAttention(tower)
        self.longest = longest_text(tower)
        self.reads_padding = False
        self.frame: Frame | None = None

    def tokenizer_frame(self) -> Frame:
        """The frame of the tokenizer that was measured; ValueError where none was."""
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

    def reuses_prefix(self) -> bool:
        return self.attention.is_taken

    # --- pieces ---

    def tokens(self, ids: Tensor | Sequence[int], mask: Tensor | None = None) -> Piece:
        """The frozen embeddings of tokens (rows, L), or of one row."""
        weight = self.embedding.weight
        if weight.ndim != 2 or hasattr(weight, "full_tensor"):
            raise RuntimeError(
                "FSDP has taken the text tower apart, and prompts read its layers more than once in a step, their common "
                "part alone: set auto_wrap_policy to NO_WRAP (fsdp_auto_wrap_policy in accelerate's config)."
            )
        if not isinstance(ids, Tensor):
            ids = torch.tensor([list(ids)], dtype=torch.long, device=device_of(self.embedding))
        return Piece(self.embedding.forward(ids), mask)  # not called: `replace` is one of its hooks

    def lead(self) -> Piece:
        return self.tokens(self.tokenizer_frame().lead)

    def tail(self) -> Piece:
        return self.tokens(self.tokenizer_frame().tail)

    def vectors(self, embeds: Tensor) -> Piece:
        """A piece of given vectors (rows, L, d_t)."""
        return Piece(embeds.to(self.embedding.weight.dtype))

    def filled(self, text: Piece, length: int) -> Piece:
        """A text with padding up to a length."""
        return text.filled(length, self.tokens([self.tokenizer_frame().pad]).embeds[0, 0])

    # --- prefix states ---

    def prefix(self, common: Piece, middle: Piece | None = None) -> Prefix:
        """What `continued` takes for the beginnings of sequences.

        Args:
            common: One row, with which all begin.
            middle: How each of them goes on.
        """
        if self.reuses_prefix() and middle is not None and common.length and middle.length:
            return self.states_alike(common, middle)
        whole = common if middle is None else join(common, middle)
        return self.states(whole) if self.reuses_prefix() else whole

    def states(self, text: Piece) -> PrefixStates:
        """What the layers keep of sequences."""
        begin = Begin()
        self._run(text, begin)
        return begin.states(text.mask)

    def states_alike(self, common: Piece, middle: Piece) -> PrefixStates:
        """What the layers keep of sequences that begin with `common`, one row, and go on with a row of `middle` each."""
        P, L = common.length, middle.length
        begin = BeginAlike(P, middle.count, L, middle.embeds.device)
        front = F.pad(common.embeds, (0, 0, 0, begin.front * L - P)).unflatten(1, (begin.front, L))[0]
        front_places = torch.arange(begin.front * L, device=front.device).clamp(max=P - 1).view(begin.front, L)
        places = torch.cat([front_places, P + torch.arange(L, device=front.device).expand(middle.count, L)])
        self._run(Piece(torch.cat([front, middle.embeds])), begin, position_ids=places)
        return begin.states(middle.mask)

    # --- features ---

    def features(self, text: Piece) -> Tensor:
        """(rows, e): the features of whole sequences, of norm 1."""
        if self.reads_padding:
            return self._run(self.filled(text, self.longest or 0))
        mask = text.embeds.new_ones(text.embeds.shape[:2], dtype=torch.long) if text.mask is None else text.mask.long()
        return self._run(text, attention_mask=mask)

    def continued(self, prefix: Prefix, text: Piece) -> Tensor:
        """(G, n, e): the features of sequences, of which row g n + i of `text` continues prefix g."""
        shape = (prefix.count, text.count // prefix.count)
        if isinstance(prefix, Piece):
            return self.features(join(prefix.repeat_each(shape[1]), text)).unflatten(0, shape)
        places = prefix.lengths()[:, None] + torch.arange(text.length, device=text.embeds.device)
        places = places.repeat_interleave(shape[1], dim=0)
        # A mask alone doesn't keep a spoilt image's rows from those beside them: 0 * nan is nan.
        sound = text.embeds.isfinite().all(dim=-1).all(dim=-1)[:, None]
        text = Piece(text.embeds.where(sound[..., None], 0), text.mask)
        attention = Continue(prefix, text.count, text.length, text.embeds.device)
        w = self._run(text, attention, position_ids=places)
        return w.where(sound, torch.nan).unflatten(0, shape)

    def _run(self, text: Piece, attention: Any = None, **kwargs: Any) -> Tensor:
        if attention is not None:
            kwargs[known_prefix.NAME] = attention
        ids = self.tokenizer_frame().placeholders(text)
        with eval_mode(self.tower):
            self.scope.open()
            self.scope.values["embeds"] = text.embeds
            try:
                out = self.model.get_text_features(input_ids=ids, return_dict=True, **kwargs)
            finally:
                self.scope.close()
        return F.normalize(out.pooler_output, dim=-1)

    def replace(self, embedding: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Forward hook of the token embedding: the given vectors in place of the tokens' own."""
        return self.scope.values.get("embeds")

    # --- what the tower does, measured ---

    def measure(self, tokenizer: Any) -> None:
        """Learn the tokenizer's frame, whether the tower reads its padding, and whether it can continue a prefix."""
        self._check_size(tokenizer)
        frame = Frame.of(tokenizer)
        if self.frame == frame:
            return
        self.frame, self.reads_padding = frame, False
        self.attention.give_back()
        width, generator = self.embedding.embedding_dim, torch.Generator().manual_seed(0)
        some = torch.arange(min(self.embedding.num_embeddings, 1024), device=device_of(self.embedding))
        spread = self.tokens(some).embeds.detach().float().std().item()
        drawn = spread * torch.randn(3, 4, width, generator=generator)
        begin, other, end = (self.vectors(row[None].to(device_of(self.embedding))) for row in drawn)
        end, tail = join(end, self.tail()), self.tail()
        with torch.no_grad():
            whole = self.features(join(begin, end)).float()
            if torch.equal(self.features(join(begin, other, tail)).float(), whole) and not whole.is_meta:
                self.frame = None
                raise ValueError(
                    f"With this tokenizer, whose texts end in {list(frame.tail)}, {type(self.tower).__name__} doesn't read what "
                    f"stands in a text: its config looks for eos_token_id {getattr(self.tower.config, 'eos_token_id', None)}. "
                    "Pass the tokenizer of the base model; if this is it, another adapter may act on the token embedding, which then "
                    "passes prompts over."
                )
            text = join(begin, end)
            moved = (self.features(self.filled(text, text.length + 1)).float() - whole).norm()
            self.reads_padding = bool(moved > (1e-3 if self.embedding.weight.dtype == torch.float32 else 5e-2))
            if not self.reads_padding:
                # As near to the whole sequence as can be told from one with another prefix.
                apart = (self.features(join(other, end)).float() - whole).norm()
                self._take_attention(lambda: self.continued(self.states(begin), end)[0].float() - whole, apart)

    def _take_attention(self, error: Any, apart: Tensor) -> None:
        """Let the tower continue prefixes, if its error then is far below `apart`."""
        others = self.attention.take()
        try:
            reusable = bool(error().norm() < 0.05 * apart)
        except (TypeError, IndexError, ZeroDivisionError):  # no position_ids; nothing goes through its attention
            reusable = False
        if others or not reusable:
            self.attention.give_back()
        if others and reusable:
            warnings.warn(
                f"The text tower's attention is {others[0]!r}: what prompts have in common is read again for each of "
                "them. With attn_implementation='sdpa' it is read once, and the results are the same.",
                stacklevel=5,  # where set_classes or set_tokenizer is called
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
