"""Where any Hugging Face vision-language model keeps its towers, attentions, widths and media tokens.

Nothing here knows a model family by name. Towers are found by what they contain (the convolution that reads pixels,
the embedding that reads tokens, the head that predicts tokens), projections by their place in an attention module,
and every width is read off the module itself.

Each projection has a *role*, such as `vision.q.3` (the fourth query projection of the vision tower), which stays
the same when a release of transformers renames modules. Adapters are stored under roles.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .matrices import LETTER, Matrix, Site, attentions_of, matrices_of
from .modules import (
    base_model,
    device_of,
    dtype_of,
    is_below,
    is_cross,
    is_linear,
    is_matrix,
    layer_of,
    linear_shape,
    own_modules,
    stack_of,
    unwrap,
    unwrapped,
)
from .readers import configs_of, image_sizes, media_tokens, pixel_readers, token_embeddings

# What a method needs of a model's anatomy stands here, whichever module of this package it lives in.
__all__ = [
    "LETTER", "SCREEN", "TOWERS", "Anatomy", "Matrix", "Site", "Tower", "base_model", "configs_of", "describe", "device_of", "dtype_of",
    "fusion_layers", "image_sizes", "is_below", "is_cross", "is_linear", "is_matrix", "layer_of", "linear_shape",
    "own_modules", "pixel_readers", "stack_of", "table", "token_embeddings", "unread_layers", "unwrap", "unwrapped",
]  # fmt: skip

TOWERS = ("vision", "text", "fusion", "decoder")
SCREEN = 100  # columns of what is printed


@dataclass(frozen=True)
class Tower:
    """One tower as it stands in the model; sizes are measured on its modules."""

    name: str
    path: str
    class_name: str
    attentions: int
    hidden_size: int | None
    parameters: int


@dataclass
class Anatomy:
    """What `describe` found. `print(describe(model))` shows it as a table."""

    model_class: str
    towers: list[Tower]
    matrices: list[Matrix]
    fusion_layers: list[str] = field(default_factory=list)
    media_tokens: dict[str, int] = field(default_factory=dict)

    def tower_names(self) -> list[str]:
        return [name for name in TOWERS if any(m.tower == name for m in self.matrices)]

    def signature(self) -> dict[str, list[int]]:
        """{tower: [number of attention inputs, width]}: what an adapter's base must have in common with another."""
        queries = [m for m in self.matrices if m.letter == "q"]
        return {
            name: [sum(m.tower == name for m in queries), max(m.d_in for m in queries if m.tower == name)]
            for name in TOWERS
            if any(m.tower == name for m in queries)
        }

    def __str__(self) -> str:
        rows = [
            (t.name, t.path or "(the model)", t.class_name, t.attentions, t.hidden_size or "-", f"{t.parameters:,}")
            for t in self.towers
        ]
        heads = ("tower", "module", "class", "attentions", "width", "parameters")
        lines = [self.model_class, table(heads, rows, SCREEN)]
        if layers := self.fusion_layers:
            span = " .. ".join(dict.fromkeys([layers[0], layers[-1]]))
            lines.append(_fill(f"fusion layers (self- and cross-attention): {len(layers)}, {span}"))
        if self.media_tokens:
            named = ", ".join(f"{name}={token}" for name, token in self.media_tokens.items())
            lines.append(_fill(f"media tokens: {named}"))
        return "\n".join(lines)

    __repr__ = __str__


def describe(model: nn.Module) -> Anatomy:
    """What a model is found to have: its towers, fusion layers, widths and media tokens.

    Args:
        model: Any model of transformers, bare or in a `PeftModel`. It is not changed.

    Returns:
        An `Anatomy`. Print it for a table of the towers: module, class, number of attentions, width, parameters.

    Raises:
        ValueError: a model without a config whose towers can't be told apart.

    Examples:
        >>> print(describe(clip))
        >>> describe(clip).tower_names()
    """
    model = base_model(model)
    modules = own_modules(model)
    roots = _tower_roots(model, modules)
    matrices = list(matrices_of(modules, roots))
    towers = [_tower(name, path, modules, matrices, "qkv") for path, name in roots.items()]
    fusion_stacks = {
        stack_of(m.module) for m in matrices if m.tower == "fusion" and not any(is_below(m.module, r) for r in roots)
    }
    fusions = [_tower("fusion", path, modules, matrices, "q") for path in sorted(fusion_stacks)]
    towers += [tower for tower in fusions if tower.attentions]
    return Anatomy(type(model).__name__, towers, matrices, fusion_layers(modules), media_tokens(model))


