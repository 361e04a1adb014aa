"""The weight matrices of a model: which projections of which attentions they are, and the roles that they are stored under."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .modules import is_below, is_cross, is_linear, layer_of, linear_shape, unwrap

# What attention projections are called across the library, and the letter that stands for them in roles.
_LEAF_LETTER = {
    "q": ("q", "q_proj", "query", "to_q", "wq", "q_lin", "query_proj", "q_attn", "q_linear", "linear_q"),
    "k": ("k", "k_proj", "key", "to_k", "wk", "k_lin", "key_proj", "k_linear", "linear_k"),
    "v": ("v", "v_proj", "value", "to_v", "wv", "v_lin", "value_proj", "v_linear", "linear_v"),
    "o": ("o", "o_proj", "out_proj", "to_out", "wo", "out_lin", "out_linear"),
    "qkv": ("qkv", "qkv_proj", "c_attn", "in_proj", "Wqkv", "wqkv", "to_qkv"),
}
LETTER = {leaf: letter for letter, leaves in _LEAF_LETTER.items() for leaf in leaves}


@dataclass(frozen=True)
class Site:
    """A place in a model where a method can put something.

    Args:
        module: Path of the module in the model.
        kind: What is there: a matrix's letter ("q", "k", "v", "o", or the module's own name), "ffn", "layer", "tower", ...
        tower: One of `TOWERS`, or "other".
        role: The name that adapters are stored under, such as `vision.q.3`.
        d_in, d_out: Widths of what is read there and of what is given.
    """

    module: str
    kind: str
    tower: str
    role: str
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Matrix(Site):
    """One weight matrix. A fused `qkv` projection is three of one module; `rows` says which of its outputs each makes."""

    rows: tuple[int, int]  # [first, last)

    @property
    def letter(self) -> str:
        return self.kind


def attentions_of(modules: dict[str, nn.Module]) -> list[str]:
    """Paths of the attention modules: those with separate q, k, v children, with a fused one, or `nn.MultiheadAttention`."""
    letters: dict[str, set[str]] = defaultdict(set)
    for path, module in modules.items():
        if isinstance(unwrap(module), nn.MultiheadAttention):
            letters[path] |= set("qkv")
        elif is_linear(unwrap(module)):
            parent, _, leaf = path.rpartition(".")
            letters[parent].add(LETTER.get(leaf, leaf))
    return [path for path, found in letters.items() if set("qkv") <= found or "qkv" in found]


def matrices_of(modules: dict[str, nn.Module], roots: dict[str, str]) -> Iterator[Matrix]:
    """Every linear module (and `nn.MultiheadAttention`) in the model's order, fused ones as several matrices."""
    attentions = set(attentions_of(modules))
    numbers: dict[tuple[str, str], Iterator[int]] = defaultdict(count)
    hidden: list[str] = []  # paths whose children are read, never called
    for path, wrapped in modules.items():
        module = unwrap(wrapped)
        if any(is_below(path, h) for h in hidden) or ".base_layer" in path:
            continue
        parent, _, leaf = path.rpartition(".")
        if isinstance(module, nn.MultiheadAttention):
            hidden.append(path)
            d, parts = module.embed_dim, []
            for i, (letter, d_in) in enumerate((("q", d), ("k", module.kdim), ("v", module.vdim))):
                parts.append((letter, (i * d, (i + 1) * d), d_in))
        elif is_linear(module):
            if isinstance(wrapped, BaseTunerLayer):
                hidden.append(path)
            d_in, d_out = linear_shape(module)
            letter = LETTER.get(leaf, leaf) if parent in attentions else leaf
            if letter == "qkv":
                parts = [(name, rows, d_in) for name, rows in _fused_rows(modules[parent], d_out)]
            else:
                parts = [(letter, (0, d_out), d_in)]
        else:
            continue
        tower = _tower_of(path, roots, attentions)
        for letter, rows, width in parts:
            role = f"{tower}.{letter}.{next(numbers[tower, letter])}"
            yield Matrix(path, letter, tower, role, width, rows[1] - rows[0], rows)


def _fused_rows(attention: nn.Module, d_out: int) -> list[tuple[str, tuple[int, int]]]:
    """The rows of q, k and v in a fused projection, by their real sizes (grouped-query heads have smaller k and v)."""
    config = getattr(attention, "config", None)

    def ask(*names: str) -> int | None:
        found = [getattr(o, n, None) for o in (attention, config) for n in names if o is not None]
        return next((value for value in found if isinstance(value, int)), None)

    heads, head_dim = ask("num_heads", "num_attention_heads"), ask("head_dim")
    kv_heads = ask("num_key_value_heads", "num_kv_heads") or heads
    if heads and kv_heads and head_dim and (heads + 2 * kv_heads) * head_dim == d_out:
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    elif any(LETTER.get(name) == "q" for name, _ in attention.named_children()) and d_out % 2 == 0:
        return [("k", (0, d_out // 2)), ("v", (d_out // 2, d_out))]  # GPT-2's cross-attention: q stands apart
    elif d_out % 3 == 0:
        sizes = [d_out // 3] * 3
    else:
        return [("qkv", (0, d_out))]
    ends = [sum(sizes[: i + 1]) for i in range(3)]
    return [(letter, (end - size, end)) for letter, size, end in zip("qkv", sizes, ends, strict=True)]


def _tower_of(path: str, roots: dict[str, str], attentions: set[str]) -> str:
    inside = [(len(root), name) for root, name in roots.items() if is_below(path, root)]
    if inside:
        name = max(inside)[1]
        # A text encoder's cross-attention reads the image: that is where BLIP-like models fuse.
        return "fusion" if name == "text" and is_cross(path) else name
    return "fusion" if layer_of(path) or path in attentions or path.rpartition(".")[0] in attentions else "other"
