"""The frozen vision encoder: read, measured, checked against what an adapter was trained on."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.anatomy import describe, device_of, dtype_of
from .frozen import Place, check_same_encoder, find_encoder, given_encoder, read_encoder

KIND, FIELD = "vision encoder", "vision_encoder"


class NamesVisionEncoder(Protocol):
    """The fields of an adapter's config that say which vision encoder it has."""

    vision_encoder: str | None
    vision_encoder_revision: str | None
    vision_hidden_size: int | None

    @property
    def is_loaded(self) -> bool: ...


def has_encoder(config: NamesVisionEncoder) -> bool:
    return config.vision_encoder is not None or given_encoder(config) is not None


def load_vision_encoder(config: NamesVisionEncoder, present: nn.ModuleDict | None = None) -> nn.Module | None:
    """The config's frozen vision encoder, one of `present` if it is among them; None where the config has none.

    Of a model that also reads text the vision tower alone is taken. Fills in `vision_hidden_size` and
    `vision_encoder_type`.

    Raises:
        ValueError: it can't be read, sees nothing, needs more than pixels, sees an image differently from time to time,
            or is not the one that the adapter was trained on.
    """
    if not has_encoder(config):
        return None
    place = place_of(config)
    if place is not None and present is not None and place.key in present:
        encoder = present[place.key]
    else:
        whole: Any = given_encoder(config) if place is None else read_encoder(place, KIND, FIELD)
        encoder = _vision_tower(whole, config)
    encoder = encoder.requires_grad_(False).eval()
    model_type = getattr(getattr(encoder, "config", None), "model_type", None)
    width = _width(encoder, config)
    if config.vision_hidden_size not in (None, width) and not config.is_loaded:
        raise ValueError(
            f"vision_hidden_size={config.vision_hidden_size}, but {_name(config)} gives features of width {width}. Leave it out."
        )
    check_same_encoder(
        config, {"vision_encoder_type": model_type, "vision_hidden_size": width}, FIELD, "with_vision_encoder"
    )
    return encoder


def place_of(config: NamesVisionEncoder) -> Place | None:
    """Where the encoder is, whose commit the config then names; None where it was given as a module."""
    if given_encoder(config) is not None or config.vision_encoder is None:
        return None
    place = find_encoder(config.vision_encoder, config.vision_encoder_revision, KIND, FIELD)
    config.vision_encoder_revision = place.revision
    return place


@torch.no_grad()
def frame_features(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """The states (N, F, S, D) of all tokens, or places of a convolutional network, of frames (N, F, C, H, W)."""
    states = encoder(pixel_values=pixels.flatten(0, 1).to(device_of(encoder), dtype_of(encoder))).last_hidden_state
    if states.ndim == 4:  # (N F, D, H', W')
        states = states.flatten(2).transpose(1, 2)
    return states.unflatten(0, pixels.shape[:2])


def _vision_tower(model: nn.Module, config: NamesVisionEncoder) -> nn.Module:
    towers = [t for t in describe(model).towers if t.name == "vision"]
    tower = model.get_submodule(towers[0].path) if len(towers) == 1 else model
    needed = [
        p.name
        for p in inspect.signature(tower.forward).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty and p.name != "pixel_values"
    ]
    if needed and "input_ids" not in needed:
        raise ValueError(
            f"{_name(config)} ({type(tower).__name__}) needs {', '.join(needed)}, as it reads images of any size, cut into "
            "patches and padded. A frozen vision encoder reads pixel_values (N, C, H, W) alone: CLIP, SigLIP, DINOv2, ViT, "
            "ResNet, ... Or encode the images yourself and pass vision_features."
        )
    if len(towers) != 1:
        raise ValueError(f"{_name(config)} ({type(model).__name__}) has {len(towers)} vision towers; one is needed.")
    return tower


def _width(encoder: Any, config: NamesVisionEncoder) -> int:
    """D, measured on an image of the encoder's size, which it sees twice."""
    size = getattr(encoder.config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    image = torch.linspace(-1, 1, 3 * height * width).view(1, 1, 3, height, width)
    features = frame_features(encoder, image.expand(-1, 2, -1, -1, -1))
    one, two = features[0].float().mean(dim=1)  # in any order, which the resampler doesn't know
    if (one - two).norm() > torch.finfo(features.dtype).eps ** 0.5 * one.norm():
        cure = " Set its config.mask_ratio to 0 and pass it by with_vision_encoder(module)."
        raise ValueError(
            f"{_name(config)} ({type(encoder).__name__}) gives other features each time that it sees the same image, as "
            "pretraining by masked patches does." + (cure if hasattr(encoder.config, "mask_ratio") else "")
        )
    return features.shape[-1]


def _name(config: NamesVisionEncoder) -> str:
    return repr(config.vision_encoder or "the given vision encoder")
