"""What GatedXAttn refuses, and what it warns of, before a model is touched."""

from __future__ import annotations

import warnings
from typing import Any

from peft import NoMatchingPeftModuleError
from torch import nn

from ...core.anatomy import Anatomy
from ...core.config import MultimodalConfig
from ...core.sites import Decoder, decoder, text_configs

INSTEAD = "Use a decoder-only language model (Llama, Qwen, Gemma, Mistral, OPT, GPT-2, ...)."
LARGE, SHARE = 10_000_000, 0.25
"""More parameters than this, and than this share of the model's, are worth a warning."""


def find_decoder(model: Any, anatomy: Anatomy) -> Decoder:
    """The one decoder that reads text alone, maybe inside a vision-language model; the error says what else to use."""
    name = anatomy.model_class
    towers = [t for t in anatomy.towers if t.name == "decoder"]
    if not towers:
        raise NoMatchingPeftModuleError(f"GatedXAttn stands before the layers of a decoder; {name} has none. {INSTEAD}")
    if not towers[0].attentions and getattr(model, "_is_stateful", False):
        raise NoMatchingPeftModuleError(
            f"{name} keeps a recurrent state in place of attention's keys and values, by which GatedXAttn knows where in its "
            f"text generation is. {INSTEAD}"
        )
    if any((getattr(c, "hc_mult", None) or 1) > 1 for c in text_configs(model)):
        raise NoMatchingPeftModuleError(
            f"The layers of {name} pass several streams of states on (hyper-connections), and GatedXAttn adds to one. {INSTEAD}"
        )
    stack = decoder(model, anatomy)
    if stack is None or not stack.is_alone:
        raise NoMatchingPeftModuleError(
            f"{name} has no single stack of decoder layers that reads the text (an encoder and a decoder, or several). "
            f"GatedXAttn stands before the layers of one decoder. {INSTEAD}"
        )
    return stack


def check_vocabulary(config: MultimodalConfig, size: int, model_class: str) -> None:
    """Refuse a base that knows more or fewer tokens than the one that the adapter was trained on.

    Its widths may agree, and yet the marker and every other id would mean something else.
    """
    trained = (config.base_signature or {}).get("vocabulary") if config.is_loaded else None  # older files don't say
    if trained not in (None, size):
        raise ValueError(
            f"This adapter belongs to another base: it was trained on {config.base_model_name_or_path or 'one'} with an "
            f"embedding of {trained} tokens, this {model_class} has {size}. Load the base that the adapter's "
            "adapter_config.json names; if it was resized then, resize it now: "
            f"model.resize_token_embeddings({trained})."
        )


def check_marker(marker: int | None, model: nn.Module) -> None:
    """Refuse a token of the language model's own, which a tokenizer gives for a marker that it doesn't know."""
    for config in text_configs(model):
        for name in ("eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            if marker in (value if isinstance(value, list) else [value]):
                raise ValueError(
                    f"media_token_id={marker} is the {name} of {type(model).__name__}, which no marker can be. A "
                    "tokenizer gives such a token for a marker that it doesn't know: take media_token_id= from "
                    "InterleavedProcessor(tokenizer, image_processor).media_token_id, which adds the marker."
                )


def warn_of_size(count: int, model: nn.Module, made_of: str) -> None:
    """Say before anything is made how many parameters a large adapter will have, in what, and what makes it smaller."""
    whole = sum(p.numel() for p in model.parameters())
    if count > max(LARGE, SHARE * whole):
        warnings.warn(
            f"GatedXAttn will train {count:,} parameters ({4 * count / 1e6:,.0f} MB in float32), {count / whole:.0%} of the "
            f"{whole:,} of {type(model).__name__}: {made_of}. A larger every_n_layers, ff_mult=1 or 0, "
            "resampler_depth=1, resampler='linear' or share_blocks=True make it smaller.",
            stacklevel=2,
        )
