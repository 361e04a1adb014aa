"""What a frozen fusion encoder makes of two texts beside the same images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.anatomy import base_model, describe
from ...core.modes import eval_mode
from ...languages import multilingual_tower


def functional_loss(
    model: nn.Module, Y: Tensor, E: Tensor, mask: Tensor, target_mask: Tensor, pixels: Tensor
) -> Tensor:
    """What the frozen fusion encoder makes of the two texts beside the same images: free of length and order.

    The states that are compared are those before the text's: the image's, and a class token's.

    Args:
        model: The whole model, with a language at level="tokens".
        pixels: (B, 3, H, W); random ones do.
    """
    tower, base = multilingual_tower(model), base_model(model)
    dtype = next(p.dtype for p in tower.host().parameters() if p.is_floating_point())
    stack: Any = base.get_submodule(next(t.path for t in describe(model).towers if t.name == "fusion"))
    outputs = []
    with eval_mode(base):  # the frozen encoders have no dropout, as when the text tower teaches
        for states, text_mask in ((Y, mask), (E, target_mask)):
            kept: list[Tensor] = []
            handle = stack[-1].register_forward_hook(
                lambda m, a, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out)
            )
            try:
                with tower.standing_in(states.to(dtype)):
                    tokens = {"input_ids": text_mask.long(), "attention_mask": text_mask.long()}
                    model(**tokens, pixel_values=pixels.to(dtype))
            finally:
                handle.remove()
            outputs.append(kept[-1][:, : kept[-1].shape[1] - states.shape[1]])
    return F.mse_loss(outputs[0].float(), outputs[1].detach().float())


def random_images(model: Any, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Noise of the size that the model's vision tower reads: (count, 3, H, W)."""
    config: Any = base_model(model).config
    config = getattr(config, "vision_config", None) or getattr(config, "image_config", None) or config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(count, 3, height, width, generator=generator)
