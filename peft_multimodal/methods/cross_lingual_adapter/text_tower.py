"""The text tower of a model that can be replaced as a whole, and what the rest of the model reads of it."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from peft import NoMatchingPeftModuleError
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ...core.anatomy import Anatomy, device_of, is_below, own_modules, token_embeddings
from ...languages import Teaching


def text_tower(model: nn.Module, anatomy: Anatomy) -> str:
    """Path of the text tower that can be replaced as a whole; the error says why there is none, and what to use."""
    towers = [t for t in anatomy.towers if t.name == "text" and t.attentions]
    embeddings = token_embeddings(model)
    instead = (
        "Use a dual encoder (CLIP, SigLIP, VisionTextDualEncoder, ...) or a fusion model whose text encoder stands apart "
        "(FLAVA)"
    )
    if not embeddings and not towers:
        raise NoMatchingPeftModuleError(
            f"{anatomy.model_class} has no text encoder: nothing in it reads text. {instead}."
        )
    instead += ", or train this one on the language with AuroraModeApprox."
    names = set(anatomy.tower_names())
    decodes = "decoder" in names and not names & {"vision", "fusion"}  # a language model, T5 and BART among them
    if anatomy.fusion_layers and not decodes:
        raise NoMatchingPeftModuleError(
            f"{anatomy.model_class} reads the image inside its text layers ({anatomy.fusion_layers[0]}, ...), so its text "
            f"encoder can't be exchanged for another language's. {instead}"
        )
    towers = [t for t in towers if any(is_below(e, t.path) for e in embeddings)]
    if decodes or len(towers) != 1 or anatomy.media_tokens or (not towers[0].path and _takes_images(model)):
        one = "its decoder reads the text" if decodes else "one stack reads text and image"
        read = "several text towers" if len(towers) > 1 else f"no text encoder of its own: {one}"
        raise NoMatchingPeftModuleError(f"{anatomy.model_class} has {read}. {instead}")
    path = towers[0].path
    if not path:  # the text side alone; its projection stands behind the tower
        children = [name for name, _ in model.named_children()]
        if any("projection" in name for name in children):
            return next((n for n in children if any(is_below(e, n) for e in embeddings)), path)
    return path


def _takes_images(model: nn.Module) -> bool:
    """Whether the forward of a model takes images, or features of them."""
    return any(name.startswith(("pixel", "visual", "image")) for name in inspect.signature(model.forward).parameters)


def level_of(model: nn.Module, anatomy: Anatomy) -> str:
    """What the rest of the model reads of the text tower: its pooled output, or (a fusion encoder) its tokens' states.

    A fusion encoder reads them if a map leads from the text's width into it, beside the one into the shared space.
    """
    width = {t.name: t.hidden_size for t in anatomy.towers}
    maps = [
        module
        for path, module in own_modules(model).items()
        if isinstance(module, nn.Linear) and re.search(r"text_(?!projection)", path.rpartition(".")[2])
    ]
    reads = any((m.in_features, m.out_features) == (width["text"], width.get("fusion")) for m in maps)
    return "tokens" if reads else "pooled"


def final_norm(tower: nn.Module) -> nn.Module | None:
    """The norm behind the last layer, if the tower has one: then the last of its `hidden_states` stands before it."""
    norms = [m for m in tower.children() if "Norm" in type(m).__name__]
    return norms[0] if len(norms) == 1 else None


def finished(tower: Any, states: Tensor) -> BaseModelOutputWithPooling:
    """A tower's output for states of its last layer (B, L, d_t), by the norm and the pooler behind its layers."""
    norm, pooler = final_norm(tower), getattr(tower, "pooler", None)
    last = states if norm is None else norm(states)
    pooled = last[:, 0] if pooler is None else pooler(last)
    return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled, hidden_states=(states,))


def pooled_of(output: Any) -> Tensor:
    """What a tower pools, (B, d); the first token where it has no pooler."""
    pooled = getattr(output, "pooler_output", None)
    return output.last_hidden_state[:, 0] if pooled is None else pooled


def teaching(tower: nn.Module, forward: Any, level: str, input_ids: Tensor, attention_mask: Tensor | None) -> Teaching:
    """What `forward`, the tower's own, gives for texts."""
    tokens = level == "tokens"
    out = forward(
        input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=tokens or None, return_dict=True
    )
    if tokens:
        states = out.last_hidden_state if final_norm(tower) is None else out.hidden_states[-1]
        return Teaching(states[:, 0], states)
    return Teaching(pooled_of(out), None)


@torch.no_grad()
def output_dim(tower: Any, forward: Any, level: str) -> int:
    """d_t, measured by a call of `forward`, the tower's own.

    Raises:
        ValueError: level="tokens", but what stands behind the tower's layers pools another token than the first.
    """
    device = device_of(tower)
    last = getattr(tower.config, "eos_token_id", None)
    modules: dict[str, Any] = own_modules(tower)
    size = min(modules[path].num_embeddings for path in token_embeddings(tower))
    ids = torch.tensor([[0, 1, last if isinstance(last, int) and last < size else 2]], device=device) % size
    # Of a model on the meta device only shapes are known, and what a mask holds would be asked.
    mask = None if ids.is_meta else torch.ones_like(ids)
    out = forward(input_ids=ids, attention_mask=mask, return_dict=True)
    if level == "pooled":
        return pooled_of(out).shape[-1]
    pooler, pooled = getattr(tower, "pooler", None), getattr(out, "pooler_output", None)
    first = out.last_hidden_state[:, 0] if pooler is None else pooler(out.last_hidden_state)
    if pooled is not None and not pooled.is_meta and not torch.allclose(first, pooled, atol=1e-4):
        raise ValueError(
            f"level='tokens' doesn't fit {type(tower).__name__}, which doesn't pool its first token. Use level='pooled'."
        )
    return out.last_hidden_state.shape[-1]
