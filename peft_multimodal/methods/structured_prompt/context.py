"""What an adapter trains: the contexts of its prompts, and the attention by which one of them looks at the image."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class VisualAttention(nn.Module):
    """X + g MHA(LN(X) W_q, LN(Z) W_k, LN(Z) W_v) W_o, with W_o = 0 and g = 1 at the start.

    The other way round, g = 0 and W_o drawn, a few hundred few-shot steps hardly move the scalar g away from 0.

    Args:
        width: Of X.
        patch_width: d_v, of Z.
        attention_dim: a.
        heads: They divide a.
    """

    def __init__(self, width: int, patch_width: int, attention_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query, self.norm_patches = nn.LayerNorm(width), nn.LayerNorm(patch_width)
        # No biases: that of the keys would change nothing.
        self.query = nn.Linear(width, attention_dim, bias=False)
        self.key = nn.Linear(patch_width, attention_dim, bias=False)
        self.value = nn.Linear(patch_width, attention_dim, bias=False)
        self.out = nn.Linear(attention_dim, width, bias=False)
        nn.init.zeros_(self.out.weight)
        self.gate_norm = nn.Parameter(torch.ones(1))  # g; Trainer gives names in `_norm` no weight decay

    def weights(self, X: Tensor, Z: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, heads, n, S): how each row of X (n, width) looks at the patches Z (B, S, d_v); `mask` (B, S) is 0 at filling."""
        return self._weights(X, self.norm_patches(Z), mask)

    def _weights(self, X: Tensor, Z: Tensor, mask: Tensor | None) -> Tensor:
        q = self.query(self.norm_query(X)).unflatten(-1, (self.heads, -1))
        k = self.key(Z).unflatten(-1, (self.heads, -1))
        scores = torch.einsum("nhd,bshd->bhns", q, k) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask.bool()[:, None, None], float("-inf"))
        return scores.softmax(dim=-1)

    def forward(self, X: Tensor, Z: Tensor, mask: Tensor | None = None) -> Tensor:
        """X (n, width), Z (B, S, d_v) and the mask of its patches (B, S) -> (B, n, width)."""
        Z = self.norm_patches(Z.to(self.gate_norm.dtype))
        X = X.to(self.gate_norm.dtype)
        v = self.value(Z).unflatten(-1, (self.heads, -1))
        seen = torch.einsum("bhns,bshd->bnhd", self._weights(X, Z, mask).to(v.dtype), v)
        return X + self.gate_norm * self.out(seen.flatten(2))


class StructuredContext(nn.Module):
    """The trained part of an adapter: G, K, Q and the attention.

    Args:
        text_width: d_t of the tower's embeddings.
        num_general, num_instance, num_domain: M_g, M_i, M_d.
        num_domains: n_dom.
    """

    def __init__(
        self, text_width: int, *, num_general: int, num_instance: int, num_domain: int, num_domains: int
    ) -> None:
        super().__init__()

        def drawn(*shape: int) -> nn.Parameter | None:
            return nn.Parameter(0.02 * torch.randn(*shape, text_width)) if 0 not in shape else None

        self.general = drawn(num_general)  # G
        self.domain = drawn(num_domains, num_domain)  # K
        self.instance = drawn(num_instance)  # Q
        self.attention: VisualAttention | None = None  # where something looks at the image

    @property
    def looks(self) -> bool:
        """Whether prompts depend on the image."""
        return self.instance is not None and self.attention is not None

    def instance_of(self, Z: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """I(x) (B, M_i, d_t) of the patches Z (B, S, d_v); None where prompts don't look at the image."""
        if self.instance is None or self.attention is None:
            return None
        return self.attention(self.instance, Z, mask)
