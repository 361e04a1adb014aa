"""Prompts go one way: pieces -> prefix states -> features -> cosines. Nothing is kept here from call to call.

pieces          [SOS] G,  D_c,  I(x),  [EOS] as embeddings                          (rows, L, d_t)
prefix states   what the tower's layers leave behind of beginnings that many share
features        w_c(x), of norm 1                                                   (B, C, e)
cosines         v(x) . w_c(x)                                                       (B, C)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...nn.known_prefix import PrefixStates
from .context import StructuredContext
from .dual_encoder import Images
from .pieces import Piece, Texts, join
from .reader import Prefix, PromptReader


@dataclass(frozen=True)
class Prompts:
    """The prompts of one adapter in one call.

    Args:
        reader: Of the text tower.
        context: G, K, Q and the attention.
        order: "GDI" or "GID".
        chunk_size: Classes at a time.
    """

    reader: PromptReader
    context: StructuredContext
    order: str
    chunk_size: int

    @property
    def image_first(self) -> bool:
        """Whether I(x) stands before D_c."""
        return self.context.looks and self.order == "GID"

    @property
    def text_first(self) -> bool:
        return self.context.looks and self.order == "GDI"

    @property
    def knows_lists(self) -> bool:
        """Whether `of_list` has anything to say."""
        return not self.image_first and (not self.text_first or self.reader.reuses_prefix())

    # --- pieces ---

    def common(self) -> Piece:
        """[SOS] G, and K where all classes have one and nothing stands between: one row."""
        G, K = self.context.general, self.context.domain if self._domain_leads() else None
        contexts = [c for c in (None if G is None else G[None], K) if c is not None]
        return join(self.reader.lead(), *map(self.reader.vectors, contexts))

    def named(self, texts: Texts) -> list[Piece]:
        """D_c = [K_dom(c); E(name_c)], C rows, without K where it stands in `common`."""
        names, K = self.reader.tokens(texts.ids, texts.mask), self.context.domain
        if K is None or self._domain_leads():
            return [names]
        return [self.reader.vectors(K if texts.domains is None else K[texts.domains]), names]

    def ending(self, named: list[Piece], instance: Tensor | None) -> Piece:
        """I(x) [EOS] of each image, where that is the last, or D_c [EOS] of each class."""
        last = named if instance is None or self.image_first else [self.reader.vectors(instance)]
        return join(*last, self.reader.tail())

    def _domain_leads(self) -> bool:
        return self.context.domain is not None and len(self.context.domain) == 1 and not self.image_first

    # --- prefix states ---

    def of_images(self, instance: Tensor) -> Prefix:
        """[SOS] G I(x) of each image, for "GID"."""
        return self.reader.prefix(self.common(), self.reader.vectors(instance))

    def of_texts(self, named: list[Piece]) -> Prefix:
        """[SOS] G D_c of each class, for "GDI"."""
        return self.reader.prefix(self.common(), join(*named))

    def of_list(self, texts: Texts) -> PrefixStates | Tensor:
        """All that a class list tells without an image: the states of [SOS] G D_c, or features (C, e) where prompts don't look."""
        if not self.text_first:
            return self.static(texts)
        common, named = self.common(), join(*self.named(texts))
        chunks = (named.rows(slice(start, start + self.chunk_size)) for start in range(0, len(texts), self.chunk_size))
        return PrefixStates.cat([cast(PrefixStates, self.reader.prefix(common, chunk)) for chunk in chunks])

    # --- features ---

    def features(self, named: list[Piece], instance: Tensor | None, prefix: Prefix | None = None) -> Tensor:
        """w (B, C, e) of norm 1 for instance contexts I(x) (B, M_i, d_t); B is 1 without them.

        Args:
            named: D_c; not read where the prefix holds it.
            prefix: What is known of these texts' or images' beginnings.
        """
        if prefix is None:
            if instance is None:
                prefix = self.reader.prefix(self.common())
            else:
                prefix = self.of_images(instance) if self.image_first else self.of_texts(named)
        w = self.reader.continued(prefix, self.ending(named, instance).repeat_all(prefix.count))
        return w.transpose(0, 1) if self.text_first else w

    def static(self, texts: Texts) -> Tensor:
        """(C, e): the features with Q in place of I(x)."""
        Q = self.context.instance if self.context.looks else None
        instance = None if Q is None else Q[None]
        return torch.cat([self.features(self.named(some), instance)[0] for some in texts.chunks(self.chunk_size)])

    # --- cosines ---

    def cosines(
        self,
        images: Images,
        texts: Texts,
        known: PrefixStates | Tensor | None = None,
        anchors: Tensor | None = None,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """v(x) . w_c(x), (B, C), and w_c(x) . anchor_c (B or 1, C) where anchors (C, e) are given.

        Args:
            known: What `of_list` says of the texts.
            recompute: Chunks are computed again in the backward pass, so that what is held for it doesn't grow with the
                class count.
        """
        instance = self.context.instance_of(images.Z, images.mask)
        first = self.of_images(instance) if self.image_first and instance is not None else None
        cosines, near = [], []
        for start in range(0, texts.ids.shape[0], self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            begun = known[rows] if isinstance(known, Tensor) else known.rows(rows) if known is not None else first
            chunk = (images, texts.rows(rows), instance, begun, None if anchors is None else anchors[rows])
            if recompute:  # without notes on each saved tensor, to check the second run by: they would grow
                cos, off = checkpoint(self._chunk, *chunk, use_reentrant=False, preserve_rng_state=False, determinism_check="none")  # fmt: skip
            else:
                cos, off = self._chunk(*chunk)
            cosines.append(cos)
            near.append(off)
        return torch.cat(cosines, dim=1), None if anchors is None else torch.cat(near, dim=1)

    def _chunk(
        self,
        images: Images,
        texts: Texts,
        instance: Tensor | None,
        known: Prefix | Tensor | None,
        anchors: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(known, Tensor):
            w = known[None]
        else:
            named = [] if self.text_first and known is not None else self.named(texts)
            w = self.features(named, instance, known)
        if self.context.attention is not None and not self.context.looks:  # mode="feature"
            w = F.normalize(self.context.attention(w[0], images.Z, images.mask), dim=-1)
        near = None if anchors is None else (w * anchors).sum(dim=-1)
        return (w.to(images.v.dtype) @ images.v[..., None])[..., 0], near

    def shortlisted(self, images: Images, texts: Texts, k: int, static: Tensor, known: PrefixStates | None) -> Tensor:
        """(B, C): v(x) . w_c(x) for the k classes that static prompts rank first; the others' static ones, held below.

        Args:
            static: Features (C, e) of static prompts.
            known: What `of_list` says of the texts.
        """
        instance = self.context.instance_of(images.Z, images.mask)
        assert instance is not None
        cos = images.v @ static.to(images.v.dtype).T
        top = cos.topk(min(k, len(texts)), dim=1).indices  # (B, k)
        if known is None and self.knows_lists:
            known = cast(PrefixStates, self.of_list(texts))
        first = self.of_images(instance) if self.image_first else None
        cosines = []
        for chosen in top.split(self.chunk_size, dim=1):
            some, n = texts.rows(chosen.flatten()), chosen.shape[1]
            named = [] if known is not None else self.named(some)
            ending = self.ending(named, instance)
            if first is not None:
                w = self.reader.continued(first, ending)
            else:
                begun = self.of_texts(named) if known is None else known.rows(chosen.flatten())
                w = self.reader.continued(begun, ending.repeat_each(n))
            cosines.append((w.flatten(0, 1).unflatten(0, (-1, n)).to(images.v.dtype) @ images.v[..., None])[..., 0])
        best = torch.cat(cosines, dim=1)
        return torch.minimum(cos, best.amin(dim=1, keepdim=True)).scatter(1, top, best)
