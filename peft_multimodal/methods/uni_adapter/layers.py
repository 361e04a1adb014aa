"""The layers beside which UniAdapter can stand, and what is heard in them; found by shape, without a table."""

from __future__ import annotations

from collections.abc import Collection
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


def ffn_layers(model: nn.Module, found: Anatomy) -> list[FFNLayer]:
    """The smallest modules that hold both an FFN and an attention, in the model's order."""
    queries = [m for m in found.matrices if m.letter in ("q", "qkv")]
    inside: dict[str, list[FFN]] = {}
    for ffn in ffns(model, found):
        if path := _smallest_around(ffn.module, [q.module for q in queries]):
            inside.setdefault(path, []).append(ffn)
    layers = []
    modules = own_modules(model)
    convolving = [p for p, m in modules.items() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    for path, networks in inside.items():
        if any(other != path and is_below(other, path) for other in [*inside, *convolving]):
            continue  # it holds other layers, or gives maps of an image instead of tokens
        tower = networks[0].tower
        crossing = [q for q in queries if is_below(q.module, path) and is_cross(q.module)] if tower != "fusion" else []
        firsts = tuple(ffn.first[0] for ffn in networks)
        paths = tuple(dict.fromkeys(q.module for q in crossing))
        alone = all(is_cross(q.module) for q in queries if is_below(q.module, path))
        fusion = "" if alone or not crossing else crossing[0].tower
        layers.append(FFNLayer(path, tower, networks[0].d_in, firsts, paths if fusion else (), fusion))
    return layers


def _smallest_around(path: str, queries: Collection[str]) -> str:
    """Path of the smallest module around another one that holds one of the queries; "" where only the model does."""
    while path := path.rpartition(".")[0]:
        if any(is_below(query, path) for query in queries):
            break
    return path


def norms_of(layer: nn.Module, width: int) -> list[nn.Module]:
    """What normalises a layer's stream: modules without others inside whose parameters have its width."""
    leaves = [m for m in own_modules(layer).values() if not any(m.children())]
    shapes = [(m, [tuple(p.shape) for p in m.parameters()]) for m in leaves]
    return [m for m, found in shapes if found and set(found) == {(width,)}]
