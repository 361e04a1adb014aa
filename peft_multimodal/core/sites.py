"""Places where a method can put something, found on a model's modules by their shape and by what they are part of.

A site has a *role*, such as `vision.ffn.3`, which stays the same when a release of transformers renames modules.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import nn

from .anatomy import (
    LETTER,
    TOWERS,
    Anatomy,
    Matrix,
    Site,
    describe,
    device_of,
    dtype_of,
    image_sizes,
    is_below,
    is_cross,
    layer_of,
    own_modules,
    stack_of,
    token_embeddings,
    unwrap,
)


@dataclass(frozen=True)
class FFN(Site):
    """A feed-forward network: `module` is its last linear map, `first` are those that read the stream (two if gated)."""

    first: tuple[str, ...]
    hidden: int  # width between the first and the last


def ffns(model: nn.Module, anatomy: Anatomy | None = None) -> list[FFN]:
    """The feed-forward networks of all layers, in the model's order.

    Of the linear maps outside attentions, an FFN's first ones widen the stream of their layer, d -> D, and its last one
    narrows it again, D -> d; a first one may hold two in one, d -> 2 D. Mixtures of experts are left out: which of them
    reads a token is decided inside.
    """
    anatomy = anatomy or describe(model)
    attentions = set(_attentions(anatomy))
    layers: dict[str, list[Matrix]] = defaultdict(list)
    for matrix in anatomy.matrices:
        layer = layer_of(matrix.module)
        if layer and not any(is_below(matrix.module, a) for a in attentions):
            layers[layer].append(matrix)
    mixtures = {experts for experts, n in Counter(map(_inner_list, layers)).items() if experts and n > 1}
    numbers: dict[str, Iterator[int]] = defaultdict(count)
    sites = []
    for layer, matrices in layers.items():
        if _inner_list(layer) in mixtures or (d := _stream_width(layer, anatomy)) is None:
            continue
        first: list[Matrix] = []  # those since the last FFN of this layer
        for matrix in matrices:
            widened = [m for m in first if m.d_out in (matrix.d_in, 2 * matrix.d_in)]
            if matrix.d_out == d and matrix.d_in > d and widened:
                role = f"{matrix.tower}.ffn.{next(numbers[matrix.tower])}"
                paths = tuple(m.module for m in widened)
                sites.append(FFN(matrix.module, "ffn", matrix.tower, role, d, d, paths, matrix.d_in))
                first = []
            elif matrix.d_in == d and matrix.d_out > d:
                first.append(matrix)
    return sites


def ends(model: nn.Module, anatomy: Anatomy | None = None) -> list[Site]:
    """The last linear map of every sub-layer: of attentions, of those that read another sequence, and of FFNs.

    An `nn.MultiheadAttention` reads its last map instead of calling it, and has no end.
    """
    anatomy = anatomy or describe(model)
    networks = {ffn.module for ffn in ffns(model, anatomy)}
    attention_of = dict(_attention_ends(anatomy, networks))
    numbers: dict[tuple[str, str], Iterator[int]] = defaultdict(count)
    sites: list[Site] = []
    for matrix in anatomy.matrices:
        tower, kind = matrix.tower, "ffn"
        if matrix.module in attention_of:
            query = attention_of[matrix.module]
            tower, kind = query.tower, "cross" if is_cross(query.module) else "attention"
        elif matrix.module not in networks:
            continue
        role = f"{tower}.{kind}-end.{next(numbers[tower, kind])}"
        sites.append(Site(matrix.module, kind, tower, role, matrix.d_in, matrix.d_out))
    return sites


@dataclass(frozen=True)
class Decoder:
    """The stack of layers that predicts text; paths of modules.

    Args:
        stack: Its forward runs the layers.
        layers: In their order.
        embedding: Reads the tokens.
        width: d of the stream.
        is_alone: Whether no encoder reads text or images for it, as in T5 and BART.
    """

    stack: str
    layers: tuple[str, ...]
    embedding: str
    width: int
    is_alone: bool


def decoder(model: Any, anatomy: Anatomy | None = None) -> Decoder | None:
    """A model's decoder, also inside a vision-language model or behind an encoder; None where it has not exactly one."""
    anatomy = anatomy or describe(model)
    towers = [t for t in anatomy.towers if t.name == "decoder"]
    if len(towers) != 1:
        return None
    (tower,) = towers
    numbered = [m for m in anatomy.matrices if m.tower == "decoder" and layer_of(m.module)]
    # Attention tells the layers from other lists. Not every family's is known: some fuse q, k and v head by head, or
    # factorise them; their layers are then the only list there is.
    queries = [m for m in numbered if m.letter in ("q", "qkv")]
    stacks = {stack_of(m.module) for m in queries or numbered}
    embeddings = [e for e in token_embeddings(model) if is_below(e, tower.path)]
    if len(stacks) != 1 or not embeddings:
        return None
    (stack,) = stacks
    modules, configs = own_modules(model), text_configs(model)
    layers = (path for path in modules if path.rpartition(".")[0] == stack and path.rpartition(".")[2].isdigit())
    primary = unwrap(model.get_input_embeddings())
    embedding = next((e for e in embeddings if modules[e] is primary), embeddings[0])
    width: Any = tower.hidden_size or configs[-1].hidden_size
    encodes = any(t.name == "text" for t in anatomy.towers)
    is_alone = not (encodes or any(getattr(c, "is_encoder_decoder", False) for c in configs))
    return Decoder(stack.rpartition(".")[0], tuple(layers), embedding, width, is_alone)


