"""The modules that a LoRA's file names, held against those of the base."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.anatomy import describe, is_linear, linear_shape, own_modules
from ..core.towers import CONNECTOR
from ..files.factors import towers_of
from ..files.released import released_names
from ..files.servers import LANGUAGE_MODEL, Server
from .report import LEAVE_OUT, OR_MERGE, Module, ServingReport

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass
class Place:
    """A module of the base that can have a LoRA."""

    path: str
    released: str | None
    tower: str
    shape: tuple[int, int]  # (d_in, d_out)

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2]


def _places(base: nn.Module) -> list[Place]:
    tower_of = towers_of(base)
    found = {
        path: module
        for path, module in own_modules(base).items()
        if is_linear(module) or isinstance(module, nn.Embedding)
    }
    names = released_names(base, found)
    return [Place(path, names[path], tower_of(path), _shape(module)) for path, module in found.items()]


def _shape(module: Any) -> tuple[int, int]:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return linear_shape(module)


def check_modules(report: ServingReport, rules: Server, base: nn.Module) -> None:
    places = _places(base)
    if not any(matrix.tower == LANGUAGE_MODEL for matrix in describe(base).matrices):
        report.problem(
            f"{type(base).__name__} has no language model that generates, and {rules.title} serves LoRA for these alone."
        )
        return
    find = _by_path(places) if rules.by_path else _by_layer(places)
    leaves = {place.leaf for place in places}
    renamed = 0
    for module in report.modules:
        module.verdict = "loaded"
        place = find(module.name)
        if place is None:
            _judge_unknown(module, rules, leaves)
            continue
        renamed += rules.by_path and place.released != module.name
        if fault := _fault(module, place):
            module.judge("refused", fault)
        elif place.tower != LANGUAGE_MODEL:
            where = place.tower if place.tower == CONNECTOR else f"{place.tower} tower"
            module.judge(rules.other_towers, f"LoRA in the {where}: {rules.towers_note}", LEAVE_OUT)
    if not rules.by_path:
        _check_stacked(report.modules)
    if renamed:
        report.warning(
            f"{renamed} keys name modules as transformers 5 does, not as the released checkpoint: they load where {rules.title}'s class "
            "of this model maps both.",
            f"export_lora(target={rules.name!r}) writes the checkpoint's names.",
        )


def _by_path(places: list[Place]) -> Any:
    names = {place.path: place for place in places} | {place.released: place for place in places if place.released}
    return names.get


def _by_layer(places: list[Place]) -> Any:
    """Of a module that has no such path, the one of the language model with its layer's number and last name."""
    names = _by_path(places)
    numbered = {(m[1], p.leaf): p for p in places if p.tower == LANGUAGE_MODEL and (m := _LAYER.search(p.path))}

    def find(name: str) -> Place | None:
        match = _LAYER.search(name)
        return names(name) or (numbered.get((match[1], name.rpartition(".")[2])) if match else None)

    return find


def _judge_unknown(module: Module, rules: Server, leaves: set[str]) -> None:
    if module.name.rpartition(".")[2] not in leaves:
        module.judge("refused", "the base has no module of this last name")
    elif rules.unknown == "refused":
        module.judge("refused", "the base has no such module")
    else:
        module.judge("ignored", "the base has no such module, and nothing is said: the base model answers")


def _fault(module: Module, place: Place) -> str | None:
    if missing := {"A", "B"} - module.shapes.keys():
        return f"lora_{missing.pop()} is missing"
    A, B = module.shapes["A"], module.shapes["B"]
    if len(A) != 2 or len(B) != 2 or A[0] != B[1] or not A[0]:
        return f"lora_A {A} and lora_B {B} don't belong together"
    if (A[1], B[0]) != place.shape:
        return (
            f"it is {A[1]} -> {B[0]}, the base's module {place.shape[0]} -> {place.shape[1]}: the LoRA of another base"
        )
    return None


def _check_stacked(modules: list[Module]) -> None:
    """SGLang stacks q, k and v: a layer's q without v fails, and so does k in some layers and not in others."""
    names = {module.name for module in modules}
    for module in modules:
        if module.name.endswith("q_proj") and module.name.replace("q_proj", "v_proj") not in names:
            module.judge(
                "refused", "q_proj without v_proj, which are stacked", "Train q_proj and v_proj together. " + OR_MERGE
            )
