"""What GatedXAttn puts into a model: the gated block before a layer, the marker's row, the reader of a call's images.

The equations stand in `__init__.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.anatomy import device_of
from ...core.parts import MultimodalLayer, Wrapper
from ...core.private import run_checkpointed
from ...encoders.frozen import Place
from ...nn.media import Reading, Sight
from ...nn.media_inputs import Seeing
from ...nn.media_reader import MediaReader
from ...nn.perceiver import CrossAttention, KeysValues, Resampler, feed_forward

# --- the block -------------------------------------------------------------------------------------------------------


class GatedBlock(nn.Module):
    """The module docstring's y -> y2.

    Args:
        width: d of the decoder.
        vision_width: D of the images' tokens.
        heads, head_dim: Of the cross-attention.
        ff_mult: Width of the FFW in multiples of d; 0 leaves it out.
        gate: "scalar", "vector" or "none".
        gate_init: a_x and a_f at the start.
    """

    def __init__(
        self, width: int, vision_width: int, heads: int, head_dim: int, ff_mult: int, gate: str, gate_init: float
    ) -> None:
        super().__init__()

        def new_gate() -> nn.Parameter | None:
            numbers = {"none": 0, "scalar": 1, "vector": width}[gate]
            return nn.Parameter(torch.full((numbers,), float(gate_init))) if numbers else None

        self.attention_norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, vision_width, heads, head_dim)
        self.attention_gate_norm = new_gate()  # names in `_norm` get no weight decay from Trainer
        self.ffw: nn.Sequential | None = None
        if ff_mult:
            self.ffw_norm = nn.LayerNorm(width)
            self.ffw = feed_forward(width, ff_mult)
            self.ffw_gate_norm = new_gate()
        if gate_init and gate != "none":  # the gates are open: what they let through is nothing yet
            lasts: list[Any] = [self.attention.out, *([self.ffw[-1]] if self.ffw else [])]
            for last in lasts:
                nn.init.zeros_(last.weight)

    def seeing_parameters(self) -> list[nn.Parameter]:
        """Those that a text without images doesn't use."""
        gate = [] if self.attention_gate_norm is None else [self.attention_gate_norm]
        return [*self.attention_norm.parameters(), *self.attention.parameters(), *gate]

    def forward(self, y: Tensor, sight: Sight | None = None, keys_values: KeysValues | None = None) -> Tensor:
        """(B, L, d) -> (B, L, d).

        Args:
            sight, keys_values: How the tokens read their images, and what it picked of these; None: there are none.
        """
        stream = y.to(self.attention_norm.weight.dtype)
        if sight is not None and keys_values is not None:
            q = self.attention.queries(self.attention_norm(stream))
            rows = sight.rows  # of generation's beams, several rows read the same images
            attended = sight.attention(q.reshape(rows, -1, *q.shape[2:]), *keys_values).reshape(q.shape)
            stream = stream + _opened(self.attention_gate_norm) * self.attention.output(attended)
        if self.ffw is not None:
            stream = stream + _opened(self.ffw_gate_norm) * self.ffw(self.ffw_norm(stream))
        return stream.to(y.dtype)


class ZeroGradients(torch.autograd.Function):
    """The stream as it is, with gradients of zero for parameters that had nothing to do.

    Under distributed training every process has to have a gradient of every parameter, also one whose texts have no
    images.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], *map(torch.zeros_like, ctx.saved_tensors)


def _opened(gate: Tensor | None) -> Tensor | float:
    return 1.0 if gate is None else gate.tanh()


# --- the layers ------------------------------------------------------------------------------------------------------


class GatedXAttnLayer(MultimodalLayer):
    """Base of everything that this method puts into a model."""


class GatedXAttnReader(MediaReader, GatedXAttnLayer):
    """Reads a call's images, and holds what the layers share."""

    method = "GatedXAttn"
    adapter_layer_names = ("gated_xattn_resampler", "gated_xattn_shared")
    gated_xattn_resampler: Any  # {adapter: Resampler}
    gated_xattn_shared: Any  # {adapter: GatedBlock}, of adapters with share_blocks

    def add(
        self,
        adapter_name: str,
        seeing: Seeing,
        resampler: Resampler,
        shared: GatedBlock | None = None,
        encoder: nn.Module | None = None,
        place: Place | None = None,
    ) -> None:
        """Let an adapter read images.

        Args:
            shared: The one block of all layers, where they share one.
            encoder, place: Of its images, and where it was read.
        """
        if encoder is not None:
            self.take_encoder(adapter_name, encoder, place)
        self.sights[adapter_name] = seeing
        self.gated_xattn_resampler[adapter_name] = resampler
        if shared is not None:
            self.gated_xattn_shared[adapter_name] = shared

    def resample(self, adapter: str, features: Tensor, frame_mask: Tensor | None) -> Tensor:
        resampler: Resampler = self.gated_xattn_resampler[adapter]
        device = resampler.frames.device
        return resampler(features.to(device), None if frame_mask is None else frame_mask.to(device).bool())


