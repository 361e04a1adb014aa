"""Which place of a model a module or a parameter belongs to: a tower, or what connects the towers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from .anatomy import TOWERS, Anatomy, base_model, describe, is_below, is_cross, is_linear, own_modules, unwrap
from .matrices import attentions_of
from .modules import without_wrappers

CONNECTOR = "connector"
PLACES = (*TOWERS, CONNECTOR)

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
_BASE = "base_model.model."
_ADAPTERS = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")  # what PEFT puts into a path


def plain(path: str) -> str:
    """The path of a module or parameter as it is in the model without adapters and wrappers."""
    return _ADAPTERS.sub("", without_wrappers(path)).removeprefix(_BASE)


class TowerMap:
    """The places of a model.

    A connector is what leads from one tower to another: LLaVA's projector, CLIP's two projections, the merger that
    Qwen-VL keeps at the end of its vision tower. Heads that predict tokens belong to no place unless a tower holds them.

    Args:
        model: A Hugging Face model, also one that PEFT has wrapped.

    Attributes:
        nested: {path: tower} of a connector's matrices that stand inside a tower.
    """

    def __init__(self, model: Any) -> None:
        self.model = base_model(model)
        found = describe(self.model)
        self.model_class = found.model_class
        roots = {t.path: t.name for t in found.towers}
        self.connectors = list(_connectors(self.model, found))
        matrices = {plain(m.module): m.tower for m in found.matrices}
        inside = {path: tower for path, tower in matrices.items() for root in self.connectors if is_below(path, root)}
        self.nested = {path: tower for path, tower in inside.items() if tower in TOWERS}
        self.roots = {path: tower for path, tower in matrices.items() if tower in TOWERS and path not in inside}
        self.roots |= roots | dict.fromkeys(self.connectors, CONNECTOR)

    def names(self) -> list[str]:
        """The places that this model has, in the order of `PLACES`."""
        return [name for name in PLACES if name in self.roots.values()]

    def place(self, path: str) -> str:
        """The place of a module or parameter, by its path; "" where it has none."""
        path = plain(path)
        inside = [root for root in self.roots if is_below(path, root)]
        place = self.roots[max(inside, key=len)] if inside else ""
        return "fusion" if place == "text" and is_cross(path) else place  # as matrices have it

    def modules(self, place: str) -> dict[str, nn.Module]:
        """{path: module} of one place."""
        return {path: m for path, m in own_modules(self.model).items() if path and self.place(path) == place}

    def matrices(self, place: str) -> list[str]:
        """Paths of a place's linear modules, without the head that predicts tokens."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        return [p for p, m in self.modules(place).items() if is_linear(unwrap(m)) and unwrap(m) is not unwrap(head)]

    def whole(self, place: str) -> list[str]:
        """Paths of the largest modules that hold parameters of this place alone."""
        places: dict[str, set[str]] = {"": set()}
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            parts = name.split(".")
            for i in range(len(parts)):
                places.setdefault(".".join(parts[:i]), set()).add(self.place(name))
        return list(_largest(self.model, "", places, place))


def _largest(module: nn.Module, path: str, places: dict[str, set[str]], place: str) -> Iterator[str]:
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        found = places.get(below, set())
        if found == {place} and not isinstance(child, _CONTAINERS):
            yield below
        elif place in found:
            yield from _largest(child, below, places, place)


def _connectors(model: Any, found: Anatomy) -> Iterator[str]:
    """Outside of the towers; where a decoder reads images and nothing is there, behind the vision tower's layers."""
    towers = [t.path for t in found.towers]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outside = list(_outside(model, "", towers, head))
    yield from outside
    if outside or not any(t.name == "decoder" for t in found.towers):
        return
    for tower in found.towers:
        if tower.name != "vision" or not tower.path:
            continue
        root = unwrap(model.get_submodule(tower.path))
        children = [(f"{tower.path}.{name}", child) for name, child in root.named_children()]
        layers = [i for i, (_, child) in enumerate(children) if attentions_of(dict(child.named_modules()))]
        yield from (path for path, child in children[max(layers, default=len(children)) + 1 :] if _has_matrices(child))


def _outside(module: nn.Module, path: str, towers: list[str], head: Any) -> Iterator[str]:
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if any(is_below(below, tower) for tower in towers) or unwrap(child) is unwrap(head):
            continue
        if any(is_below(tower, below) for tower in towers) or isinstance(child, _CONTAINERS):
            yield from _outside(child, below, towers, head)
        elif _has_matrices(child):
            yield plain(below)


def _has_matrices(module: nn.Module) -> bool:
    return any(is_linear(m) for m in module.modules())
