"""Where any Hugging Face vision-language model keeps its towers, attentions, widths and media tokens.

Nothing here knows a model family by name. Towers are found by what they contain (the convolution that reads pixels,
the embedding that reads tokens, the head that predicts tokens), projections by their place in an attention module,
and every width is read off the module itself.

Each projection has a *role*, such as `vision.q.3` (the fourth query projection of the vision tower), which stays
the same when a release of transformers renames modules. Adapters are stored under roles.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

TOWERS = ("vision", "text", "fusion", "decoder")

# What attention projections are called across the library, and the letter that stands for them in roles.
_LEAF_LETTER = {
    "q": ("q", "q_proj", "query", "to_q", "wq", "q_lin", "query_proj", "q_attn", "q_linear", "linear_q"),
    "k": ("k", "k_proj", "key", "to_k", "wk", "k_lin", "key_proj", "k_linear", "linear_k"),
    "v": ("v", "v_proj", "value", "to_v", "wv", "v_lin", "value_proj", "v_linear", "linear_v"),
    "o": ("o", "o_proj", "out_proj", "to_out", "wo", "out_lin", "out_linear"),
    "qkv": ("qkv", "qkv_proj", "c_attn", "in_proj", "Wqkv", "wqkv", "to_qkv"),
}
LETTER = {leaf: letter for letter, leaves in _LEAF_LETTER.items() for leaf in leaves}


def unwrap(module: Any) -> Any:
    """The base layer below any PEFT layers."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def is_linear(module: nn.Module) -> bool:
    """Whether the module is `y = x W^T + b`: `nn.Linear` (and its quantised subclasses) or transformers' `Conv1D`."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_matrix(module: nn.Module) -> bool:
    """Whether the module applies weight matrices, rather than being made of modules that do."""
    return is_linear(module) or isinstance(module, nn.MultiheadAttention)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    raise TypeError(f"{type(module).__name__} is no linear module")


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
        text = f"{self.model_class}\n" + table(("tower", "module", "class", "attentions", "width", "parameters"), rows)
        if self.fusion_layers:
            text += f"\nfusion layers (self- and cross-attention): {len(self.fusion_layers)}, " + _span(
                self.fusion_layers
            )
        if self.media_tokens:
            text += "\nmedia tokens: " + ", ".join(f"{name}={token}" for name, token in self.media_tokens.items())
        return text

    __repr__ = __str__


def describe(model: nn.Module) -> Anatomy:
    """Towers, fusion layers, widths and media tokens of a model (also of one that PEFT has wrapped).

    Example:
        >>> print(describe(model))
    """
    model = base_model(model)
    modules = own_modules(model)
    roots = _tower_roots(model, modules)
    matrices = list(_matrices(modules, roots))
    towers = [
        Tower(
            name=name,
            path=path,
            class_name=type(unwrap(modules[path])).__name__,
            attentions=len({m.module.rpartition(".")[0] for m in found}),
            hidden_size=Counter(m.d_in for m in found if m.letter in "qkv").most_common(1)[0][0] if found else None,
            parameters=_count(modules, path),
        )
        for path, name in roots.items()
        for found in [[m for m in matrices if is_below(m.module, path) and m.letter in ("q", "k", "v")]]
        if found or name in ("vision", "text", "decoder")
    ]
    fusion_stacks = sorted(
        {stack_of(m.module) for m in matrices if m.tower == "fusion" and not any(is_below(m.module, r) for r in roots)}
    )
    towers += [
        Tower(
            "fusion",
            path,
            type(unwrap(modules[path])).__name__,
            len({m.module.rpartition(".")[0] for m in found}),
            Counter(m.d_in for m in found).most_common(1)[0][0],
            _count(modules, path),
        )
        for path in fusion_stacks
        for found in [[m for m in matrices if is_below(m.module, path) and m.letter == "q"]]
        if found
    ]
    return Anatomy(type(model).__name__, towers, matrices, fusion_layers(modules), _media_tokens(model))


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of the model itself, without what adapters have attached to it or wrapped around whole layers.

    A path is the one that the module has without adapters; `model.get_submodule(path)` finds it either way.
    """
    found: dict[str, nn.Module] = {}
    attached: list[str] = []
    wrappers: list[str] = []
    for path, module in model.named_modules():
        for wrapper in wrappers:
            if path.startswith(f"{wrapper}."):
                path = path.replace(f"{wrapper}.base_layer", wrapper, 1)
        if isinstance(module, BaseTunerLayer) and not hasattr(module, "base_layer"):
            attached.append(path + ".")
        elif isinstance(module, BaseTunerLayer) and not is_matrix(unwrap(module)):
            wrappers.append(path)
            attached += [f"{path}.{name}" for name in module.adapter_layer_names]
        elif not path.startswith(tuple(attached)):
            found[path] = module
            if isinstance(module, BaseTunerLayer):
                attached += [f"{path}.{name}" for name in module.adapter_layer_names]
    return found


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: its parameters' device; of offloaded ones that to which accelerate brings them."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    for part in module.modules() if device.type == "meta" else ():
        hook = getattr(part, "_hf_hook", None)
        for found in getattr(hook, "hooks", [hook]):
            if (there := getattr(found, "execution_device", None)) is not None:
                return torch.device(there)
    return device


