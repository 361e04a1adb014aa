"""Which functions of the package see the token ids of one forward pass of StructuredPrompt, with captions in the call.

    python -m benchmarks.trace_inputs

A function sees them where an argument, a local variable or its result holds them, also inside of tuples, dictionaries and
dataclasses. Ids are known by the words that they hold, so that copies and parts count, too.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

import peft_multimodal
from peft_multimodal import StructuredPromptConfig

from .tasks.prompt_cost import IMAGES, clip_with_given_patches, words

PACKAGE = str(Path(peft_multimodal.__file__).parent)


def functions_that_see(ids: set[int], call: Callable[[], Any]) -> Counter[str]:
    """{function of the package: how many of its calls saw a tensor of integers with one of these ids}."""
    wanted, seen, codes = torch.tensor(sorted(ids)), Counter[str](), set[CodeType]()

    def look(frame: FrameType, event: str, result: Any) -> None:
        code = frame.f_code
        if event != "return" or not code.co_filename.startswith(PACKAGE):
            return
        sys.setprofile(None)
        if any(t.dtype == torch.long and torch.isin(t, wanted).any() for t in tensors([frame.f_locals, result])):
            codes.add(code)
            seen[f"{Path(code.co_filename).stem}: {code.co_qualname}"] += 1
        sys.setprofile(look)

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


def tensors(value: Any) -> Iterator[Tensor]:
    """Those in a value; modules and other objects are not looked into."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors([getattr(value, field.name) for field in dataclasses.fields(value)])


def trace(order: str = "GDI", training: bool = False) -> Counter[str]:
    """The functions that see the ids of captions of two words."""
    tokenizer = words()
    config = StructuredPromptConfig(general_init=None, attention_dim=16, order=order, chunk_size=2)
    model: Any = get_peft_model(clip_with_given_patches(layers=1), config).train(training)
    model.set_tokenizer(tokenizer)
    captions = tokenizer(
        [f"w{500 + i} w{600 + i}" for i in range(IMAGES)], return_tensors="pt", return_token_type_ids=False
    )
    pixels = torch.zeros(IMAGES, 3, 224, 224)
    ids = {*captions["input_ids"][:, 1:-1].flatten().tolist()}  # without what the tokenizer puts around
    return functions_that_see(ids, lambda: model(pixel_values=pixels, **captions))


if __name__ == "__main__":
    for order in ("GDI", "GID"):
        found = trace(order)
        print(f"\n{order}: {len(found)} functions, {found.total()} calls")
        for name, calls in found.items():
            print(f"{calls:4} {name}")
