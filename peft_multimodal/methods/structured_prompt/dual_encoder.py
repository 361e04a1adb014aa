"""The dual encoder that prompts are written for: its towers' widths, its images' patches, its own logits and loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import NoMatchingPeftModuleError
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ...core.anatomy import Anatomy
from ...core.modules import device_of, is_below
from ...core.readers import image_sizes, pixel_readers, token_embeddings


class Images(NamedTuple):
    """What the vision tower says of a batch."""

    v: Tensor  # (B, e), of norm 1
    Z: Tensor  # (B, S, d_v): patches, without CLS and its like
    mask: Tensor | None  # (B, S), 0 at patches that fill an image up; None where there are none


def text_tower(model: Any, anatomy: Anatomy) -> str:
    """Path of a dual encoder's text tower; NoMatchingPeftModuleError where the model is none."""
    towers = [t.path for t in anatomy.towers if t.path and any(is_below(e, t.path) for e in token_embeddings(model))]
    dual = all(hasattr(model, f"get_{kind}_features") for kind in ("text", "image"))
    scale = any(isinstance(getattr(model, name, None), Tensor) for name in ("logit_scale", "temperature"))
    if not dual or not scale or len(towers) != 1 or any(t.name == "fusion" for t in anatomy.towers):
        raise NoMatchingPeftModuleError(
            f"{anatomy.model_class} doesn't compare images with texts by features of their own, which is how classes are "
            "told apart here. Use a dual encoder (CLIP, SigLIP, ChineseCLIP, AltCLIP, VisionTextDualEncoder, ...)."
        )
    return towers[0]


@torch.no_grad()
def widths(model: Any, tower: str, anatomy: Anatomy) -> tuple[int, int, int]:
    """(d_t, d_v, e): of the token embeddings, the patches and the shared space, measured."""
    embedding = model.get_submodule(next(p for p in token_embeddings(model) if is_below(p, tower)))
    ids = torch.ones(1, 2, dtype=torch.long, device=device_of(embedding))
    mask = None if ids.is_meta else ids  # what a mask holds would be asked
    text = type(model).get_text_features(model, input_ids=ids, attention_mask=mask, return_dict=True)
    size, convolutions = next(image_sizes(model), None), [model.get_submodule(path) for path in pixel_readers(model)]
    if convolutions and size:
        pixels = torch.zeros(1, 3, *size, dtype=convolutions[0].weight.dtype, device=device_of(convolutions[0]))
        image = type(model).get_image_features(model, pixel_values=pixels, return_dict=True).last_hidden_state
        patch_width = patches(convolutions, pixels, image).shape[-1]
    else:
        patch_width = next(t.hidden_size for t in anatomy.towers if t.name == "vision") or 0
    return embedding.embedding_dim, patch_width, text.pooler_output.shape[-1]


def patches(convolutions: Sequence[nn.Module], pixel_values: Tensor, states: Tensor) -> Tensor:
    """The vision tower's states (B, S, d_v) or (B, d_v, H, W) without CLS, registers and their like: (B, S', d_v).

    Args:
        convolutions: What reads the pixels: one that cuts them into patches says how many there are.
    """
    if states.ndim == 4:
        return states.flatten(2).transpose(1, 2)
    if len(convolutions) != 1:
        return states
    patch: Any = convolutions[0]
    high, wide = (
        (size - kernel) // stride + 1
        for size, kernel, stride in zip(pixel_values.shape[-2:], patch.kernel_size[-2:], patch.stride[-2:], strict=True)
    )
    return states[:, max(states.shape[1] - high * wide, 0) :]


def scaled(model: Any, cos: Tensor) -> Tensor:
    """The model's own logits of cosines: exp(s) cos + b."""
    if not hasattr(model, "logit_scale"):
        return cos / model.temperature
    scale = model.logit_scale
    if (limit := getattr(model, "max_log_logit_scale", None)) is not None:
        scale = scale.clamp(0.0, limit)
    logits = cos * scale.exp()
    bias = getattr(model, "logit_bias", None)
    return logits if bias is None else logits + bias


def pair_loss(model: Any, logits: Tensor) -> Tensor:
    """The loss of pairs that the model was trained with: CLIP's, or SigLIP's where it has a bias."""
    if logits.shape[0] != logits.shape[1]:
        raise ValueError(f"return_loss=True needs a caption for each image, got {tuple(logits.shape)}.")
    if getattr(model, "logit_bias", None) is not None:
        pairs = 2 * torch.eye(len(logits), device=logits.device) - 1
        return -F.logsigmoid(pairs * logits).sum(dim=-1).mean()
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# --- the model without what was trained on it ------------------------------------------------------------------------


def switched(model: nn.Module) -> list[Any]:
    """Whatever PEFT switches in a model: layers of any method, and modules that are trained beside one."""
    return [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def trained_beside(model: nn.Module) -> set[int]:
    """Identities of the parameters that adapters, and modules trained beside them, have put into a model."""
    parts = (getattr(m, name, None) for m in switched(model) for name in m.adapter_layer_names)
    return {id(p) for part in parts if isinstance(part, nn.Module) for p in part.parameters()}


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """The model without anything that was trained on it. No `requires_grad` changes, as it would by PEFT's own switch."""
    live = [m for m in switched(model) if not m.disable_adapters]
    for m in live:
        m._disable_adapters = True
    try:
        yield
    finally:
        for m in live:
            m._disable_adapters = False