def dtype_of(module: nn.Module) -> torch.dtype:
    """What a module computes in: its parameters' dtype; float32 where torch's quantisation has packed them all."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def base_model(model: Any) -> Any:
    """The Hugging Face model inside a `PeftModel` or a tuner, whatever is wrapped around them, or the model itself."""
    model = unwrapped(model)
    if isinstance(model, PeftModel) and not model.peft_config:  # its last adapter is deleted: PEFT asks for one
        return unwrapped(getattr(model.base_model, "model", model.base_model))
    return unwrapped(model.get_base_model()) if hasattr(model, "get_base_model") else model


def unwrapped(model: Any) -> Any:
    """The model inside what `torch.compile`, DistributedDataParallel and FSDP wrap around it, or the model itself."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, nn.Module):
        names = ("module",) if isinstance(model, parallel) else ("_orig_mod", "_fsdp_wrapped_module")
        inner = next((model._modules[name] for name in names if name in model._modules), None)
        if inner is None:
            break
        model = inner
    return model


def is_below(path: str, root: str) -> bool:
    """Whether a module path equals `root` or lies under it."""
    return not root or path == root or path.startswith(root + ".")


def fusion_layers(modules: dict[str, nn.Module]) -> list[str]:
    """Paths of the layers that hold both a self- and a cross-attention (BLIP, Q-Former, encoder-decoder, ...)."""
    kinds: dict[str, set[bool]] = defaultdict(set)
    for path in _attentions(modules):
        if layer := layer_of(path):
            kinds[layer].add(is_cross(path))
    return [layer for layer, found in kinds.items() if found == {True, False}]


def layer_of(path: str) -> str | None:
    """Path of the numbered layer that a module lies in: `encoder.layer.3.attention.self` -> `encoder.layer.3`."""
    match = re.match(r"(.*\.\d+)\.", path + ".")
    return match.group(1) if match else None


def unread_layers(model: Any, found: Anatomy) -> list[str]:
    """Paths of the vision tower's last layers, where the model takes its image features from an earlier one.

    LLaVA and its like run layers behind `vision_feature_layer` (-2) in vain: they get no gradient. Where the config names
    other layers to read as well, none is taken to be unread.
    """
    unread: list[str] = []
    for config in _configs(getattr(base_model(model), "config", None)):
        fields = {name: value for name, value in vars(config).items() if re.search(r"vision.*layer|deepstack", name)}
        chosen = fields.pop("vision_feature_layer", None)
        chosen = list(chosen) if isinstance(chosen, (list, tuple)) else [chosen]
        if not hasattr(config, "vision_config") or fields or not all(isinstance(i, int) for i in chosen):
            continue
        stacks: dict[str, list[str]] = defaultdict(list)
        for matrix in found.matrices:
            layer = layer_of(matrix.module)
            if matrix.tower == "vision" and layer and layer not in stacks[stack_of(matrix.module)]:
                stacks[stack_of(matrix.module)].append(layer)
        for layers in stacks.values():  # hidden states are those of the embeddings and one of each layer
            unread += layers[max(i if i >= 0 else len(layers) + 1 + i for i in chosen) :]
    return unread