def text_configs(model: Any) -> list[Any]:
    """The model's config and that of its text part, as far as it has them."""
    config: Any = getattr(model, "config", None)
    try:
        text = config.get_text_config()
    except (AttributeError, ValueError):  # none of transformers', or of several text parts
        text = None
    return [c for c in (config, text) if c is not None]


def layers(
    model: nn.Module,
    anatomy: Anatomy | None = None,
    towers: Collection[str] = TOWERS,
    fits: Callable[[nn.Module], bool] = lambda layer: True,
) -> list[Site]:
    """The layers that attend from tokens to tokens of one sequence and hold no other such layers.

    Where a layer numbers its sub-layers (T5's blocks do), it is the layer that holds the attention and its FFN.

    Args:
        towers: Those to look in.
        fits: Which layers a method can use; roles count these alone.
    """
    anatomy = anatomy or describe(model)
    networks = [ffn.module for ffn in ffns(model, anatomy)]
    queries: dict[str, Matrix] = {}
    for matrix in anatomy.matrices:
        path = _whole_layer(matrix.module, networks)
        if path and matrix.letter == "q" and matrix.tower in towers and not is_cross(matrix.module):
            queries.setdefault(path, matrix)
    modules = own_modules(model)
    numbers: dict[str, Iterator[int]] = defaultdict(count)
    sites = []
    for path, query in queries.items():
        inner = any(other != path and is_below(other, path) for other in queries)
        if not inner and fits(modules[path]):
            role = f"{query.tower}.layer.{next(numbers[query.tower])}"
            sites.append(Site(path, "layer", query.tower, role, query.d_in, query.d_in))
    return sites


def _whole_layer(path: str, networks: list[str]) -> str | None:
    """The numbered layer that a module lies in, or the one around it where that holds an FFN and the inner one none."""
    inner = layer_of(path)
    outer = layer_of(inner.rpartition(".")[0]) if inner else None
    holds = {layer: any(is_below(ffn, layer) for ffn in networks) for layer in (inner, outer) if layer}
    return outer if outer and holds[outer] and not holds[inner or ""] else inner


def towers(model: nn.Module, anatomy: Anatomy | None = None) -> list[Site]:
    """The vision and text towers, d_in the width of their tokens' states and d_out of what they pool, both measured."""
    anatomy = anatomy or describe(model)
    sites: list[Site] = []
    for tower in anatomy.towers:
        if tower.name in ("vision", "text") and tower.attentions and tower.path:
            width, pooled = _pooled_widths(model.get_submodule(tower.path), tower.name)
            ordinal = sum(site.tower == tower.name for site in sites)
            sites.append(Site(tower.path, "tower", tower.name, f"{tower.name}.tower.{ordinal}", width, pooled))
    return sites


@torch.no_grad()
def _pooled_widths(tower: nn.Module, name: str) -> tuple[int, int]:
    """Widths of a tower's token states and of its pooled output, on an empty image or two tokens."""
    device, dtype = device_of(tower), dtype_of(tower)
    if name == "text":
        inputs = {"input_ids": torch.ones(1, 2, dtype=torch.long, device=device)}
    else:
        inputs = {"pixel_values": torch.zeros(1, 3, *next(image_sizes(tower)), dtype=dtype, device=device)}
    output = tower(**inputs, return_dict=True)
    pooled = output.get("pooler_output")
    states = output.last_hidden_state
    return states.shape[-1], (states if pooled is None else pooled).shape[-1]


def arguments_of(module: nn.Module) -> list[str]:
    """Names of the arguments of a module's own `forward`, whatever has taken it over."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _attentions(anatomy: Anatomy) -> dict[str, Matrix]:
    """{path of an attention: its query}."""
    queries = [m for m in anatomy.matrices if m.letter in ("q", "qkv")]
    fused = Counter(m.module for m in anatomy.matrices)  # nn.MultiheadAttention is a module of three matrices itself
    modules = {
        m.module for m in anatomy.matrices if LETTER.get(m.module.rpartition(".")[2]) is None and fused[m.module] > 1
    }
    return {m.module if m.module in modules else m.module.rpartition(".")[0]: m for m in queries}


def _stream_width(layer: str, anatomy: Anatomy) -> int | None:
    """d of the stream in a numbered module, as the queries in it or around it read it; None where there are none."""
    parts = layer.split(".")
    for end in range(len(parts), 0, -1):
        if parts[end - 1].isdigit():
            around = ".".join(parts[:end])
            widths = Counter(
                m.d_in for m in anatomy.matrices if m.letter in ("q", "qkv") and is_below(m.module, around)
            )
            if widths:
                return widths.most_common(1)[0][0]
    return None


def _inner_list(layer: str) -> str:
    """The list inside a layer that a numbered module is in (`layers.3.mlp.experts` of `layers.3.mlp.experts.7`); ""
    for the layers of a stack themselves."""
    parent = layer.rpartition(".")[0]
    return parent if re.search(r"\.\d+\.", parent + ".") else ""


def _attention_ends(anatomy: Anatomy, networks: set[str]) -> Iterator[tuple[str, Matrix]]:
    """(last linear map of an attention, its query): inside it, or beside it (BERT's `attention.output.dense`)."""
    attentions = _attentions(anatomy)
    reading = {m.module for m in anatomy.matrices if m.letter in ("q", "k", "v", "qkv")}
    linear = [m.module for m in anatomy.matrices if m.module not in reading | networks]
    for attention, query in attentions.items():
        if query.module == attention:  # nn.MultiheadAttention
            continue
        parent = attention.rpartition(".")[0]
        inside = [path for path in linear if is_below(path, attention)]
        beside = [path for path in linear if is_below(path, parent)] if layer_of(parent + ".") != parent else []
        if parts := inside or beside:
            yield parts[-1], query
