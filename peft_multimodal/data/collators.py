"""Rows of images and texts to the batches of dual encoders and of models that decode an answer."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.anatomy import base_model
from ..images import read_image
from ..rows import Row, check_some, column_of, each, ids_of
from ..text_limits import allowed_length, reads_padding, truncation
from .switches import changed


@dataclass
class ImageTextCollator:
    """Makes a batch of image-text pairs out of rows of an image and its caption.

    A call returns pixel_values `(B, 3, H, W)`, input_ids and attention_mask int64 `(B, L)`, and what else the
    processor gives; where asked for, return_loss and ids int64 `(B,)`. With `every_text` there are T texts, and
    text_rows int64 `(T,)` is the place in the batch of each text's image.

    Args:
        processor: A transformers processor of images and text.
        image_column: Column of images, in any form that `read_image` takes.
        text_column: Column of strings, or of lists of captions.
        return_loss: Put `return_loss=True` into the batch, without which `CLIPModel` and similar classes compute no
            loss. By default it is put where the forward of `model`, when given, names that argument.
        max_length: Longest text in tokens, special ones included; by default the smaller of the tokenizer's and the
            model's limit.
        model: Bare or in a `PeftModel`. It is asked what its forward takes, how long a text it reads, and whether it
            reads padding; it isn't kept.
        padding: As the processor's. By default True, or "max_length" where the model reads the padding behind a
            text. Such models (SigLIP) were trained on texts of one length; otherwise features depend on the batch.
        random_text: Draw one of several captions with torch's global generator (set `torch.manual_seed`), as for
            training; otherwise take the first.
        id_column: Column of integers or strings; rows of equal id match each other in the losses of
            `peft_multimodal.training`.
        id_name: The ids' name in the batch: "ids" for `ImageTextRetrievalTrainer`, "labels" for
            `contrastive_loss_func`.
        every_text: Take all captions of each row, for retrieval over a whole set. `return_loss` is left out.

    Raises:
        ValueError: a column is missing, an image can't be read, a text is empty, or return_loss was asked for and the
            forward takes none.
        TypeError: an image is nothing that `read_image` takes, a text is no string, or an id is neither integer nor
            string.

    Examples:
        >>> from transformers import AutoProcessor
        >>> collator = ImageTextCollator(AutoProcessor.from_pretrained("openai/clip-vit-base-patch32"), model=clip)
        >>> batch = collator([{"image": apple, "text": "a red apple"}, {"image": pear, "text": ["a green pear", "a pear"]}])
        >>> clip(**batch).loss
    """

    processor: Any
    image_column: str = "image"
    text_column: str = "text"
    return_loss: bool | None = None
    max_length: int | None = None
    model: Any = None
    padding: bool | str | None = None
    random_text: bool = True
    id_column: str | None = None
    id_name: str = "ids"
    every_text: bool = False

    def __post_init__(self) -> None:
        model, self.model = self.model, None  # not kept: collators are sent to the loader's workers
        self._unfitted = None if model is not None else {"max_length": self.max_length, "padding": self.padding}
        if model is not None:
            base = base_model(model)
            takes_it = "return_loss" in inspect.signature(base.forward).parameters
            if self.return_loss and not takes_it:
                raise ValueError(f"{type(base).__name__}.forward takes no return_loss.")
            self.return_loss = takes_it if self.return_loss is None else self.return_loss
        self.max_length = allowed_length(self.max_length, getattr(self.processor, "tokenizer", None), model)
        if self.padding is None:
            tokenizer = getattr(self.processor, "tokenizer", None)
            reads = model is not None and tokenizer is not None and reads_padding(model, tokenizer)
            self.padding = "max_length" if reads else True

    def fitted(self, model: Any) -> ImageTextCollator:
        """A copy that takes its limit and its padding from the model; this one, if it was told a model already."""
        if self._unfitted is None:
            return self
        copied = changed(self, **self._unfitted, model=model)
        ImageTextCollator.__post_init__(copied)
        return copied

    def without_loss(self, model: Any = None) -> ImageTextCollator:
        """A copy without `return_loss` unless it was asked for, fitted to the model where there is one."""
        copied = changed(self, return_loss=False) if self.return_loss is None else self
        return copied if model is None else copied.fitted(model)

    def evaluating(self, every_text: bool = False) -> ImageTextCollator:
        """A copy for evaluation, the same in each call: the first of several captions, or all of them."""
        return changed(self, random_text=False, every_text=every_text)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """A batch of rows; see the class."""
        which = "all" if self.every_text else "drawn" if self.random_text else "first"
        texts = _texts(rows, self.text_column, "text_column", which, self.id_column)
        images = _images(rows, self.image_column, self.id_column)
        batch = _process(
            self.processor, images, [text for of_row in texts for text in of_row], self.padding, self.max_length
        )
        if self.id_column is not None:
            batch[self.id_name] = ids_of(rows, self.id_column)
        if self.every_text:
            return batch | {"text_rows": torch.tensor([i for i, of_row in enumerate(texts) for _ in of_row])}
        if self.return_loss is None and "labels" not in batch:  # with which a function computes the loss
            warnings.warn(
                "ImageTextCollator wasn't told the model, so its batches have no return_loss: CLIPModel and similar classes "
                "then compute no loss, and Trainer stops at a model that 'did not return a loss'. Pass model=model; or "
                "return_loss=False, where the loss is computed by a function or a loop of yours.",
                stacklevel=2,
            )
            self.return_loss = False
        return batch | {"return_loss": True} if self.return_loss else batch


@dataclass
class QuestionAnswerCollator:
    """Makes a batch for models that decode an answer (`BlipForQuestionAnswering`) out of rows of an image, a
    question and it.

    A call returns pixel_values `(B, 3, H, W)`; input_ids and attention_mask int64 `(B, L)`; and int64 `(B, A)`
    decoder_input_ids, decoder_attention_mask, and labels, which are -100 where padded. The model shifts the labels
    itself.

    The decoder reads `[start] answer [sep] [pad]...` and predicts each next token up to [sep]. In two things
    transformers' own example trains another model than `generate` uses: its labels begin with [CLS] though
    `generate` starts from the decoder's start token, and padding counts in the loss. Passing -100 as labels alone
    fails, since the model embeds the labels when it gets no decoder_input_ids.

    BLIP's decoder in transformers 5.23 drops the mask of its cross-attention and so reads the questions' padding.
    Losses and answers then depend on the batch's longest question, unless it is always as long (`padding`). Trainer
    takes its mean loss for one already divided among accumulated batches. With gradient accumulation set
    `accepts_loss_kwargs = False` on the base model; otherwise steps are too large by the number of batches.

    Args:
        processor: A transformers processor of images and text.
        image_column: Column of images, in any form that `read_image` takes.
        question_column: Column of strings.
        answer_column: Column of strings, or of lists of human answers; None leaves the answers out, for `generate`.
        decoder_start_token_id: First decoder input. Required with answers, here or by `model`.
        model: Model whose `decoder_start_token_id` and limits are taken, bare or in a `PeftModel`; it isn't kept.
        max_length: Longest question in tokens; by default the smaller of the tokenizer's and the model's limit.
        padding: Of the questions, as the processor's; "max_length" makes every question as long.
        random_answer: Draw one of several answers with torch's global generator; otherwise take the first.
        max_answer_length: Longest answer in tokens, by the same default.

    Raises:
        ValueError: a column is missing, an image can't be read, a text is empty, or the start token is unknown.
        TypeError: an image is nothing that `read_image` takes, or a text is no string.

    Examples:
        >>> from transformers import AutoProcessor, BlipForQuestionAnswering
        >>> blip = BlipForQuestionAnswering.from_pretrained("Salesforce/blip-vqa-base")
        >>> collator = QuestionAnswerCollator(AutoProcessor.from_pretrained("Salesforce/blip-vqa-base"), model=blip)
        >>> blip(**collator([{"image": apple, "question": "what colour is it?", "answer": "red"}])).loss
    """

    processor: Any
    image_column: str = "image"
    question_column: str = "question"
    answer_column: str | None = "answer"
    decoder_start_token_id: int | None = None
    model: Any = None
    max_length: int | None = None
    padding: bool | str = True
    random_answer: bool = True
    max_answer_length: int | None = None

    def __post_init__(self) -> None:
        model, self.model = self.model, None
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = getattr(model, "decoder_start_token_id", None)
        if self.answer_column is not None and self.decoder_start_token_id is None:
            raise ValueError("Pass model=, or decoder_start_token_id= (BLIP: config.text_config.bos_token_id).")
        self.max_length = allowed_length(self.max_length, getattr(self.processor, "tokenizer", None), model)
        self.max_answer_length = allowed_length(self.max_answer_length, self.processor.tokenizer, model)

    def evaluating(self, every_text: bool = False) -> QuestionAnswerCollator:
        """A copy for evaluation, the same in each call: the first of several answers."""
        if every_text:
            raise ValueError("One answer is decoded at a time; vqa_accuracy compares it with all of a row's answers.")
        return changed(self, random_answer=False)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """A batch of rows; see the class."""
        images = _images(rows, self.image_column)
        questions = [text for (text,) in _texts(rows, self.question_column, "question_column", "first")]
        batch = _process(self.processor, images, questions, self.padding, self.max_length)
        if self.answer_column is not None:
            which = "drawn" if self.random_answer else "first"
            texts = [text for (text,) in _texts(rows, self.answer_column, "answer_column", which)]
            # padding_side: the start token must be each row's first.
            answers = self.processor.tokenizer(
                texts, padding=True, padding_side="right", return_tensors="pt", **truncation(self.max_answer_length)
            )
            decoder: Tensor = answers["input_ids"]
            decoder[:, 0] = self.decoder_start_token_id  # type: ignore[assignment]
            batch["decoder_input_ids"] = decoder
            batch["decoder_attention_mask"] = answers["attention_mask"]
            batch["labels"] = decoder.masked_fill(answers["attention_mask"] == 0, -100)
        return batch


def _process(processor: Any, images: list[Any], texts: list[str], padding: Any, length: int | None) -> dict[str, Any]:
    return dict(processor(images=images, text=texts, padding=padding, return_tensors="pt", **truncation(length)))


def _images(rows: Sequence[Row], column: str, id_column: str | None = None) -> list[Any]:
    def read(row: Row, name: str) -> Any:
        return read_image(column_of(row, column, name, "image_column"), f"{name}: column {column!r}")

    return each(rows, read, id_column)


def _texts(rows: Sequence[Row], column: str, setting: str, which: str, id_column: str | None = None) -> list[list[str]]:
    """The texts of each row: one "drawn", the "first", or "all" of them."""
    check_some(rows)

    def read(row: Row, name: str) -> list[str]:
        value = column_of(row, column, name, setting)
        texts = list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value]
        if not texts:
            raise ValueError(f"{name}: the list in column {column!r} is empty.")
        if which != "all":
            drawn = int(torch.randint(len(texts), ())) if which == "drawn" and len(texts) > 1 else 0
            texts = [texts[drawn]]
        return [_checked(text, column, name) for text in texts]

    return each(rows, read, id_column)


def _checked(text: Any, column: str, name: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{name}: column {column!r} holds {type(text).__name__}, not a string.")
    if not text.strip():
        raise ValueError(f"{name}: the text in column {column!r} is empty.")
    return text