def is_cross(path: str) -> bool:
    """Whether an attention reads another sequence than its own, by the name that the library gives such modules."""
    return bool(re.search(r"cross_?att|encoder_attn|encdecattention|cross_attention", path.lower()))


def table(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A plain-text table with aligned columns."""
    cells = [[str(c) for c in header], *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


# --- towers ----------------------------------------------------------------------------------------------------------


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
    attentions = {path: modules[path] for path in _attentions(modules)}
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


def pixel_readers(model: nn.Module) -> list[str]:
    """Paths of the convolutions that read pictures."""
    return [p for p, m in own_modules(model).items() if isinstance(m, (nn.Conv2d, nn.Conv3d)) and m.in_channels == 3]


def token_embeddings(model: Any) -> list[str]:
    """Paths of the embeddings that read tokens (not positions, not types); without a config any that may."""
    modules = own_modules(model)
    sizes = {getattr(c, "vocab_size", None) for c in _configs(getattr(model, "config", None))} or {None}
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
    if any(getattr(m, "is_causal", None) is True for p, m in inside.items() if p in set(_attentions(inside))):
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


def _configs(config: Any) -> Iterator[Any]:
    if config is None:
        return
    yield config
    for name in getattr(config, "sub_configs", {}) or {}:
        yield from _configs(getattr(config, name, None))
    for value in vars(config).values():
        if hasattr(value, "sub_configs"):
            yield from _configs(value) if value is not config else ()


def image_sizes(model: Any) -> Iterator[tuple[int, int]]:
    """(height, width) of images, as the config and those inside it name them."""
    for config in _configs(getattr(model, "config", None)):
        size = getattr(config, "image_size", None)
        if isinstance(size, int):
            yield size, size
        elif isinstance(size, (list, tuple)) and len(size) == 2:
            yield size[0], size[1]


def _media_tokens(model: nn.Module) -> dict[str, int]:
    """{"image_token_id": 32000, ...} as far as the config or one inside it names them."""
    found: dict[str, int] = {}
    for config in _configs(getattr(model, "config", None)):
        for kind in ("image", "video", "media", "audio"):
            for name in (f"{kind}_token_id", f"{kind}_token_index"):
                value = getattr(config, name, None)
                if isinstance(value, int) and kind not in {n.partition("_")[0] for n in found}:
                    found[name] = value
    return found


# --- projections -----------------------------------------------------------------------------------------------------


def _attentions(modules: dict[str, nn.Module]) -> list[str]:
    """Paths of the attention modules: those with separate q, k, v children, with a fused one, or `nn.MultiheadAttention`."""
    letters: dict[str, set[str]] = defaultdict(set)
    for path, module in modules.items():
        if isinstance(unwrap(module), nn.MultiheadAttention):
            letters[path] |= set("qkv")
        elif is_linear(unwrap(module)):
            parent, _, leaf = path.rpartition(".")
            letters[parent].add(LETTER.get(leaf, leaf))
    return [path for path, found in letters.items() if set("qkv") <= found or "qkv" in found]


def _matrices(modules: dict[str, nn.Module], roots: dict[str, str]) -> Iterator[Matrix]:
    """Every linear module (and `nn.MultiheadAttention`) in the model's order, fused ones as several matrices."""
    attentions = set(_attentions(modules))
    ordinals: Counter[tuple[str, str]] = Counter()
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
            role = f"{tower}.{letter}.{ordinals[tower, letter]}"
            ordinals[tower, letter] += 1
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
        # A text encoder's cross-attention reads the picture: that is where BLIP-like models fuse.
        return "fusion" if name == "text" and is_cross(path) else name
    return "fusion" if layer_of(path) or path in attentions or path.rpartition(".")[0] in attentions else "other"


def stack_of(path: str) -> str:
    """Path of the stack of layers that a module lies in."""
    layer = layer_of(path)
    first = re.match(r"(.*?)\.\d+(\.|$)", layer or "")
    return first.group(1) if first else path.rpartition(".")[0]


def _span(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} .. {paths[-1]}"


def _count(modules: dict[str, nn.Module], root: str) -> int:
    """Parameters below a path, each once, without those of parts that adapters have attached."""
    found = {p for path, m in modules.items() if is_below(path, root) for p in m.parameters(recurse=False)}
    return sum(p.numel() for p in found)
