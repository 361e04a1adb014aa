"""Collators: dataset rows with PIL images and text to the batches that vision-language models take.

They read the dataset's own columns, which `Trainer` would drop: `TrainingArguments(remove_unused_columns=False)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

Row = Mapping[str, Any]


@dataclass
class ImageTextCollator:
    """Rows of an image and its caption to a batch of pairs.

    Args:
        processor: A transformers processor of images and text.
        image_column: Column of PIL images, of any mode; they are converted to RGB (alpha is dropped, not blended).
        text_column: Column of strings, or of lists of captions.
        return_loss: Put `return_loss=True` into the batch, without which `CLIPModel` and its like compute no loss. By
            default it is put where the forward of `model`, when given, names that argument.
        max_length: Longest text in tokens, special ones included; by default the tokenizer's own limit.
        model: Bare or in a `PeftModel`; only its forward's signature is read.
        padding: As the processor's; SigLIP was trained with "max_length".
        random_text: Draw one of several captions with torch's global generator (set `torch.manual_seed`); else take
            the first, as for evaluation.
        id_column: Column of integers; rows of equal id match each other in the losses of `peft_multimodal.training`.
        id_name: The ids' name in the batch: "ids" for `ImageTextRetrievalTrainer`, "labels" for
            `contrastive_loss_func`.

    Returns (of a call):
        pixel_values `(B, 3, H, W)`, input_ids and attention_mask int64 `(B, L)`, what else the processor gives;
        return_loss and ids int64 `(B,)` where asked for.

    Raises:
        ValueError: A column is missing, a text is empty, or return_loss was asked for and the forward takes none.
        TypeError: An image is no PIL image, a text no string, or an id no integer.
    """

    processor: Any
    image_column: str = "image"
    text_column: str = "text"
    return_loss: bool | None = None
    max_length: int | None = None
    model: Any = None
    padding: bool | str = True
    random_text: bool = True
    id_column: str | None = None
    id_name: str = "ids"

    def __post_init__(self) -> None:
        model, self.model = self.model, None  # not kept: collators are sent to the loader's workers
        if model is not None:
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            takes_it = "return_loss" in inspect.signature(base.forward).parameters
            if self.return_loss and not takes_it:
                raise ValueError(f"{type(base).__name__}.forward takes no return_loss.")
            self.return_loss = takes_it if self.return_loss is None else self.return_loss

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        batch = _process(
            self.processor,
            [_image(row, self.image_column, i) for i, row in enumerate(rows)],
            [_text(row, self.text_column, i, self.random_text) for i, row in enumerate(rows)],
            self.padding,
            self.max_length,
        )
        if self.id_column is not None:
            ids = [_column(row, self.id_column, i) for i, row in enumerate(rows)]
            if not all(isinstance(i, int) for i in ids):
                raise TypeError(f"Column {self.id_column!r} holds {ids[:3]}..., not integers.")
            batch[self.id_name] = torch.tensor(ids, dtype=torch.long)
        return batch | {"return_loss": True} if self.return_loss else batch


@dataclass
class QuestionAnswerCollator:
    """Rows of an image, a question and its answer to a batch for models that decode it: `BlipForQuestionAnswering`.

    The decoder reads `[start] answer [sep] [pad]...` and predicts each next token up to [sep]. Two things in which
    transformers' own example trains another model than `generate` uses: its labels begin with [CLS] though `generate`
    starts from the decoder's start token, and padding counts in the loss. Passing -100 as labels alone fails, since the
    model embeds the labels when it gets no decoder_input_ids.

    BLIP's decoder in transformers 5.23 drops the mask of its cross-attention and so reads the questions' padding:
    losses and answers then depend on the batch's longest question, unless it is always as long (`padding`).
    Trainer takes its mean loss for one already divided among accumulated batches: with gradient accumulation set
    `accepts_loss_kwargs = False` on the base model, else steps are too large by the number of batches.

    Args:
        processor: A transformers processor of images and text.
        answer_column: Column of strings, or of lists of human answers; None leaves the answers out, for `generate`.
        decoder_start_token_id: First decoder input. Required with answers, here or by `model`.
        model: Model whose `decoder_start_token_id` is taken, bare or in a `PeftModel`.
        max_length: Longest question in tokens; by default the tokenizer's own limit.
        padding: Of the questions, as the processor's; "max_length" makes every question as long.
        random_answer: Draw one of several answers with torch's global generator; else take the first.

    Returns (of a call):
        pixel_values `(B, 3, H, W)`; input_ids, attention_mask int64 `(B, L)`; and int64 `(B, A)` decoder_input_ids,
        decoder_attention_mask, and labels, which are -100 where padded. The model shifts the labels itself.

    Raises:
        ValueError: A column is missing, a text is empty, or the start token is unknown.
        TypeError: An image is no PIL image, or a text no string.
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

    def __post_init__(self) -> None:
        model, self.model = self.model, None
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = getattr(model, "decoder_start_token_id", None)
        if self.answer_column is not None and self.decoder_start_token_id is None:
            raise ValueError("Pass model=, or decoder_start_token_id= (BLIP: config.text_config.bos_token_id).")

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        images = [_image(row, self.image_column, i) for i, row in enumerate(rows)]
        questions = [_text(row, self.question_column, i, False) for i, row in enumerate(rows)]
        batch = _process(self.processor, images, questions, self.padding, self.max_length)
        if self.answer_column is not None:
            texts = [_text(row, self.answer_column, i, self.random_answer) for i, row in enumerate(rows)]
            # padding_side: the start token must be each row's first.
            answers = self.processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
            decoder: Tensor = answers["input_ids"]
            decoder[:, 0] = self.decoder_start_token_id  # type: ignore[assignment]
            batch["decoder_input_ids"] = decoder
            batch["decoder_attention_mask"] = answers["attention_mask"]
            batch["labels"] = decoder.masked_fill(answers["attention_mask"] == 0, -100)
        return batch


def _process(processor: Any, images: list[Any], texts: list[str], padding: Any, length: int | None) -> dict[str, Any]:
    return dict(
        processor(images=images, text=texts, padding=padding, truncation=True, max_length=length, return_tensors="pt")
    )


def _column(row: Row, column: str, index: int) -> Any:
    if column not in row:
        raise ValueError(
            f"Row {index} of the batch has no column {column!r} but {sorted(row)}. Under Trainer set "
            "remove_unused_columns=False: it drops the columns that the model's forward doesn't name."
        )
    return row[column]


def _image(row: Row, column: str, index: int) -> Image.Image:
    image = _column(row, column, index)
    if not isinstance(image, Image.Image):
        raise TypeError(f"Row {index}: column {column!r} holds {type(image).__name__}, not a PIL image.")
    return image.convert("RGB")


def _text(row: Row, column: str, index: int, random: bool) -> str:
    text = _column(row, column, index)
    if isinstance(text, (list, tuple)):
        if not text:
            raise ValueError(f"Row {index}: the list in column {column!r} is empty.")
        text = text[int(torch.randint(len(text), ())) if random and len(text) > 1 else 0]
    if not isinstance(text, str):
        raise TypeError(f"Row {index}: column {column!r} holds {type(text).__name__}, not a string.")
    if not text.strip():
        raise ValueError(f"Row {index}: the text in column {column!r} is empty.")
    return text
