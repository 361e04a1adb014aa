"""The layers beside which UniAdapter can stand, and what is heard in them; found by shape, without a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ...core.anatomy import Anatomy, is_below, is_cross, own_modules
from ...core.sites import FFN, ffns


@dataclass(frozen=True)
class FFNLayer:
    """A layer that holds an attention and FFNs; the paths of what is heard in it."""

    path: str
    tower: str
    width: int
    ffns: tuple[str, ...]
    queries: tuple[str, ...]
    fusion_tower: str
    """The tower that its cross-attentions belong to; "" where it has none, or has no other branch than a fusion's."""


def ffn_layers(model: nn.Module, anatomy: Anatomy) -> list[FFNLayer]:
    """The smallest modules that hold both an FFN and an attention, in the model's order."""
    modules = own_modules(model)
    queries = [m for m in anatomy.matrices if m.letter in ("q", "qkv")]
    convolving = [p for p, m in modules.items() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    inside: dict[str, list[FFN]] = {}
    for ffn in ffns(model, anatomy):
        around = [path for path in _around(ffn.module) if any(is_below(q.module, path) for q in queries)]
        if path := next((path for path in around if not isinstance(modules[path], nn.ModuleList)), ""):
            inside.setdefault(path, []).append(ffn)
    layers = []
    for path, networks in inside.items():
        if any(other != path and is_below(other, path) for other in [*inside, *convolving]):
            continue  # it holds other layers, or gives maps of an image instead of tokens
        tower, own = networks[0].tower, [q for q in queries if is_below(q.module, path)]
        crossing = [q for q in own if is_cross(q.module)]
        if len({q.module for q in own} - {q.module for q in crossing}) > 1:
            continue  # it reads several streams (LXMERT)
        fuses = tower != "fusion" and 0 < len(crossing) < len(own)
        layers.append(
            FFNLayer(
                path,
                tower,
                networks[0].d_in,
                ffns=tuple(ffn.first[0] for ffn in networks),
                queries=tuple(dict.fromkeys(q.module for q in crossing)) if fuses else (),
                fusion_tower=crossing[0].tower if fuses else "",
            )
        )
    return layers


def _around(path: str) -> Iterator[str]:
    """Paths of the modules around one, from the inside out."""
    while path := path.rpartition(".")[0]:
        yield path


def norms_of(layer: nn.Module, width: int) -> list[nn.Module]:
    """What normalises a layer's stream: modules without others inside whose parameters have its width."""
    leaves = [m for m in own_modules(layer).values() if not any(m.children())]
    shapes = [(m, [tuple(p.shape) for p in m.parameters()]) for m in leaves]
    return [m for m, found in shapes if found and set(found) == {(width,)}]