class SeeingLayer(Wrapper, GatedXAttnLayer):
    """Wraps a frozen decoder layer with the block before it.

    The block is recomputed with the layer under gradient checkpointing: it gets the images' tokens as an input.
    """

    adapter_layer_names = ("gated_xattn_block",)
    gated_xattn_block: Any  # {adapter: GatedBlock}; empty for adapters with share_blocks

    def __init__(self, base_layer: nn.Module, reader: GatedXAttnReader, role: str) -> None:
        super().__init__(base_layer, role)
        self.sharing: set[str] = set()
        self._reader = (reader,)

    def add(self, adapter_name: str, block: GatedBlock | None) -> None:
        """Let an adapter act here: by a block of its own, or (None) by the one of all layers."""
        if block is None:
            self.sharing.add(adapter_name)
            return
        self.gated_xattn_block[adapter_name] = block

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.sharing.discard(adapter_name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(self.see(hidden_states), *args, **kwargs)

    def see(self, y: Tensor) -> Tensor:
        """(B, L, d) -> (B, L, d), read on by the frozen layer."""
        (reader,) = self._reader
        adapter = next((a for a in reader.live_adapters() if a in self.sharing or a in self.gated_xattn_block), None)
        if adapter is None:
            return y
        if not reader.scope.is_open:
            raise RuntimeError(
                "A decoder layer ran outside of a call of its model, where nothing is known of images. Call the model that "
                "the adapter was made for, not a part of it."
            )
        shared = adapter in self.sharing
        block: GatedBlock = reader.gated_xattn_shared[adapter] if shared else self.gated_xattn_block[adapter]
        reading: Reading = reader.scope.seen
        sight = reading.sight(y)
        if sight is None:
            idle = block.seeing_parameters()
            if not reading.is_missed:
                reading.is_missed = True
                idle += reader.gated_xattn_resampler[adapter].parameters()
            if self.training and torch.is_grad_enabled():
                y = ZeroGradients.apply(y, *(p for p in idle if p.requires_grad))
            return run_checkpointed(self.base_layer, block, y)
        make = block.attention.keys_values
        if reading.keeps:
            key = adapter if shared else (adapter, self.role)
            return block(y, sight, reading.keys_values(key, sight, lambda m: make(m.to(y.device))))

        def see(y: Tensor, latents: Tensor) -> Tensor:
            return block(y, sight, sight.pick(*make(latents)))

        latents: Any = reading.media.latents
        return run_checkpointed(self.base_layer, see, y, latents.to(y.device))


class MarkerEmbedding(Wrapper, GatedXAttnLayer):
    """Wraps the frozen token embedding: the marker gets a row of its own, which trains."""

    adapter_layer_names = ("gated_xattn_marker_norm",)
    gated_xattn_marker_norm: Any  # {adapter: (d)}, as the embedding gives it, that is after any scaling

    def __init__(self, base_layer: nn.Module, role: str) -> None:
        super().__init__(base_layer, role)
        self.gated_xattn_marker_norm = nn.ParameterDict()
        self.markers: dict[str, int] = {}

    @torch.no_grad()
    def add(self, adapter_name: str, marker: int) -> None:
        """The row starts as the vocabulary's own; one beyond it as the mean of rows that are spread over it."""
        embedding: Any = self.base_layer
        device, size = device_of(embedding), embedding.num_embeddings
        ids = torch.tensor([marker]) if marker < size else torch.linspace(0, size - 1, min(size, 1024)).long()
        self.markers[adapter_name] = marker
        self.gated_xattn_marker_norm[adapter_name] = nn.Parameter(embedding(ids.to(device)).mean(dim=0))

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.markers.pop(adapter_name, None)

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = next(iter(self.live_adapters()), None)
        if adapter is None:
            return self.base_layer(input_ids, *args, **kwargs)
        marks = input_ids == self.markers[adapter]
        rows = self.base_layer(input_ids.masked_fill(marks, 0), *args, **kwargs)
        return torch.where(marks[..., None], self.gated_xattn_marker_norm[adapter].to(rows.dtype), rows)
