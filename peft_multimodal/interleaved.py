"""Texts with pictures and videos between their words, as [`GatedXAttnModel`] reads them.

Rows of a dataset are read under `Trainer` with `TrainingArguments(remove_unused_columns=False)`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AddedToken, AutoImageProcessor, AutoTokenizer, BatchEncoding
from transformers.utils import cached_file

from .images import is_image, read_image
from .rows import check_some, column_of, each, naming, row_name
from .text_limits import allowed_length, truncation

Visual = Any  # an image as `read_image` takes it, or a sequence of them: the frames of a video
Conversation = Sequence[Mapping[str, Any]]  # messages: {"role": ..., "content": a string or a list of parts}


class Lesson(NamedTuple):
    """A row's text, and which of it is learnt."""

    text: str
    learnt: list[tuple[str, str]] | None  # spans: the text before each, and up to its end; None: all of it
    is_chat: bool = False


class InterleavedProcessor:
    """Tokenises texts with markers, each of which stands for a picture or a video.

        >>> processor = InterleavedProcessor(tokenizer, image_processor)
        >>> batch = processor(["<image>a red apple. <image>a green"], images=[[apple, pear]])
        >>> model.generate(**batch, max_new_tokens=20)

    Args:
        tokenizer: Of the language model. It gets the marker as a special token if it doesn't know it; the model's
            embedding needs no resizing. Its padding token is needed where texts differ in length.
        image_processor: Of the vision encoder; None for texts whose pictures come as `vision_features`.
        media_token: The marker.
        text_column, images_column, answer_column: Of the rows that `collate` takes: a string or a conversation, a list of
            images, and what is to be answered, which rows may lack; None leaves such a column alone, where the text holds
            the answer.
        max_length: Longest text of `collate` in tokens; by default the smaller of the tokenizer's and the model's limit.
        model: The language model, bare or in a `PeftModel`; it isn't kept.

    Raises:
        ValueError: the marker isn't one token, or max_length is more than the model reads.
    """

    FILE = "interleaved_processor.json"
    TOKENIZER = "tokenizer"
    IMAGES = "image_processor"

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any = None,
        media_token: str = "<image>",
        text_column: str = "text",
        images_column: str = "images",
        answer_column: str | None = "answer",
        max_length: int | None = None,
        model: Any = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.media_token = media_token
        self.text_column = text_column
        self.images_column = images_column
        self.answer_column = answer_column
        self.max_length = allowed_length(max_length, tokenizer, model)
        if media_token not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(media_token, special=True, normalized=False)], special_tokens=True)
        if tokenizer.encode(media_token, add_special_tokens=False) != [self.media_token_id]:
            raise ValueError(f"The tokenizer splits the marker {media_token!r}: choose one of its special tokens.")

    @property
    def media_token_id(self) -> int:
        """The marker's id, which may lie beyond the model's vocabulary."""
        return self.tokenizer.get_vocab()[self.media_token]

    def __call__(
        self,
        texts: str | Sequence[str] | Conversation | Sequence[Conversation],
        images: Sequence[Sequence[Visual]] | None = None,
        padding_side: str | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        """A batch for the model.

        Args:
            texts: A text or B of them; for `generate`, texts of different length are padded on the left. Or conversations,
                which the tokenizer's chat template writes, with the beginning of an answer unless they end with one.
                In a message's list of parts {"type": "image"} stands for the marker.
            images: The pictures of each text, one for each of its markers; a video is a list of frames. None where
                texts have none, or where they come as `vision_features`.
            padding_side: "left" or "right"; by default the tokenizer's.
            kwargs: For the tokenizer: truncation, max_length, ... Pictures whose markers are cut off are left out.

        Returns:
            input_ids and attention_mask int64 (B, L). With pictures pixel_values: (B, T, C, H, W), or with a video among
            them (B, T, F, C, H, W) and frame_mask (B, T, F), True where a frame is one. Rows of fewer pictures and
            videos of fewer frames are filled up with zeros.

        Raises:
            ValueError: a text has not as many markers as pictures, the tokenizer can't pad, or makes several rows of a
                text.
            TypeError: a text is no string, or an image nothing that `read_image` takes.
        """
        given: list[Any] = [texts] if isinstance(texts, str) or _is_conversation(texts) else list(texts)
        check_some(given)
        if any(map(_is_conversation, given)):
            given = [self.write(t, answering=t[-1]["role"] != "assistant") for t in self._only_conversations(given)]
            kwargs = {"add_special_tokens": False, **kwargs}  # the template has them
        if wrong := [t for t in given if not isinstance(t, str)]:
            raise TypeError(f"Texts are strings, got {type(wrong[0]).__name__}.")
        if images is not None:
            if is_image(images):
                raise TypeError("images holds a list of images for each text: images=[[apple, pear], [plum]].")
            images = [() if row is None else row for row in images]
            self._check_counts(given, images)
        if self.tokenizer.pad_token is None:
            raise ValueError("The tokenizer has no padding token: set tokenizer.pad_token = tokenizer.eos_token.")
        sides = {} if padding_side is None else {"padding_side": padding_side}
        found = self.tokenizer(given, **{"padding": True, "return_tensors": "pt", **sides, **kwargs})
        batch = {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}
        if images is not None:
            images = self._left_by_truncation(images, found["input_ids"])
            if any(images):
                batch |= self._pixels(images)
        return BatchEncoding(batch)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Rows of a text and its pictures to a training batch: `data_collator=processor.collate`.

        What is learnt of a row:

        - where it has an answer, the answer alone. It follows on the text as it is written, a space between them
          included, and the tokenizer's `eos_token` after it;
        - of a conversation (a list of messages in the text's place), what the assistant says; an answer is its last
          message. The tokenizer's chat template writes it;
        - of any other text all of it. One that is to end somewhere ends with the tokenizer's `eos_token`.

        Returns:
            A batch, padded on the right, with labels int64 (B, L): -100 at what isn't learnt, padding and markers.

        Raises:
            ValueError: a column is missing, an answer is empty or wholly cut off, or the places of the assistant's messages
                can't be told.
        """
        check_some(rows)
        images = each(rows, lambda row, name: column_of(row, self.images_column, name, "images_column"))
        lessons = each(rows, self._lesson)
        if len({lesson.is_chat for lesson in lessons}) > 1:
            raise ValueError(
                f"Column {self.text_column!r} holds texts and conversations in one batch: use one of them."
            )
        special = {"add_special_tokens": False} if lessons[0].is_chat else {}  # a chat template has them
        with naming(rows, "id"):
            cut = truncation(self.max_length)
            batch = dict(self([lesson.text for lesson in lessons], images, padding_side="right", **cut, **special))
        ids, mask = batch["input_ids"], batch["attention_mask"]
        ignored = (mask == 0) | (ids == self.media_token_id)
        for index, (row, lesson) in enumerate(zip(rows, lessons, strict=True)):
            if lesson.learnt is not None:
                length = int(mask[index].sum())
                ignored[index, :length] |= ~self._learnt(lesson, length, special)
                if bool(ignored[index].all()):
                    raise ValueError(
                        f"{row_name(row, index)}: nothing is left of its answer in {length} tokens. Shorten "
                        "its text, raise max_length=, or leave the row out."
                    )
        return {**batch, "labels": ids.masked_fill(ignored, -100)}

    def write(self, conversation: Conversation, answering: bool = False) -> str:
        """A conversation as the tokenizer's chat template writes it.

        Args:
            answering: With the beginning of an answer, for `generate`.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                "The tokenizer has no chat template, so it can't write a conversation. Set tokenizer.chat_template, or use "
                "texts."
            )
        messages = [{**m, "content": self._content(m["content"])} for m in conversation]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)

    def _content(self, content: Any) -> str:
        """Of a message: a text with markers. Language models' templates take nothing else."""
        if isinstance(content, str):
            return content
        return "".join(self.media_token if part["type"] == "image" else part["text"] for part in content)

    def _only_conversations(self, texts: Sequence[Any]) -> Sequence[Conversation]:
        if not all(map(_is_conversation, texts)):
            raise ValueError("Texts and conversations were given in one batch: use one of them.")
        return texts

    def _lesson(self, row: Mapping[str, Any], name: str) -> Lesson:
        text = column_of(row, self.text_column, name, "text_column")
        answer = None if self.answer_column is None else row.get(self.answer_column)
        if answer is not None and not (isinstance(answer, str) and answer.strip()):
            raise ValueError(f"{name}: column {self.answer_column!r} is empty or no string: {answer!r}.")
        if not _is_conversation(text):
            if answer is None:
                return Lesson(text, None)
            end = self.tokenizer.eos_token or ""
            whole = f"{text}{answer.removesuffix(end)}{end}"
            return Lesson(whole, [(text, whole)])
        said = [] if answer is None else [{"role": "assistant", "content": answer}]
        messages = [*text, *said]
        whole, turns = self.write(messages), [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        learnt = [(self.write(messages[:i], True) if i else "", self.write(messages[: i + 1])) for i in turns]
        if not turns:
            raise ValueError(
                f"{name}: the conversation has no message of the assistant, and there is no column "
                f"{self.answer_column!r}: there is nothing to learn."
            )
        if not all(whole.startswith(part) for span in learnt for part in span):
            raise ValueError(
                f"{name}: the tokenizer's chat template writes the beginning of this conversation otherwise than the whole, "
                "so the places of its answers can't be told. Use one question a row, or a text and an answer."
            )
        return Lesson(whole, learnt, is_chat=True)

    def _learnt(self, lesson: Lesson, length: int, special: dict[str, Any]) -> Tensor:
        """bool (length): the tokens of the spans. The first one that differs from the prompt's own belongs to the answer."""
        assert lesson.learnt is not None
        ids = self.tokenizer.encode(lesson.text, **special)
        found = torch.zeros(len(ids), dtype=torch.bool)
        for before, upto in lesson.learnt:
            start = _common(ids, self.tokenizer.encode(before, **special))
            whole = upto == lesson.text
            found[start : len(ids) if whole else _common(ids, self.tokenizer.encode(upto, **special))] = True
        return found[len(found) - length :] if self.tokenizer.truncation_side == "left" else found[:length]

    def _check_counts(self, texts: list[str], images: Sequence[Sequence[Visual]]) -> None:
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} lists of images for {len(texts)} texts.")

        def check(row: Any, name: str) -> None:
            text, row = row
            if is_image(row):
                raise TypeError(f"{name}: images holds a list of images for each text: images=[[apple, pear], [plum]].")
            if (markers := text.count(self.media_token)) != len(row):
                raise ValueError(f"{name} has {markers} markers {self.media_token!r} but {len(row)} images.")

        each(list(zip(texts, images, strict=True)), check)

    def _left_by_truncation(self, images: Sequence[Sequence[Visual]], input_ids: Any) -> list[list[Visual]]:
        """The pictures whose markers are still in the text."""
        rows = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
        if len(rows) != len(images):
            raise ValueError(f"The tokenizer made {len(rows)} rows of {len(images)} texts: whose pictures are whose?")
        kept = [row.count(self.media_token_id) for row in rows]
        if self.tokenizer.truncation_side == "left":
            return [list(row)[len(row) - n :] for row, n in zip(images, kept, strict=True)]
        return [list(row)[:n] for row, n in zip(images, kept, strict=True)]

    def _pixels(self, images: Sequence[Sequence[Visual]]) -> dict[str, Tensor]:
        if self.image_processor is None:
            raise ValueError("This InterleavedProcessor has no image_processor.")
        visuals = each(images, _frames)
        frames = [frame for row in visuals for video in row for frame in video]
        pixels = self.image_processor(frames, return_tensors="pt")["pixel_values"]
        size = (len(visuals), max(map(len, visuals)), max(len(video) for row in visuals for video in row))
        batch = pixels.new_zeros(*size, *pixels.shape[1:])
        mask = torch.zeros(size, dtype=torch.bool)
        for b, row in enumerate(visuals):
            for t, video in enumerate(row):
                mask[b, t, : len(video)] = True
        batch[mask] = pixels  # frames stand in the order of rows, pictures and frames
        if not any(_is_video(v) for row in images for v in row):
            return {"pixel_values": batch[:, :, 0]}
        return {"pixel_values": batch, "frame_mask": mask}

    def decode(self, input_ids: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(input_ids, **kwargs)

    def batch_decode(self, input_ids: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(input_ids, **kwargs)

    def save_pretrained(self, folder: Any, **kwargs: Any) -> None:
        """`interleaved_processor.json`, and folders of the tokenizer and the image processor ."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder / self.TOKENIZER)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder / self.IMAGES)
        settings = {
            "media_token": self.media_token,
            "text_column": self.text_column,
            "images_column": self.images_column,
            "answer_column": self.answer_column,
            "max_length": self.max_length,
            "images": self.image_processor is not None,
        }
        (folder / self.FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name_or_path: Any, **kwargs: Any) -> InterleavedProcessor:
        """Read what `save_pretrained` wrote, from a folder or the Hub (`revision`, `token`, `cache_dir`)."""
        file = cached_file(str(name_or_path), cls.FILE, **kwargs)
        assert file is not None  # a missing file raises
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, subfolder=cls.TOKENIZER, **kwargs)
        has_images = settings.pop("images")
        images = None
        if has_images:
            images = AutoImageProcessor.from_pretrained(name_or_path, subfolder=cls.IMAGES, **kwargs)
        return cls(tokenizer, images, **settings)


def _is_video(visual: Visual) -> bool:
    return isinstance(visual, (Sequence, np.ndarray, Tensor)) and not is_image(visual)


def _frames(row: Sequence[Visual], name: str) -> list[list[Any]]:
    """The frames of each of a text's images and videos; an image has one."""
    found = []
    for place, visual in enumerate(row):
        frames = list(visual) if _is_video(visual) else [visual]
        if not frames:
            raise ValueError(f"{name}: video {place} has no frames.")
        found.append([read_image(frame, f"{name}: image {place}") for frame in frames])
    return found


def _is_conversation(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the beginning that two lists share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
