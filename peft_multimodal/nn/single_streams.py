"""In which order a model puts text and image side by side into one stack of layers, measured by running it.

The model runs on a tiny input, again with other tokens and again with another image: the positions of the stack's input
that move are text and image.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..core.anatomy import device_of, dtype_of, image_sizes, own_modules, pixel_readers
from ..core.modes import eval_mode

NONE, TEXT, IMAGE, VIDEO, AUDIO = -1, 0, 1, 2, 3

_WORDS = 3  # of the tiny text


@dataclass(frozen=True)
class Stream:
    """How the modality of the tokens in one stack of layers is known.

    Args:
        modalities: Those that there can be; one alone is that of every token.
        order: Of a single stream: (modality, length), from first to last. The length of a text is the name of the argument
            that brings it, that of the image None. Empty where placeholders stand among the tokens.
    """

    modalities: tuple[int, ...]
    order: tuple[tuple[int, int | str | None], ...] = ()


def measured(model: nn.Module, stacks: Sequence[str]) -> dict[str, Stream | None]:
    """{stack: its stream} of single streams; None where text and image mix, and no entry of what holds no layers."""
    firsts = {stack: layer for stack in stacks for layer in [_first_layer(model, stack)] if layer is not None}
    if not firsts:
        return {}
    if device_of(model).type == "meta":
        raise ValueError(
            f"{type(model).__name__} puts text and images into one stack of layers ({', '.join(firsts)}); in which order is "
            "measured by running it, and its weights lie on the meta device. Load them before."
        )
    text, base, read, seen = _tiny_runs(model, firsts)
    lengths = {tokens.shape[1]: name for name, tokens in text.items() if name.endswith("input_ids")}
    return {s: order_of(_moved(base[s], read[s]), _moved(base[s], seen[s]), lengths) for s in base}


def order_of(text: list[bool], image: list[bool], lengths: dict[int, str]) -> Stream | None:
    """The stream of a stack in whose input these positions follow the text and the image; None where they mix.

    What follows neither stands for itself at the beginning of the stack (its own class token), and is the image's
    elsewhere (the image's class token).

    Args:
        lengths: {tokens: argument that brings a text of so many}.
    """
    if any(t and i for t, i in zip(text, image, strict=True)):
        return None
    kinds = [TEXT if t else IMAGE if i else NONE for t, i in zip(text, image, strict=True)]
    present = sorted(set(kinds) - {NONE})
    if len(present) < 2:
        return Stream(tuple(present) or (NONE,))
    start = next(i for i, kind in enumerate(kinds) if kind != NONE)
    kinds[start:] = [IMAGE if kind == NONE else kind for kind in kinds[start:]]
    runs = [(kind, len(list(run))) for kind, run in groupby(kinds)]
    order: list[tuple[int, int | str | None]] = []
    for kind, length in runs:
        if kind in [k for k, _ in order] or (kind == TEXT and length not in lengths):
            return None
        order.append((kind, {TEXT: lengths.get(length), IMAGE: None}.get(kind, length)))
    return Stream(tuple(sorted(kind for kind, _ in order)), tuple(order))


def _tiny_runs(model: nn.Module, firsts: dict[str, nn.Module]) -> tuple[dict[str, Tensor], ...]:
    """(a tiny text, what the layers read of it and an image, of another text, of another image)."""
    failed: Exception | None = None
    for several in ((), (2,)):  # images a row, where a class wants more than one (NLVR2)
        text, image = tiny_inputs(model, 0, several)
        other_text, other_image = tiny_inputs(model, 1, several)
        runs = (text | image, other_text | image, text | other_image)
        try:
            return text, *(layer_inputs(model, firsts, inputs) for inputs in runs)
        except Exception as error:  # whatever a model's own code says
            failed = failed or error
    raise ValueError(
        f"{type(model).__name__} puts text and images into one stack of layers; in which order is measured by running it "
        f"on {sorted(text | image)}, and that fails: {failed}. Leave these layers out: {', '.join(firsts)}."
    ) from failed


def tiny_inputs(model: Any, seed: int, several: tuple[int, ...] = ()) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A text and an image, or `several`, as a model's `forward` takes them, differing from seed to seed everywhere."""
    names = list(inspect.signature(type(model).forward).parameters)
    modules, device, dtype = own_modules(model), device_of(model), dtype_of(model)
    drawn = torch.Generator().manual_seed(seed)
    text: dict[str, Tensor] = {}
    for name in names:
        if name.endswith("input_ids"):  # texts of different lengths are told apart
            length = _WORDS + len(text)
            text[name] = torch.arange(1, 1 + length, device=device)[None] + seed * length
    if "attention_mask" in names and "input_ids" in text:
        text["attention_mask"] = torch.ones_like(text["input_ids"])
    image: dict[str, Tensor] = {}
    if "pixel_values" in names and pixel_readers(model):
        size = next(iter(image_sizes(model)), None) or (64, 64)
        image["pixel_values"] = torch.randn(1, *several, 3, *size, generator=drawn).to(device, dtype)
    elif name := next((n for n in names if re.fullmatch(r"visual_(embeds|feats)", n)), ""):
        widths = [m.in_features for p, m in modules.items() if isinstance(m, nn.Linear) and re.search(r"vis(ual|n)", p)]
        image[name] = torch.randn(1, 2, widths[0] if widths else 1, generator=drawn).to(device, dtype)
    return text, image


class _AllSeen(Exception):
    """Raised in a layer once nothing more is to be seen."""


@torch.no_grad()
def layer_inputs(model: nn.Module, layers: dict[str, nn.Module], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """{name: what the layer of this name reads} in one call, which ends when the last of them is reached."""
    seen: dict[str, Tensor] = {}

    def see(name: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        seen.setdefault(name, states.float())
        if len(seen) == len(layers):
            raise _AllSeen

    hooks = [
        layer.register_forward_pre_hook(partial(see, name), with_kwargs=True, prepend=True)
        for name, layer in layers.items()
    ]
    try:
        with eval_mode(model), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # ViLT draws which patches it reads
            model(**inputs)
    except _AllSeen:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _first_layer(model: nn.Module, stack: str) -> nn.Module | None:
    numbered = [p for p in own_modules(model) if p.rpartition(".")[0] == stack and p.rpartition(".")[2].isdigit()]
    return model.get_submodule(numbered[0]) if numbered else None


def _moved(before: Tensor, after: Tensor) -> list[bool]:
    """Which positions differ between two inputs (1, L, d) of a layer."""
    difference = (before - after).abs().amax(dim=-1)[0]
    return (difference > 1e-5 * before.abs().amax()).tolist()
