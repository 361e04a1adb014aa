"""Texts with images and videos between their words, as [`GatedXAttnModel`] reads them.

Rows of a dataset are read under `Trainer` with `TrainingArguments(remove_unused_columns=False)`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AddedToken, AutoImageProcessor, AutoTokenizer, BatchEncoding
from transformers.utils import cached_file

from ..rows import check_some, column_of, each, naming, row_name
from ..text_limits import allowed_length, truncation
from .lessons import Conversation, Lesson, chat_lesson, is_conversation, learnt_tokens, write
from .visuals import Visual, images_of_texts, left_by_truncation, pixel_batch


class InterleavedProcessor:
    """Tokenises texts with markers, each of which stands for an image or a video.

    Args:
        tokenizer: Of the language model. It gets the marker as a special token if it doesn't know it; the model's
            embedding needs no resizing. Its padding token is needed where texts differ in length.
        image_processor: Of the vision encoder; None for texts whose images come as `vision_features`.
        media_token: The marker.
        text_column: Of the rows that `collate` takes: a string or a conversation.
        images_column: Of these rows: a list of images.
        answer_column: Of these rows, which may lack it: what is to be answered. None leaves the column alone, for
            texts that hold the answer.
        max_length: Longest text of `collate` in tokens; by default the smaller of the tokenizer's and the model's limit.
        model: The language model, bare or in a `PeftModel`; it isn't kept.

    Raises:
        ValueError: the marker isn't one token, or max_length is more than the model reads.

    Examples:
        >>> from transformers import AutoImageProcessor, AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        >>> tokenizer.pad_token = tokenizer.eos_token
        >>> processor = InterleavedProcessor(tokenizer, AutoImageProcessor.from_pretrained("facebook/dinov2-small"))
        >>> processor(["<image>a red apple. <image>a green"], images=[[apple, pear]])["pixel_values"].shape
        >>> processor.collate([{"text": "<image>a red apple", "images": [apple]}])["labels"]
    """

    FILE = "interleaved_processor.json"
    TOKENIZER = "tokenizer"
    IMAGES = "image_processor"
    SETTINGS = ("media_token", "text_column", "images_column", "answer_column", "max_length")

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
        self.tokenizer, self.image_processor, self.media_token = tokenizer, image_processor, media_token
        self.text_column, self.images_column, self.answer_column = text_column, images_column, answer_column
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
            images: The images of each text, one for each of its markers; a video is a list of frames. None where
                texts have none, or where they come as `vision_features`.
            padding_side: "left" or "right"; by default the tokenizer's.
            kwargs: For the tokenizer: truncation, max_length, ... Images whose markers are cut off are left out.

        Returns:
            input_ids and attention_mask int64 (B, L). With images pixel_values: (B, T, C, H, W), or with a video among
            them (B, T, F, C, H, W) and frame_mask (B, T, F), True where a frame is one. Rows of fewer images and
            videos of fewer frames are filled up with zeros.

        Raises:
            ValueError: a text has not as many markers as images, the tokenizer can't pad, or makes several rows of a
                text.
            TypeError: a text is no string, or an image nothing that `read_image` takes.
        """
        rows: list[Any] = [texts] if isinstance(texts, str) or is_conversation(texts) else list(texts)
        check_some(rows)
        if any(map(is_conversation, rows)):
            if not all(map(is_conversation, rows)):
                raise ValueError("Texts and conversations were given in one batch: use one of them.")
            rows = [self.write(row, answering=row[-1]["role"] != "assistant") for row in rows]
            kwargs = {"add_special_tokens": False, **kwargs}  # the template has them
        if wrong := [t for t in rows if not isinstance(t, str)]:
            raise TypeError(f"Texts are strings, got {type(wrong[0]).__name__}.")
        if images is not None:
            images = images_of_texts(images, rows, self.media_token)
        if self.tokenizer.pad_token is None:
            raise ValueError("The tokenizer has no padding token: set tokenizer.pad_token = tokenizer.eos_token.")
        sides = {} if padding_side is None else {"padding_side": padding_side}
        tokens = self.tokenizer(rows, **{"padding": True, "return_tensors": "pt", **sides, **kwargs})
        batch = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        if images is not None:
            images = left_by_truncation(
                images, tokens["input_ids"], self.media_token_id, self.tokenizer.truncation_side
            )
            if any(images):
                batch |= pixel_batch(self.image_processor, images)
        return BatchEncoding(batch)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Rows of a text and its images to a training batch: `data_collator=processor.collate`.

        What is learned of a row:

        - where it has an answer, the answer alone. It follows on the text as it is written, a space between them
          included, and the tokenizer's `eos_token` after it;
        - of a conversation (a list of messages in the text's place), what the assistant says; an answer is its last
          message. The tokenizer's chat template writes it;
        - of any other text all of it. One that is to end somewhere ends with the tokenizer's `eos_token`.

        Returns:
            A batch, padded on the right, with labels int64 (B, L): -100 at what isn't learned, padding and markers.

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
            if lesson.learned is not None:
                length = int(mask[index].sum())
                ignored[index, :length] |= ~learnt_tokens(self.tokenizer, lesson, length, **special)
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
        return write(self.tokenizer, self.media_token, conversation, answering)

    def _lesson(self, row: Mapping[str, Any], name: str) -> Lesson:
        text = column_of(row, self.text_column, name, "text_column")
        answer = None if self.answer_column is None else row.get(self.answer_column)
        if answer is not None and not (isinstance(answer, str) and answer.strip()):
            raise ValueError(f"{name}: column {self.answer_column!r} is empty or no string: {answer!r}.")
        if is_conversation(text):
            answers = [] if answer is None else [{"role": "assistant", "content": answer}]
            return chat_lesson(self.tokenizer, self.media_token, [*text, *answers], name, self.answer_column)
        if answer is None:
            return Lesson(text, None)
        end = self.tokenizer.eos_token or ""
        whole = f"{text}{answer.removesuffix(end)}{end}"
        return Lesson(whole, [(text, whole)])

    def decode(self, input_ids: Any, **kwargs: Any) -> str:
        """The text of one row of token ids."""
        return self.tokenizer.decode(input_ids, **kwargs)

    def batch_decode(self, input_ids: Any, **kwargs: Any) -> list[str]:
        """The texts of rows of token ids int64 (B, L).

        Args:
            input_ids: Token ids.
            kwargs: For the tokenizer, such as `skip_special_tokens=True`.
        """
        return self.tokenizer.batch_decode(input_ids, **kwargs)

    def save_pretrained(self, folder: Any, **kwargs: Any) -> None:
        """`interleaved_processor.json`, and folders of the tokenizer and the image processor."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder / self.TOKENIZER)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder / self.IMAGES)
        settings = {name: getattr(self, name) for name in self.SETTINGS}
        settings["images"] = self.image_processor is not None
        (folder / self.FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name_or_path: Any, **kwargs: Any) -> InterleavedProcessor:
        """Read what `save_pretrained` wrote, from a folder or the Hub (`revision`, `token`, `cache_dir`)."""
        file = cached_file(str(name_or_path), cls.FILE, **kwargs)
        assert file is not None  # a missing file raises
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, subfolder=cls.TOKENIZER, **kwargs)
        has_images, images = settings.pop("images"), None
        if has_images:
            images = AutoImageProcessor.from_pretrained(name_or_path, subfolder=cls.IMAGES, **kwargs)
        return cls(tokenizer, images, **settings)
