"""The frozen encoder of a language: read, checked against what an adapter was trained on, named so that it is found again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
from transformers.utils import cached_file

if TYPE_CHECKING:
    from .cross_lingual_adapter import CrossLingualAdapterConfig

KEPT = "encoder"  # the folder, in an adapter's own, of a copy of its encoder


class LanguageEncoder(NamedTuple):
    """A language's encoder and its tokenizer."""

    module: nn.Module
    tokenizer: Any = None


def load_encoder(config: CrossLingualAdapterConfig, present: nn.ModuleDict | None = None) -> LanguageEncoder:
    """The config's frozen encoder, checked against what the config knows of it; one of `present` if it is among them.

    Fills in the config's `encoder_*` fields and `tokenizer_hash`.

    Raises:
        ValueError: it can't be read, reads no text, lacks weights, or is not the one that the adapter was trained on.
    """
    if config._given is not None:
        module, tokenizer = config._given
    else:
        place, revision = _place(config)
        key = encoder_key(config)
        module = present[key] if present is not None and key in present else _read(config, place, revision)
        # The tokenizer stands beside a kept encoder, in the adapter's own folder.
        tokenizer = _tokenizer(str(Path(place).parent) if _is_kept(config) else place, revision)
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
    for name, value in actual.items():
        recorded = getattr(config, name)
        if config.is_loaded and None not in (recorded, value) and recorded != value:
            raise ValueError(
                f"The adapter was trained on another encoder: {config.encoder!r} has {name} {value!r} now, then it was "
                f"{recorded!r}. Name the right one: config.encoder, config.encoder_revision, or config.with_encoder(module)."
            )
        setattr(config, name, recorded if value is None else value)
    return LanguageEncoder(module.requires_grad_(False).eval(), tokenizer)


def _read(config: CrossLingualAdapterConfig, place: str, revision: str | None) -> nn.Module:
    try:
        with _real_parameters():
            config_class = type(AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False))
            encodes = config_class in AutoModelForTextEncoding._model_mapping  # of T5 and its like the encoder alone
            auto = AutoModelForTextEncoding if encodes else AutoModel
            module, found = auto.from_pretrained(
                place, revision=revision, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"The language encoder {config.encoder!r} can't be loaded: {error}. If it is elsewhere now, name the place: "
            "config = CrossLingualAdapterConfig.from_pretrained(folder); config.encoder = ...; then pass config=config."
        ) from error
    if getattr(module.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{config.encoder!r} ({type(module).__name__}) is an encoder and a decoder: give the encoder alone, "
            "config.with_encoder(model.get_encoder(), tokenizer)."
        )
    missing = sorted(key for key in found["missing_keys"] if "pooler" not in key)  # nobody reads a pooler
    if missing:
        raise ValueError(
            f"The language encoder {config.encoder!r} lacks weights: {', '.join(missing[:3])} and {len(missing)} in all, which "
            "would be random. Save it again as a whole."
        )
    return module


def _is_kept(config: CrossLingualAdapterConfig) -> bool:
    return config.save_encoder and config._folder is not None


def _place(config: CrossLingualAdapterConfig) -> tuple[str, str | None]:
    """Where the encoder is: a folder, or a Hub id and its commit, which the config then names."""
    if _is_kept(config):
        folder: Any = config._folder
        source, subfolder, hub = folder["source"], folder["subfolder"] or "", folder["hub"]
        if not Path(source).is_dir():
            source = snapshot_download(source, allow_patterns=str(Path(subfolder, "*")), **hub)
        return str(Path(source, subfolder, KEPT)), None
    if config.encoder is None:
        raise ValueError(
            "encoder= is missing: the Hub id or the folder of a frozen encoder of the language, such as "
            "'intfloat/multilingual-e5-small'; or give a module by config.with_encoder(module)."
        )
    if not Path(config.encoder).is_dir():
        try:
            file = cached_file(config.encoder, "config.json", revision=config.encoder_revision)
        except OSError as error:
            raise ValueError(
                f"The language encoder {config.encoder!r} can't be found: {error}. If it is elsewhere now, name the place: "
                "config = CrossLingualAdapterConfig.from_pretrained(folder); config.encoder = ...; then pass config=config."
            ) from error
        commit = re.search(r"snapshots/([0-9a-f]{40})/", Path(file or "").as_posix())
        config.encoder_revision = commit.group(1) if commit else config.encoder_revision
    return config.encoder, config.encoder_revision


def encoder_key(config: CrossLingualAdapterConfig) -> str:
    """The name under which languages share an encoder: its place and commit, or the module that was given."""
    if config._given is not None:
        return f"module_{id(config._given.module)}"
    return "encoder_" + hashlib.sha256(json.dumps(_place(config)).encode()).hexdigest()[:16]


def _tokenizer(place: str, revision: str | None) -> Any:
    """The encoder's tokenizer, or None where there is none."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None
    # Where there are no files, transformers makes one that knows special tokens alone.
    return tokenizer if len(tokenizer.get_vocab()) > len(tokenizer.all_special_tokens) else None


_REGISTER = (nn.Module.register_parameter, nn.Module.register_buffer)


@contextmanager
def _real_parameters() -> Iterator[None]:
    """PEFT's low_cpu_mem_usage makes every new parameter an empty one, also those of the encoder, which are read here."""
    empty = (nn.Module.register_parameter, nn.Module.register_buffer)
    nn.Module.register_parameter, nn.Module.register_buffer = _REGISTER  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter, nn.Module.register_buffer = empty  # type: ignore[method-assign]


def vocabulary_hash(tokenizer: Any) -> str:
    """A hash of a tokenizer's tokens and their ids."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]), ensure_ascii=False)
    return hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def vocabulary_size(encoder: Any) -> int:
    """How many tokens it knows."""
    return _embedding(encoder).num_embeddings


def longest_text(encoder: Any) -> int | None:
    """How many tokens it can read; None where there is no limit."""
    limit = getattr(encoder.config, "max_position_embeddings", None)
    positions = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    offset = getattr(positions, "padding_idx", None)  # RoBERTa counts positions from behind its padding id
    return limit if limit is None or offset is None else limit - offset - 1


def _embedding(encoder: Any) -> Any:
    try:
        return encoder.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _width(encoder: Any) -> int:
    config = encoder.config.get_text_config()
    return getattr(config, "hidden_size", None) or config.d_model
