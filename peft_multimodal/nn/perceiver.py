"""From the features of a vision encoder to the tokens that a language model reads (Alayrac et al., arXiv 2204.14198).

The Perceiver resampler turns any number of features of one image or video, X in R^{F x S x D} (F frames, S places),
into R tokens. With learned latents Z in R^{R x D} and a learned embedding T in R^{F_max x D} of the frames:

    X   = X + T[f], flattened to (F S) x D                  places have no embedding
    for each of `depth` layers:
        Xn, Zn = LN_x(X), LN_z(Z)
        Z = Z + softmax((Zn W_q) ([Xn; Zn] W_k)^T / sqrt(d_h)) ([Xn; Zn] W_v) W_o
        Z = Z + FFW(Z)                                      LN, D -> 4 D, GELU, 4 D -> D
    m   = LN(Z)                                             R x D

Parameters, at I = heads d_h: R D + F_max D + depth (4 D + 4 D I + 2 D + 8 D^2) + 2 D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]


class CrossAttention(nn.Module):
    """The maps of an attention without biases: queries from a width d, keys and values from a width D.

    Args:
        width: d.
        source_width: D.
        heads, head_dim: The inner width is I = heads head_dim, whatever d and D are.
    """

    def __init__(self, width: int, source_width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.q = nn.Linear(width, inner, bias=False)
        self.kv = nn.Linear(source_width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def queries(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., heads, d_h)."""
        return self.q(x).unflatten(-1, (self.heads, -1))

    def keys_values(self, m: Tensor) -> KeysValues:
        """(..., D) -> keys and values, each (..., heads, d_h)."""
        k, v = self.kv(m).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return k, v

    def output(self, attended: Tensor) -> Tensor:
        """(..., heads, d_h) -> (..., d)."""
        return self.out(attended.flatten(-2))


def feed_forward(width: int, mult: int) -> nn.Sequential:
    """d -> mult d -> d with exact GELU, without biases; its norm stands before it."""
    return nn.Sequential(
        nn.Linear(width, mult * width, bias=False), nn.GELU(), nn.Linear(mult * width, width, bias=False)
    )


class Resampler(nn.Module):
    """Base of the resamplers: features of images and videos to tokens, frames told apart by an embedding.

    Args:
        width: D of the vision encoder.
        max_frames: F_max; the embedding of a longer video is interpolated linearly.
    """

    def __init__(self, width: int, max_frames: int) -> None:
        super().__init__()
        self.frames = nn.Parameter(0.02 * torch.randn(max_frames, width))

    def forward(self, x: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Features (N, F, S, D) of N images or videos -> tokens (N, R, D).

        Args:
            frame_mask: (N, F), True where a frame is one; the others are never read. None: all are.
        """
        mask = x.new_ones(1, x.shape[1], dtype=torch.bool) if frame_mask is None else frame_mask
        return self.resample(x.to(self.frames.dtype) + self.frame_embedding(mask)[:, :, None], frame_mask)

    def resample(self, x: Tensor, frame_mask: Tensor | None) -> Tensor:
        raise NotImplementedError

    def frame_embedding(self, mask: Tensor) -> Tensor:
        """(N, F) -> (N, F, D): of each video's own frames the first embeddings, or all of them stretched to more."""
        last, count = len(self.frames) - 1, mask.sum(dim=1, keepdim=True)
        stretch = torch.where(count > last + 1, last / (count - 1).clamp_min(1), 1.0)
        place = ((mask.cumsum(dim=1) - 1).clamp_min(0) * stretch).clamp_max(last)
        low = place.floor().long()
        high = (low + 1).clamp_max(last)
        return torch.lerp(self.frames[low], self.frames[high], (place - low)[..., None].to(self.frames.dtype))


class PerceiverResampler(Resampler):
    """The module docstring's resampler.

    Args:
        num_latents: R.
        depth: Layers.
        heads, head_dim: Of the attention.
    """

    def __init__(self, width: int, max_frames: int, num_latents: int, depth: int, heads: int, head_dim: int) -> None:
        super().__init__(width, max_frames)
        self.latents = nn.Parameter(torch.randn(num_latents, width))
        self.layers = nn.ModuleList(PerceiverLayer(width, heads, head_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def resample(self, x: Tensor, frame_mask: Tensor | None) -> Tensor:
        n, _, places, _ = x.shape
        mask = None
        if frame_mask is not None:  # keys are the features, frame by frame, and then the latents
            latents = frame_mask.new_ones(n, len(self.latents))
            mask = torch.cat([frame_mask.repeat_interleave(places, dim=1), latents], dim=1)[:, None, None]
        x = x.flatten(1, 2)
        z = self.latents.expand(n, -1, -1)
        for layer in self.layers:
            z = layer(z, x, mask)
        return self.norm(z)


class PerceiverLayer(nn.Module):
    """One layer of the resampler: latents read the features and themselves."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.features_norm = nn.LayerNorm(width)
        self.latents_norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, width, heads, head_dim)
        self.ffw_norm = nn.LayerNorm(width)
        self.ffw = feed_forward(width, 4)

    def forward(self, z: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Latents z (N, R, D) and features x (N, F S, D) -> (N, R, D)."""
        zn = self.latents_norm(z)
        q = self.attention.queries(zn)
        k, v = self.attention.keys_values(torch.cat([self.features_norm(x), zn.to(x.dtype)], dim=1))
        attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        z = z + self.attention.output(attended.transpose(1, 2))
        return z + self.ffw(self.ffw_norm(z))


class LinearResampler(Resampler):
    """An ablation without attention: m = LN(mean of X over the frames) W, S tokens an image; 2 D + D^2 parameters
    beside the frames'."""

    def __init__(self, width: int, max_frames: int) -> None:
        super().__init__(width, max_frames)
        self.norm = nn.LayerNorm(width)
        self.map = nn.Linear(width, width, bias=False)

    def resample(self, x: Tensor, frame_mask: Tensor | None) -> Tensor:
        if frame_mask is None:
            return self.map(self.norm(x.mean(dim=1)))
        kept = frame_mask[:, :, None, None]
        return self.map(self.norm((x * kept).sum(dim=1) / kept.sum(dim=1).clamp_min(1)))


class MeanResampler(LinearResampler):
    """An ablation that reads the whole image as one token: the mean of what `LinearResampler` reads."""

    def resample(self, x: Tensor, frame_mask: Tensor | None) -> Tensor:
        return super().resample(x.mean(dim=2, keepdim=True), frame_mask)
