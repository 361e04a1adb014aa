"""What AuroraModeApprox adds to a fusion encoder: gated query transformation (GQT), informative context enhancement (ICE).

Both act through hooks, are the identity at the start, and are no weight updates.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.anatomy import Anatomy, Site, device_of, is_below, is_cross
from ...core.parts import AttachedPart, CallScope
from ...core.private import InsideCheckpoint
from .factors import AuroraModeApproxLayer


class GatedQueryTransformation(AttachedPart, AuroraModeApproxLayer):
    """y' = y + tanh(g) ((1 + s_q) q + b_q), q the output of the layer's self-attention block (B x L x d).

    Acts on the positions that the layer's cross-attention saw, where it ran at all. 2 d + 1 parameters a branch.

    Hooks on the two attention blocks keep q and x in the call's scope, a hook on the layer adds the update. Where gradient
    checkpointing leaves the layer's own hooks outside what it recomputes, `InsideCheckpoint` adds the update inside.
    """

    adapter_layer_names = ("aurora_mode_approx_gqt",)
    no_lora = "gqt"
    aurora_mode_approx_gqt: Any  # {adapter: {name: Parameter}}

    def __init__(self, layer: nn.Module, path: str, attentions: list[str], role: str) -> None:
        super().__init__(layer, role)
        self.scope = CallScope()
        blocks = {is_cross(a): a.removeprefix(path + ".").partition(".")[0] for a in attentions}
        self.hooks = [
            layer.register_forward_pre_hook(self.scope.open),
            layer.get_submodule(blocks[False]).register_forward_hook(partial(self._keep, "query")),
            layer.get_submodule(blocks[True]).register_forward_hook(partial(self._keep, "cross")),
            layer.register_forward_hook(self._inject),
            layer.register_forward_hook(self.scope.close, always_call=True),
            InsideCheckpoint(layer, self.scope, finish=self._inject),
        ]

    def add(self, adapter_name: str, branches: list[str], width: int) -> None:
        parameters = {}
        for branch in branches:
            parameters[f"{branch}_gate_norm"] = torch.zeros(1)
            parameters[f"{branch}_scale_norm"] = torch.zeros(width)
            parameters[f"{branch}_shift_norm"] = torch.zeros(width)
        self.aurora_mode_approx_gqt[adapter_name] = nn.ParameterDict(parameters)

    def _keep(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self.scope.is_open:
            self.scope.values[name] = output[0] if isinstance(output, tuple) else output

    def _inject(self, layer: nn.Module, args: Any, output: Any) -> Any:
        kept = self.scope.values
        self.scope.close()
        if "cross" not in kept:  # text alone: nothing is fused
            return output
        y = output[0] if isinstance(output, tuple) else output
        length = kept["cross"].shape[1]  # a Q-Former's queries stand first; the text behind them reads no image
        fused = y[:, :length]
        for adapter in self.live_adapters():
            parameters = self.aurora_mode_approx_gqt[adapter]
            for branch in ("query", "cross"):
                if f"{branch}_gate_norm" in parameters:
                    gate, scale, shift = (parameters[f"{branch}_{n}_norm"] for n in ("gate", "scale", "shift"))
                    source = kept[branch][:, :length].to(scale.dtype)
                    fused = fused + (torch.tanh(gate) * ((1 + scale) * source + shift)).to(y.dtype)
        y = fused if length == y.shape[1] else torch.cat([fused, y[:, length:]], dim=1)
        return (y, *output[1:]) if isinstance(output, tuple) else y


class ContextBank(nn.Module):
    """gamma and the K latest text features (K x d, zeros until filled) of one adapter."""

    texts: Tensor
    count: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.gamma_norm = nn.Parameter(torch.zeros(1))
        self.register_buffer("texts", torch.zeros(size, width))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, features: Tensor) -> None:
        """Put B x d features in, the oldest fall out."""
        size = len(self.texts)
        features = features[-size:].to(self.texts.dtype)
        self.texts.copy_(torch.cat([features.flip(0), self.texts])[:size])  # the newest first
        self.count.add_(len(features)).clamp_(max=size)

    def context(self, fused: Tensor) -> Tensor:
        """gamma softmax(F T^T / sqrt(d)) T for F of shape (..., d); zero while the bank is empty."""
        texts = self.texts.to(fused.dtype)
        scores = fused @ texts.t() / math.sqrt(fused.shape[-1])
        empty = torch.arange(len(texts), device=fused.device) >= self.count
        return self.gamma_norm.to(fused.dtype) * (
            scores.masked_fill(empty, torch.finfo(scores.dtype).min).softmax(-1) @ texts
        )


class InformativeContext(AttachedPart, AuroraModeApproxLayer):
    """F' = F + gamma softmax(F T^T / sqrt(d)) T on every fused token of a text encoder.

    In training, calls of the encoder without an image fill the bank with their first tokens' states (detached);
    retrieval training makes such calls for its contrastive loss. Elsewhere call `collect_context`.
    """

    adapter_layer_names = ("aurora_mode_approx_ice",)
    no_lora = "ice"
    aurora_mode_approx_ice: Any  # {adapter: ContextBank}

    def __init__(self, encoder: nn.Module, role: str) -> None:
        super().__init__(encoder, role)
        self._position = list(inspect.signature(encoder.forward).parameters).index("encoder_hidden_states")
        self.hooks = [encoder.register_forward_hook(self._enhance, with_kwargs=True)]

    def add(self, adapter_name: str, size: int, width: int) -> None:
        self.aurora_mode_approx_ice[adapter_name] = ContextBank(size, width)

    @torch.no_grad()
    def collect(self, batches: Iterable[Mapping[str, Tensor]]) -> int:
        """Fill the banks of the active adapters by running the encoder on text alone; returns the number of features."""
        encoder = self.host()
        device = device_of(encoder)
        banks = [self.aurora_mode_approx_ice[adapter] for adapter in self.live_adapters()]
        for batch in batches:
            output = encoder(batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))
            for bank in () if encoder.training else banks:  # in training the hook has pushed them already
                bank.push(output[0][:, 0])
        return max((int(bank.count) for bank in banks), default=0)

    def _enhance(self, encoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        adapters = self.live_adapters()
        if not adapters:
            return output
        image = kwargs.get("encoder_hidden_states")
        image = args[self._position] if image is None and len(args) > self._position else image
        fused = output[0]
        for adapter in adapters:
            bank = self.aurora_mode_approx_ice[adapter]
            if image is None:
                if encoder.training:
                    bank.push(fused[:, 0].detach())
            else:
                fused = fused + bank.context(fused)
        if image is None:
            return output
        if isinstance(output, tuple):
            return (fused, *output[1:])
        output["last_hidden_state"] = fused
        return output


# --- where they go ---------------------------------------------------------------------------------------------------


def gqt_sites(anatomy: Anatomy, towers: list[str] | None) -> list[Site]:
    """The layers with a self- and a cross-attention, whose tower is that of the cross-attention; None means all towers."""
    sites: list[Site] = []
    for layer in anatomy.fusion_layers:
        inside = [m for m in anatomy.matrices if is_below(m.module, layer)]
        tower = next(m.tower for m in inside if is_cross(m.module))
        if not towers or tower in towers:
            width = next(m.d_in for m in inside if m.letter == "q")
            sites.append(Site(layer, "gqt", tower, f"{tower}.gqt.{len(sites)}", width, width))
    return sites


def attentions_in(anatomy: Anatomy, layer: str) -> list[str]:
    """Paths of a layer's attentions."""
    return [m.module.rpartition(".")[0] for m in anatomy.matrices if m.letter == "q" and is_below(m.module, layer)]


def ice_sites(model: nn.Module, anatomy: Anatomy) -> list[Site]:
    """The text encoder that runs with and without the image, if there is one."""
    texts = [t for t in anatomy.towers if t.name == "text" and reads_images(model.get_submodule(t.path))]
    return [Site(t.path, "ice", "fusion", "fusion.ice", t.hidden_size or 0, t.hidden_size or 0) for t in texts[:1]]


def reads_images(tower: nn.Module) -> bool:
    """Whether a text tower can read an image: its forward takes `encoder_hidden_states` and it has cross-attentions."""
    takes = "encoder_hidden_states" in inspect.signature(tower.forward).parameters
    return takes and any(is_cross(name) for name, _ in tower.named_modules())