def fusion_layers(modules: dict[str, nn.Module]) -> list[str]:
    """Paths of the layers that hold both a self- and a cross-attention (BLIP, Q-Former, encoder-decoder, ...)."""
    kinds: dict[str, set[bool]] = defaultdict(set)
    for path in attentions_of(modules):
        if layer := layer_of(path):
            kinds[layer].add(is_cross(path))
    return [layer for layer, found in kinds.items() if found == {True, False}]


def unread_layers(model: Any, anatomy: Anatomy) -> list[str]:
    """Paths of the vision tower's last layers, where the model takes its image features from an earlier one.

    LLaVA and its like run layers behind `vision_feature_layer` (-2) in vain: they get no gradient. Where the config names
    other layers to read as well, none is taken to be unread.
    """
    unread: list[str] = []
    for config in configs_of(getattr(base_model(model), "config", None)):
        fields = {name: value for name, value in vars(config).items() if re.search(r"vision.*layer|deepstack", name)}
        chosen = fields.pop("vision_feature_layer", None)
        chosen = list(chosen) if isinstance(chosen, (list, tuple)) else [chosen]
        if not hasattr(config, "vision_config") or fields or not all(isinstance(i, int) for i in chosen):
            continue
        stacks: dict[str, list[str]] = defaultdict(list)
        for matrix in anatomy.matrices:
            layer = layer_of(matrix.module)
            if matrix.tower == "vision" and layer and layer not in stacks[stack_of(matrix.module)]:
                stacks[stack_of(matrix.module)].append(layer)
        for layers in stacks.values():  # hidden states are those of the embeddings and one of each layer
            unread += layers[max(i if i >= 0 else len(layers) + 1 + i for i in chosen) :]
    return unread


