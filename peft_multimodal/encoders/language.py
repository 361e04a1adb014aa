"""The frozen encoder of a language: read, checked against what an adapter was trained on, named so that it is found again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoModelForTextEncoding, AutoTokenizer

from ..core.companions import record_of
from .frozen import Place, check_same_encoder, find_encoder, given_encoder, read_encoder

KIND = "language encoder"
KEPT = "encoder"  # the folder, in an adapter's own, of a copy of its encoder
# The folder of its tokenizer. Beside the adapter's config PEFT would take it for one of the base model.
KEPT_TOKENIZER = "tokenizer"


class LanguageEncoder(NamedTuple):
    """A language's encoder and its tokenizer."""

    module: nn.Module
    tokenizer: Any = None


class NamesEncoder(Protocol):
    """The fields of an adapter's config that say which language encoder it has."""

    encoder: str | None
    encoder_revision: str | None
    save_encoder: bool

    @property
    def is_loaded(self) -> bool: ...


def load_encoder(config: NamesEncoder, present: nn.ModuleDict | None = None) -> LanguageEncoder:
    """The config's frozen encoder, checked against what the config knows of it; one of `present` if it is among them.

    Fills in the config's `encoder_*` fields and `tokenizer_hash`.

    Raises:
        ValueError: it can't be read, reads no text, lacks weights, or is not the one that the adapter was trained on.
    """
    place = place_of(config)
    if place is None:
        module, tokenizer = given_encoder(config)
    else:
        module = present[place.key] if present is not None and place.key in present else _read(place)
        kept = str(Path(place.name).with_name(KEPT_TOKENIZER))
        tokenizer = _tokenizer(kept if _is_kept(config) else place.name, place.revision)
    if not isinstance(_embedding(module), nn.Embedding):
        raise ValueError(
            f"{config.encoder!r} ({type(module).__name__}) reads no tokens: it is no encoder of a language."
        )
    encoder: Any = module
    actual = {
        "encoder_type": encoder.config.model_type,
        "encoder_width": _width(encoder),
        "encoder_vocab_size": vocabulary_size(encoder),
        "tokenizer_hash": None if tokenizer is None else vocabulary_hash(tokenizer),
    }
    check_same_encoder(config, actual, "encoder", "with_encoder")
    return LanguageEncoder(module.requires_grad_(False).eval(), tokenizer)


def _read(place: Place) -> nn.Module:
    module = read_encoder(
        place, KIND, "encoder", prefer=AutoModelForTextEncoding
    )  # of T5 and its like the encoder alone
    if getattr(module.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{place.name!r} ({type(module).__name__}) is an encoder and a decoder: give the encoder alone, "
            "config.with_encoder(model.get_encoder(), tokenizer)."
        )
    return module


def _is_kept(config: NamesEncoder) -> bool:
    """Whether the adapter's folder has a copy of the encoder."""
    return config.save_encoder and record_of(config).origin is not None


def place_of(config: NamesEncoder) -> Place | None:
    """Where the encoder is, whose commit the config then names; None where it was given as a module."""
    if given_encoder(config) is not None:
        return None
    if _is_kept(config):
        origin: Any = record_of(config).origin
        source, subfolder = origin.source, origin.subfolder or ""
        if not Path(source).is_dir():
            source = snapshot_download(source, allow_patterns=str(Path(subfolder, "*")), **origin.hub)
        return Place(str(Path(source, subfolder, KEPT)))
    if config.encoder is None:
        raise ValueError(
            "encoder= is missing: the Hub id or the folder of a frozen encoder of the language, such as "
            "'intfloat/multilingual-e5-small'; or give a module by config.with_encoder(module)."
        )
    place = find_encoder(config.encoder, config.encoder_revision, KIND, "encoder")
    config.encoder_revision = place.revision
    return place


def _tokenizer(place: str, revision: str | None) -> Any:
    """The encoder's tokenizer, or None where there is none."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None
    # Where there are no files, transformers makes one that knows special tokens alone.
    return tokenizer if len(tokenizer.get_vocab()) > len(tokenizer.all_special_tokens) else None


def vocabulary_hash(tokenizer: Any) -> str:
    """A hash of a tokenizer's tokens and their ids."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]), ensure_ascii=False)
    return hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def vocabulary_size(encoder: Any) -> int:
    """How many tokens it knows."""
    return _embedding(encoder).num_embeddings


def _embedding(encoder: Any) -> Any:
    try:
        return encoder.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _width(encoder: Any) -> int:
    config = encoder.config.get_text_config()
    return getattr(config, "hidden_size", None) or config.d_model
