"""What users hand over, checked before anything is computed: class lists, captions, labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ...core.modules import device_of
from .pieces import Texts
from .reader import PromptReader


class Settings(Protocol):
    """What is read of an adapter's settings in each call; the method's page says what they mean."""

    order: str
    domain: str
    num_domains: int
    general_init: str | None
    chunk_size: int
    shortlist: int | None
    text_anchor: float
    anchor_template: str

    def context(self) -> int: ...


def class_list(names: Any, tokenizer: Any, reader: PromptReader) -> Texts:
    """The texts of class names; ValueError where there are none, or two that can't be told apart."""
    frame, names = reader.tokenizer_frame(), in_order(names)
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and n.strip() for n in names):
        raise ValueError(f"set_classes takes a list of names, got {names!r}.")
    words = frame.words(tokenizer, names)
    seen: dict[tuple[int, ...], str] = {}
    for name, ids in zip(names, words, strict=True):
        if (other := seen.get(tuple(ids))) is not None:
            alike = "" if other == name else f": the tokenizer reads {other!r} alike"
            raise ValueError(f"Class {name!r} is there twice{alike}. Classes of one name can't be told apart.")
        seen[tuple(ids)] = name
    return Texts.of_lists(words, frame.pad, device_of(reader.embedding), names=tuple(names))


def fitting(texts: Texts, adapter_name: str, settings: Settings, reader: PromptReader) -> Texts:
    """The texts as an adapter takes them; ValueError where they are too long, or another number of classes than its."""
    context = settings.context()
    longest, room = texts.ids.shape[1], reader.room(context)
    if longest > room and not torch.compiler.is_compiling():
        sizes = [longest] * len(texts) if texts.mask is None else texts.mask.sum(dim=1).tolist()
        for i, size in enumerate(sizes):
            if size > room:
                raise ValueError(
                    (f"Caption {i}" if texts.names is None else f"Class {texts.names[i]!r}")
                    + f" is {size} tokens; beside {context} of the prompt the text tower, which reads "
                    f"{reader.longest}, has room for {max(room, 0)}. Shorten it."
                )
    if settings.domain == "one":
        return texts
    if texts.names is None or len(texts) != settings.num_domains:
        raise ValueError(
            f"Adapter {adapter_name!r} has a domain context for each of {settings.num_domains} classes "
            f"(domain='per_class') and can't serve {len(texts)} {'captions' if texts.names is None else 'classes'}. "
            "For lists that change train one with domain='one'."
        )
    return replace(texts, domains=torch.arange(len(texts), device=texts.ids.device))


def in_order(values: Any) -> Any:
    """The values of a list, a tuple, an array or their like as a list; anything else as it is."""
    values = values.tolist() if hasattr(values, "tolist") else values
    unordered = isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable)
    return values if unordered else list(values)


def check_labels(labels: Tensor, pixel_values: Tensor | None, classes: int) -> None:
    rows = labels.shape[0] if pixel_values is None or labels.ndim != 1 else pixel_values.shape[0]
    if labels.ndim != 1 or labels.is_floating_point() or labels.shape[0] != rows:
        raise ValueError(
            f"labels must be one class number an image, got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if torch.compiler.is_compiling() or not labels.shape[0]:
        return
    low, high = (int(x) for x in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"Label {high if high >= classes else low} is no place in the list of {classes} classes.")