def table(header: Iterable[Any], rows: Iterable[Iterable[Any]], width: int | None = None) -> str:
    """A plain-text table with aligned columns.

    Args:
        header, rows: Cells.
        width: Longest line; the widest columns lose the beginnings of their cells, as paths differ at their ends.
    """
    cells = [[str(c) for c in header], *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    while width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        widths[widths.index(max(widths))] -= 1
    cells = [
        [c if len(c) <= w else f"…{c[len(c) - w + 1 :]}" for c, w in zip(row, widths, strict=True)] for row in cells
    ]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _fill(text: str) -> str:
    return textwrap.fill(text, SCREEN, subsequent_indent="  ", break_on_hyphens=False)


# --- towers ----------------------------------------------------------------------------------------------------------


def _tower(name: str, path: str, modules: dict[str, nn.Module], matrices: list[Matrix], letters: str) -> Tower:
    """The tower at a path, by its matrices of these letters."""
    inside = [m for m in matrices if is_below(m.module, path) and m.letter in tuple(letters)]
    attentions = {m.module.rpartition(".")[0] for m in inside}
    width = Counter(m.d_in for m in inside).most_common(1)[0][0] if inside else None
    return Tower(name, path, type(unwrap(modules[path])).__name__, len(attentions), width, _count(modules, path))


def _tower_roots(model: Any, modules: dict[str, nn.Module]) -> dict[str, str]:
    """{module path: tower name} for the vision, text and decoder towers; what remains is fusion (or no tower)."""
    tokens = token_embeddings(model) if getattr(model, "config", None) is not None else _read_by_text(model, modules)
    pixels = pixel_readers(model)
    if not pixels:  # patches are read by a linear layer: ask the model
        encoder = model.get_encoder(modality="image") if hasattr(model, "get_encoder") else model
        pixels = [p for p, m in modules.items() if m is encoder and p]
    vision = _highest(pixels, avoid=tokens)
    text = _highest(tokens, avoid=vision)
    roots = dict.fromkeys(vision, "vision")
    for path in text:
        if halves := _encoder_and_decoder(modules, path):
            roots |= halves
        else:
            roots[path] = "decoder" if _predicts_tokens(model, modules, path, len(text)) else "text"
    return roots


def _read_by_text(model: Any, modules: dict[str, nn.Module]) -> list[str]:
    """What reads the text in a model that has no config (open_clip's layout).

    The attentions that run in its `encode_text`; without one, the embeddings that aren't called after positions.

    Raises:
        ValueError: `encode_text` can't be run, so that nothing tells the towers apart.
    """
    if not hasattr(model, "encode_text"):
        return token_embeddings(model)
    ran: list[str] = []
    attentions = {path: modules[path] for path in attentions_of(modules)}
    hooks = [m.register_forward_pre_hook(lambda *_, path=path: ran.append(path)) for path, m in attentions.items()]
    ids = torch.zeros(1, getattr(model, "context_length", 77), dtype=torch.long, device=device_of(model))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.encode_text(ids)
    except Exception as error:  # whatever a model's own code says
        raise ValueError(
            f"{type(model).__name__} has no config, so its towers are told apart by which attentions run in "
            f"encode_text, and encode_text of {tuple(ids.shape)} token ids fails: {error}. Give it a `context_length`, "
            "or adapt its image tower and its text tower as models of their own."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(ran))


def _encoder_and_decoder(modules: dict[str, nn.Module], path: str) -> dict[str, str]:
    """The two halves of an encoder-decoder language model, which share one token embedding."""
    tower = unwrap(modules[path])
    if not getattr(getattr(tower, "config", None), "is_encoder_decoder", False) or not hasattr(tower, "get_decoder"):
        return {}
    halves = {"text": tower.get_encoder(), "decoder": tower.get_decoder()}
    paths = {name: next((p for p, m in modules.items() if m is half), None) for name, half in halves.items()}
    if not paths["text"] or not paths["decoder"] or path in paths.values() or paths["text"] == paths["decoder"]:
        return {}
    return {found: name for name, found in paths.items() if found}


def _highest(leaves: list[str], avoid: Iterable[str]) -> list[str]:
    """For every leaf its highest ancestor that contains nothing of `avoid`; each ancestor once."""
    avoid = list(avoid)
    found: list[str] = []
    for leaf in leaves:
        root, parts = leaf, leaf.split(".")
        for i in reversed(range(len(parts))):
            parent = ".".join(parts[:i])
            if any(is_below(other, parent) for other in avoid):
                break
            root = parent
        if not any(is_below(root, other) for other in found):
            found.append(root)
    return found


def _predicts_tokens(model: Any, modules: dict[str, nn.Module], path: str, num_text: int) -> bool:
    """Whether a text tower is a decoder: causal attention, or a head over its vocabulary."""
    inside = {p: m for p, m in modules.items() if is_below(p, path)}
    if any(getattr(inside.get(p), "is_causal", None) is True for p in attentions_of(inside)):
        return True
    if not (hasattr(model, "can_generate") and model.can_generate()):
        return False
    sizes = {m.num_embeddings for p, m in inside.items() if isinstance(m, nn.Embedding)}
    if any(
        (isinstance(m, nn.Linear) and m.out_features in sizes and "cls" in p) or p.endswith("lm_head")
        for p, m in inside.items()
    ):
        return True
    return num_text == 1 and model.get_output_embeddings() is not None


def _count(modules: dict[str, nn.Module], root: str) -> int:
    """Parameters below a path, each once, without those of parts that adapters have attached."""
    found = {p for path, m in modules.items() if is_below(path, root) for p in m.parameters(recurse=False)}
    return sum(p.numel() for p in found)
