"""What reads a model's inputs: the convolutions that read pixels, the embeddings that read tokens, the tokens that stand for media."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from .modules import own_modules, unwrap


def pixel_readers(model: nn.Module) -> list[str]:
    """Paths of the convolutions that read images."""
    return [p for p, m in own_modules(model).items() if isinstance(m, (nn.Conv2d, nn.Conv3d)) and m.in_channels == 3]


def token_embeddings(model: Any) -> list[str]:
    """Paths of the embeddings that read tokens (not positions, not types); without a config any that may."""
    modules = own_modules(model)
    sizes = {getattr(c, "vocab_size", None) for c in configs_of(getattr(model, "config", None))} or {None}
    try:
        primary = unwrap(model.get_input_embeddings()) if hasattr(model, "get_input_embeddings") else None
    except (NotImplementedError, AttributeError):
        primary = None
    return [
        path
        for path, module in modules.items()
        if isinstance(module, nn.Embedding)
        and (module is primary or module.num_embeddings in sizes or (primary is None and sizes == {None}))
        and not re.search(r"pos|type|segment", path.rpartition(".")[2])
    ]


def configs_of(config: Any) -> Iterator[Any]:
    if config is None:
        return
    yield config
    for name in getattr(config, "sub_configs", {}) or {}:
        yield from configs_of(getattr(config, name, None))
    for value in vars(config).values():
        if hasattr(value, "sub_configs"):
            yield from configs_of(value) if value is not config else ()


def image_sizes(model: Any) -> Iterator[tuple[int, int]]:
    """(height, width) of images, as the config and those inside it name them."""
    for config in configs_of(getattr(model, "config", None)):
        size = getattr(config, "image_size", None)
        if isinstance(size, int):
            yield size, size
        elif isinstance(size, (list, tuple)) and len(size) == 2:
            yield size[0], size[1]


def media_tokens(model: nn.Module) -> dict[str, int]:
    """{"image_token_id": 32000, ...} as far as the config or one inside it names them."""
    found: dict[str, int] = {}
    for config in configs_of(getattr(model, "config", None)):
        for kind in ("image", "video", "media", "audio"):
            for name in (f"{kind}_token_id", f"{kind}_token_index"):
                value = getattr(config, name, None)
                if isinstance(value, int) and kind not in {n.partition("_")[0] for n in found}:
                    found[name] = value
    return found
