"""What is learned of a row: all of its text, its answer, or what the assistant says in a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Conversation = Sequence[Mapping[str, Any]]  # messages: {"role": ..., "content": a string or a list of parts}


class Lesson(NamedTuple):
    """A row's text, and which of it is learned."""

    text: str
    learned: list[tuple[str, str]] | None  # spans: the text before each, and up to its end; None: all of it
    is_chat: bool = False


def is_conversation(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def write(tokenizer: Any, media_token: str, conversation: Conversation, answering: bool = False) -> str:
    """A conversation as the tokenizer's chat template writes it, with the beginning of an answer if `answering`."""
    if not tokenizer.chat_template:
        raise ValueError(
            "The tokenizer has no chat template, so it can't write a conversation. Set tokenizer.chat_template, or use "
            "texts."
        )

    def text(content: Any) -> str:  # language models' templates take nothing but a text with markers
        if isinstance(content, str):
            return content
        return "".join(media_token if piece["type"] == "image" else piece["text"] for piece in content)

    messages = [{**m, "content": text(m["content"])} for m in conversation]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)


def chat_lesson(
    tokenizer: Any, media_token: str, messages: Conversation, name: str, answer_column: str | None
) -> Lesson:
    """What the assistant says; the row's name, and the column where its answer would stand, are for errors."""

    def upto(count: int, answering: bool = False) -> str:
        return write(tokenizer, media_token, messages[:count], answering)

    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    whole = upto(len(messages))
    learned = [(upto(i, True) if i else "", upto(i + 1)) for i in turns]
    if not turns:
        raise ValueError(
            f"{name}: the conversation has no message of the assistant, and there is no column "
            f"{answer_column!r}: there is nothing to learn."
        )
    if not all(whole.startswith(text) for span in learned for text in span):
        raise ValueError(
            f"{name}: the tokenizer's chat template writes the beginning of this conversation otherwise than the whole, "
            "so the places of its answers can't be told. Use one question a row, or a text and an answer."
        )
    return Lesson(whole, learned, is_chat=True)


def learnt_tokens(tokenizer: Any, lesson: Lesson, length: int, **special: Any) -> Tensor:
    """bool (length): the tokens of the spans, of as many as truncation left; `special` is as the text is tokenised.

    The first one that differs from the prompt's belongs to the answer.
    """
    assert lesson.learned is not None
    ids = tokenizer.encode(lesson.text, **special)
    learned = torch.zeros(len(ids), dtype=torch.bool)
    for before, upto in lesson.learned:
        start = _common(ids, tokenizer.encode(before, **special))
        end = len(ids) if upto == lesson.text else _common(ids, tokenizer.encode(upto, **special))
        learned[start:end] = True
    return learned[len(learned) - length :] if tokenizer.truncation_side == "left" else learned[:length]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the beginning that two lists share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
