"""Building blocks that several methods share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class TransformerBlock(nn.Module):
    """One pre-LN transformer layer: x + attention(LN x), then x + FFN(LN x), with exact GELU.

    Both branches end in a map that starts at 0, so the layer starts as the identity. 12 m^2 + 13 m parameters at width
    m and `ff_mult=4`.

    Args:
        width: m.
        heads: Attention heads; they divide the width.
        ff_mult: The FFN's width in multiples of m.
        dropout: On the two branches, in training.
    """

    def __init__(self, width: int, heads: int, ff_mult: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_ffn = nn.LayerNorm(width)
        ffn_out = nn.Linear(ff_mult * width, width)
        self.ffn = nn.Sequential(nn.Linear(width, ff_mult * width), nn.GELU(), ffn_out)
        self.dropout = nn.Dropout(dropout)
        for last in (self.out, ffn_out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, m) -> (B, L, m).

        Args:
            mask: Broadcastable to (B, heads, L, L): boolean, True where a query may look, or added to the scores.
        """
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, mask)  # (B, heads, L, m / heads)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))
