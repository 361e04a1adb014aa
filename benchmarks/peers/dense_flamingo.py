"""Gated cross-attention as Flamingo's open implementations do it: all images, a dense mask, every token anew.

Every call maps the tokens of all images to keys and values, scores every text token against all of them, and masks
those of other images (Alayrac et al., arXiv 2204.14198; Awadalla et al., "OpenFlamingo", arXiv 2308.01390). While text
is generated, its tokens belong to the last image of the prompt; nothing but the resampler's output is kept.
The parameters are those of `GatedBlock`, so that the outputs must be equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from peft_multimodal.methods.gated_xattn.layers import GatedBlock


class DenseBlock(nn.Module):
    """A `GatedBlock`'s parameters, used in the published way."""

    def __init__(self, block: GatedBlock) -> None:
        super().__init__()
        self.block: Any = block

    def forward(self, y: Tensor, m: Tensor, times: Tensor) -> Tensor:
        """(B, L, d) -> (B, L, d).

        Args:
            m: (B, T, R, D), the images' tokens.
            times: (B, L), how many markers stand before or at a token.
        """
        block, maps = self.block, self.block.attention
        images, tokens = m.shape[1:3]
        q = maps.queries(block.attention_norm(y)).transpose(1, 2)
        k, v = (x.transpose(1, 2) for x in maps.keys_values(m.flatten(1, 2)))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        place = torch.arange(1, images + 1, device=y.device).repeat_interleave(tokens)
        own = (times[..., None] == place)[:, None]
        scores = scores.masked_fill(~own, -torch.finfo(scores.dtype).max)
        scores = scores - scores.amax(dim=-1, keepdim=True).detach()
        weights = scores.softmax(dim=-1).masked_fill((times == 0)[:, None, :, None], 0.0)
        attended = maps.output((weights @ v).transpose(1, 2))
        y = y + attended * block.attention_gate_norm.tanh()
        return y + block.ffw(block.ffw_norm(y)) * block.ffw_gate_norm.tanh()


class IdeficsBlock(nn.Module):
    """transformers' own layer, which masks densely too and keeps neither keys nor values."""

    def __init__(self, layer: IdeficsGatedCrossAttentionLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, y: Tensor, m: Tensor, times: Tensor) -> Tensor:
        place = torch.arange(1, m.shape[1] + 1, device=y.device).repeat_interleave(m.shape[2])
        own = times[..., None] == place
        mask = torch.where(own, 0.0, torch.finfo(y.dtype).min)[:, None]
        return self.layer(
            y,
            image_hidden_states=m.flatten(1, 2),
            image_attention_mask=mask,
            cross_attention_gate=own.any(-1).to(y.dtype),
        )


class PeerLayer(nn.Module):
    """A decoder layer behind a peer's block, which reads the state of the call from attributes, as the peers do."""

    def __init__(self, block: Any, layer: nn.Module, marker: int) -> None:
        super().__init__()
        self.block, self.layer, self.marker = block, layer, marker
        self.images: Tensor | None = None
        self.times: Tensor | None = None

    def look(self, images: Tensor, ids: Tensor) -> None:
        self.images, self.times = images, (ids == self.marker).long().cumsum(dim=1)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.times is not None
        new = hidden_states.shape[1] == 1
        times = self.times[:, -1:] if new else self.times
        return self.layer(self.block(hidden_states, self.images, times), *args, **kwargs)
