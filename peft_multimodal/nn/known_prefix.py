"""Attention of many sequences that begin alike: their common prefix is read once, and each continues what it left behind.

    h_i = softmax([q_i K_prefix^T, q_i K_i^T] / sqrt(d_h)) [V_prefix; V_i]

The layers of a causal tower reach this through transformers' attention interface, while `PrefixAttention` is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "known_prefix"  # in transformers' interfaces; also the keyword by which a call of the tower brings its attention
WIDEST = 128  # tokens of continuations side by side: more are masked in vain, fewer repeat their prefix more often


@dataclass(frozen=True)
class PrefixStates:
    """What the layers of a causal tower leave behind of prefixes: all that a continuation needs of them."""

    layers: tuple[tuple[Tensor, Tensor], ...]  # keys and values (G, heads, P, d_h)
    mask: Tensor | None  # (G, P), False at padding

    @property
    def count(self) -> int:
        return self.layers[0][0].shape[0] if self.layers else 0

    def rows(self, index: Any) -> PrefixStates:
        layers = tuple((keys[index], values[index]) for keys, values in self.layers)
        return PrefixStates(layers, None if self.mask is None else self.mask[index])

    @classmethod
    def cat(cls, parts: Sequence[PrefixStates]) -> PrefixStates:
        layers = zip(*(part.layers for part in parts), strict=True)
        joined = tuple((torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in layers)
        return cls(joined, None if parts[0].mask is None else torch.cat([p.mask for p in parts if p.mask is not None]))

    def lengths(self) -> Tensor:
        """(G)"""
        keys = self.layers[0][0]
        if self.mask is None:
            return torch.full((self.count,), keys.shape[2], device=keys.device)
        return self.mask.sum(dim=1)


class Begin:
    """Attention of prefixes; notes each layer's keys and values."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(G, heads, P, d_h) each, of one layer."""
        self.layers.append((key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)

    def states(self, mask: Tensor | None) -> PrefixStates:
        return PrefixStates(tuple(self.layers), mask)


class BeginAlike:
    """Attention of what prefixes have in common and of how each goes on, in one call: a small one costs as much as a
    larger one, for the weights are read. Notes each layer's keys and values of the former and of the latter.

    Args:
        common: Tokens that all prefixes have in common. They lie in the first rows of the call, one row behind the other.
        rows, length: The prefixes, and the tokens by which each goes on.
        device: Of the call.
    """

    def __init__(self, common: int, rows: int, length: int, device: torch.device) -> None:
        self.common, self.front = common, -(-common // length)
        self.begin = Begin()
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.mask = continuation_mask(common, length, device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(front + rows, heads, L, d_h) each, of one layer."""
        length, filling = query.shape[2], self.front * query.shape[2] - self.common
        q, k, v = (in_one(x[: self.front], self.front)[:, :, : self.common] for x in (query, key, value))
        begun = in_many(F.pad(self.begin(q, k, v, scaling), (0, 0, 0, filling)), length)
        query, key, value = (x[self.front :] for x in (query, key, value))
        self.layers.append((key, value))
        return torch.cat([begun, continue_prefix(query, key, value, k, v, self.mask, 1, scaling)])

    def states(self, mask: Tensor | None) -> PrefixStates:
        """Of the whole prefixes; `mask` (rows, L) is that of how they go on."""

        def behind(common: Tensor, own: Tensor) -> Tensor:
            return torch.cat([common.expand(own.shape[0], -1, -1, -1), own], dim=2)

        layers = tuple(
            (behind(k, own_k), behind(v, own_v))
            for (k, v), (own_k, own_v) in zip(self.begin.layers, self.layers, strict=True)
        )
        return PrefixStates(layers, None if mask is None else F.pad(mask, (self.common, 0), value=True))


class Continue:
    """Attention of sequences that continue prefixes: row g n + i of a call continues prefix g. Padding stands behind.

    Args:
        prefix: G of them.
        rows, length: Sequences of the call, G n of L tokens.
        device: Of the call.
    """

    def __init__(self, prefix: PrefixStates, rows: int, length: int, device: torch.device) -> None:
        self.layers, self.times = iter(prefix.layers), rows // prefix.count
        self.copies, self.together = side_by_side(self.times, length)
        begun = prefix.layers[0][0].shape[2]
        self.mask = continuation_mask(begun, length, device, self.together, self.copies, prefix.mask)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(G n, heads, L, d_h) each, of one layer."""
        keys, values = next(self.layers)
        query, key, value = (fill_up(x, self.times, self.copies * self.together) for x in (query, key, value))
        h = continue_prefix(query, key, value, keys, values, self.mask, self.together, scaling)
        return h.unflatten(0, (keys.shape[0], -1))[:, : self.times].flatten(0, 1)


def side_by_side(times: int, length: int) -> tuple[int, int]:
    """Into how many sequences the continuations of a prefix go, each of `length` tokens, and how many into each."""
    if not isinstance(times, int):  # torch.export keeps the batch open: no layout fits all sizes
        return times, 1
    copies = -(-times // max(WIDEST // length, 1))
    return copies, -(-times // copies)


def continuation_mask(
    begun: int, length: int, device: torch.device, together: int = 1, copies: int = 1, prefix_mask: Tensor | None = None
) -> Tensor:
    """What each token of continuations sees: the prefix of `begun` tokens, and its own continuation up to itself.

    (n L, P + n L) for n = `together` continuations side by side; with the mask (G, P) of prefixes, each of which has
    `copies` such sequences, (G copies, 1, n L, P + n L).
    """
    place = torch.arange(together * length, device=device)
    block = (place[:, None] // length == place // length) & (place[:, None] >= place)
    mask = F.pad(block, (begun, 0), value=True)
    if prefix_mask is None:
        return mask
    whole = F.pad(prefix_mask, (0, together * length), value=True).repeat_interleave(copies, dim=0)
    return mask & whole[:, None, None]


def continue_prefix(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, mask: Tensor, together: int, scaling: float
) -> Tensor:
    """h (G n, heads, L, d_h) of n continuations of each of G prefixes.

    Args:
        keys: Of the prefixes (G, heads, P, d_h), like `values`.
        mask: The `continuation_mask`; it keeps continuations apart as long as they are finite.
        together: So many continuations of a prefix are one sequence to the attention, behind one copy of the prefix.
    """
    length = query.shape[2]
    copies = query.shape[0] // keys.shape[0] // together
    q, k, v = (in_one(x, together) for x in (query, key, value))
    k = torch.cat([keys.to(k.dtype).repeat_interleave(copies, dim=0), k], dim=2)
    v = torch.cat([values.to(v.dtype).repeat_interleave(copies, dim=0), v], dim=2)
    return in_many(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling), length)


def fill_up(x: Tensor, times: int, to: int) -> Tensor:
    """(G times, heads, L, d) -> (G to, heads, L, d)"""
    if to == times:
        return x
    return F.pad(x.unflatten(0, (-1, times)), (0, 0, 0, 0, 0, 0, 0, to - times)).flatten(0, 1)


def in_one(x: Tensor, together: int) -> Tensor:
    """(rows, heads, L, d) -> (rows / together, heads, together L, d)"""
    return x.transpose(1, 2).unflatten(0, (-1, together)).flatten(1, 2).transpose(1, 2)


def in_many(x: Tensor, length: int) -> Tensor:
    """(rows, heads, n L, d) -> (rows n, heads, L, d)"""
    return x.transpose(1, 2).unflatten(1, (-1, length)).flatten(0, 1).transpose(1, 2)


# --- transformers' attention interface -------------------------------------------------------------------------------


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
):
    """transformers' own scaled dot-product attention, unless the call begins or continues prefixes."""
    prefix = kwargs.pop(NAME, None)
    if prefix is None:
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)
    return prefix(query, key, value, kwargs["scaling"]).transpose(1, 2).contiguous(), None


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return AttentionMaskInterface()["sdpa"](*args, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, attention_mask)


class PrefixAttention:
    """Lets the layers of a tower begin and continue prefixes, from `take` to `give_back`."""

    def __init__(self, tower: nn.Module) -> None:
        self.tower = tower
        self.before: list[tuple[Any, str]] = []  # the tower's configs, and which attention they named

    @property
    def is_taken(self) -> bool:
        return bool(self.before) and all(config._attn_implementation == NAME for config, _ in self.before)

    def take(self) -> list[str]:
        """Returns the attentions that were named before, other than "sdpa"."""
        configs: dict[int, Any] = {id(m.config): m.config for m in self.tower.modules() if hasattr(m, "config")}
        named = [(config, config._attn_implementation) for config in configs.values()]
        self.before = [(c, "sdpa" if name == NAME else name) for c, name in named]  # NAME: two models have one config
        for config, _ in self.before:
            config._attn_implementation = NAME
        return [name for _, name in self.before if name != "sdpa"]

    def give_back(self) -> None:
        for config, name in self.before:
            if config._attn_implementation == NAME:
                config._attn_implementation = name
        self.before = []

    remove = give_back  # as hooks' handles call it
