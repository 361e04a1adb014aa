"""Collators and processors: dataset rows with images and text to the batches that vision-language models take.

They read the dataset's own columns, which `Trainer` would drop: `TrainingArguments(remove_unused_columns=False)`.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, BatchEncoding
from transformers.utils import cached_file

from ..core.anatomy import base_model
from ..images import is_image, read_image
from ..languages import multilingual_tower
from ..rows import Row, check_some, column_of, each, ids_of, naming
from ..text_limits import allowed_length, limit_of, longest_text, reads_padding, truncation


@dataclass
class ImageTextCollator:
    """Rows of an image and its caption to a batch of pairs.

    Args:
        processor: A transformers processor of images and text.
        image_column: Column of images, in any form that `read_image` takes.
        text_column: Column of strings, or of lists of captions.
        return_loss: Put `return_loss=True` into the batch, without which `CLIPModel` and its like compute no loss. By
            default it is put where the forward of `model`, when given, names that argument.
        max_length: Longest text in tokens, special ones included; by default the smaller of the tokenizer's and the
            model's limit.
        model: Bare or in a `PeftModel`. It is asked what its forward takes, how long a text it reads, and whether it
            reads padding; it isn't kept.
        padding: As the processor's. By default True, or "max_length" where the model reads the padding behind a text:
            such models (SigLIP) were trained on texts of one length, and else features depend on the batch.
        random_text: Draw one of several captions with torch's global generator (set `torch.manual_seed`), as for
            training; else take the first.
        every_text: Take all captions of each row, for retrieval over a whole set. `return_loss` is left out.
        id_column: Column of integers or strings; rows of equal id match each other in the losses of
            `peft_multimodal.training`.
        id_name: The ids' name in the batch: "ids" for `ImageTextRetrievalTrainer`, "labels" for
            `contrastive_loss_func`.

    Returns (of a call):
        pixel_values `(B, 3, H, W)`, input_ids and attention_mask int64 `(B, L)`, what else the processor gives;
        return_loss and ids int64 `(B,)` where asked for. With every_text there are T texts, and text_rows int64 `(T,)`
        is the place in the batch of each text's image.

    Raises:
        ValueError: A column is missing, an image can't be read, a text is empty, or return_loss was asked for and the forward takes none.
        TypeError: An image is nothing that `read_image` takes, a text no string, or an id neither integer nor string.
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
        copied = _changed(self, **self._unfitted, model=model)
        ImageTextCollator.__post_init__(copied)
        return copied

    def evaluating(self, every_text: bool = False) -> ImageTextCollator:
        """A copy for evaluation, the same in each call: the first of several captions, or all of them."""
        return _changed(self, random_text=False, every_text=every_text)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        which = "all" if self.every_text else "drawn" if self.random_text else "first"
        texts = _texts(rows, self.text_column, "text_column", which, self.id_column)
        images = _images(rows, self.image_column, self.id_column)
        batch = _process(
            self.processor, images, [text for found in texts for text in found], self.padding, self.max_length
        )
        if self.id_column is not None:
            batch[self.id_name] = ids_of(rows, self.id_column)
        if self.every_text:
            return batch | {"text_rows": torch.tensor([i for i, found in enumerate(texts) for _ in found])}
        if self.return_loss is None and "labels" not in batch:  # with which a function computes the loss
            warnings.warn(
                "ImageTextCollator wasn't told the model, so its batches have no return_loss: CLIPModel and its like then "
                "compute no loss, and Trainer stops at a model that 'did not return a loss'. Pass model=model; or "
                "return_loss=False, where the loss is computed by a function or a loop of yours.",
                stacklevel=2,
            )
            self.return_loss = False
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
        model: Model whose `decoder_start_token_id` and limits are taken, bare or in a `PeftModel`; it isn't kept.
        max_length: Longest question in tokens; by default the smaller of the tokenizer's and the model's limit.
        max_answer_length: Longest answer in tokens, by the same default.
        padding: Of the questions, as the processor's; "max_length" makes every question as long.
        random_answer: Draw one of several answers with torch's global generator; else take the first.

    Returns (of a call):
        pixel_values `(B, 3, H, W)`; input_ids, attention_mask int64 `(B, L)`; and int64 `(B, A)` decoder_input_ids,
        decoder_attention_mask, and labels, which are -100 where padded. The model shifts the labels itself.

    Raises:
        ValueError: A column is missing, an image can't be read, a text is empty, or the start token is unknown.
        TypeError: An image is nothing that `read_image` takes, or a text no string.
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
        return _changed(self, random_answer=False)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
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


class FiniteBatches:
    """A collator that refuses NaN and infinite values and names their samples, before a step is spoilt by them.

    Training stops with the error; the last checkpoint is as it was. The package's trainers put it around any collator.

        >>> Trainer(model, args, data_collator=FiniteBatches(collator, "id"), train_dataset=rows)

    Args:
        collator: Any.
        id_column: Column by which samples are named; where a row has none, by its place in the batch.
    """

    def __init__(self, collator: Any, id_column: str = "id") -> None:
        self.collator, self.id_column = collator, id_column

    def evaluating(self, every_text: bool = False) -> FiniteBatches:
        """This around the collator's copy for evaluation."""
        return _changed(self, collator=evaluating(self.collator, every_text))

    def __call__(self, rows: Sequence[Row]) -> Any:
        """The collator's batch.

        Raises:
            ValueError: a tensor or array in it, masks aside, holds NaN or infinite values.
        """
        names = [row.get(self.id_column) if isinstance(row, Mapping) else None for row in rows]  # a collator may pop
        with naming(rows, self.id_column):
            batch = self.collator(rows)
        for field, value in _floats(batch):
            if not bool(value.isfinite().all()):
                raise ValueError(
                    f"{field!r} holds NaN or infinite values{_whose(value, names)}. Repair or leave them out."
                )
        return batch


def evaluating(collator: Any, every_text: bool = False) -> Any:
    """A collator as evaluation uses it: of several texts in a row the first, or with every_text all of them.

    The result is the same in each call. A collator that has no such switch is given back as it is.
    """
    switch = getattr(collator, "evaluating", None)
    return collator if switch is None else switch(every_text=every_text)


def without_loss(collator: Any, model: Any = None) -> Any:
    """A collator for callers that compute the loss themselves: one that wasn't told the model puts no `return_loss`.

    Given the model, it takes its limit and its padding from there.
    """
    if isinstance(collator, FiniteBatches):
        return _changed(collator, collator=without_loss(collator.collator, model))
    collator = _changed(collator, return_loss=False) if getattr(collator, "return_loss", False) is None else collator
    return collator.fitted(model) if isinstance(collator, ImageTextCollator) and model is not None else collator


def _changed(collator: Any, /, **values: Any) -> Any:
    changed = copy.copy(collator)
    vars(changed).update(values)
    return changed


def _floats(value: Any, field: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors and arrays of a batch, however deep, but for masks; each with its place ("frames.0")."""
    if isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            if "mask" not in str(key):
                yield from _floats(inner, f"{field}.{key}" if field else str(key))
    elif isinstance(value, Tensor) and value.is_floating_point():
        yield field or "the batch", value
    elif isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating):
        yield field or "the batch", torch.from_numpy(value.astype(np.float64))


def _whose(value: Tensor, names: list[Any]) -> str:
    if value.ndim == 0 or len(value) != len(names):
        return f", in a batch of the samples {names}"
    bad = [i for i, row in enumerate(value) if not bool(row.isfinite().all())]
    named = [f"{names[i]!r}" if names[i] is not None else f"row {i} of the batch" for i in bad]
    return f" in {len(named)} of {len(names)} samples: " + ", ".join(named[:10]) + (", ..." if len(named) > 10 else "")


class LanguageProcessor:
    """Tokenises each text by the tokenizer of its language, for a model with [`CrossLingualAdapterModel`]'s adapters.

    A language is called as its adapter. The first one is that of the model's own text tower, English in general.

        >>> processor = LanguageProcessor(en=clip_tokenizer, zh=zh_tokenizer)
        >>> model.get_text_features(**processor(["一个红苹果"], language="zh"))  # with the adapter zh active
        >>> model.get_text_features(**processor(["a red apple", "一个红苹果"], language=["en", "zh"]))

    Args:
        image_processor: For `images=`.
        padding: As tokenizers take it, for all languages or as {language: padding}. A tower that was trained on padded
            texts (SigLIP) needs "max_length" for its language; that is the default for a `model` that reads its padding.
        max_length: Longest text in tokens, for all or by language; by default the smaller of the tokenizer's and the
            model's limit.
        model: With the languages' adapters; see `fitted`. It isn't kept.
        adapters: {language: its adapter in the model}, for languages that aren't called as their adapters.
        tokenizers: `language=tokenizer`, the model's own language first.

    Raises:
        ValueError: there is no tokenizer, or a language's name is no name (letters, digits, - and _).
    """

    FILE = "language_processor.json"
    TOKENIZERS = "tokenizers"

    def __init__(
        self,
        *,
        image_processor: Any = None,
        padding: bool | str | dict[str, bool | str] | None = None,
        max_length: int | dict[str, int] | None = None,
        model: Any = None,
        adapters: Mapping[str, str] | None = None,
        **tokenizers: Any,
    ) -> None:
        if not tokenizers:
            raise ValueError("LanguageProcessor needs tokenizers: LanguageProcessor(en=..., zh=...).")
        for name in tokenizers:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"{name!r} is no name of a language: letters, digits, - and _ only.")
        self.tokenizers = tokenizers
        self.image_processor = image_processor
        self.padding: Any = True if padding is None else padding
        self.max_length = max_length
        self.limits: dict[str, int] = {}  # by language, of the model
        self.adapters = dict(adapters or {})
        self._padding_is_given = padding is not None
        if model is not None:
            self._fit(model)

    def fitted(self, model: Any, adapters: Mapping[str, str] | None = None) -> LanguageProcessor:
        """A copy that cuts each language's texts to what the model reads, and pads where its text tower reads padding.

        What was given as `max_length` or `padding` stays. `CrossLingualTrainer` takes such a copy.

        Args:
            adapters: More of the argument of this name.
        """
        made = copy.copy(self)
        made.adapters = {**self.adapters, **(adapters or {})}
        made._fit(model)
        return made

    def _fit(self, model: Any) -> None:
        part = multilingual_tower(model)
        read = {} if part is None else part.longest
        found = {self.base: longest_text(model)} | {name: read.get(self._route(name)) for name in self.languages[1:]}
        self.limits = {name: longest for name, longest in found.items() if longest is not None}
        pads = reads_padding(model, self.tokenizers[self.base]) if part is None else part.reads_padding
        if pads and not self._padding_is_given:
            self.padding = {self.base: "max_length"}

    @property
    def base(self) -> str:
        """The language of the model's own text tower."""
        return next(iter(self.tokenizers))

    @property
    def languages(self) -> list[str]:
        return list(self.tokenizers)

    def tokenizer(self, language: str) -> Any:
        """The tokenizer of a language; ValueError names those that there are."""
        if language not in self.tokenizers:
            raise ValueError(f"There is no tokenizer for {language!r}, but for {self.languages}.")
        return self.tokenizers[language]

    def tokenize(self, text: Sequence[str], language: str) -> dict[str, Tensor]:
        """input_ids and attention_mask int64 `(B, L)` of texts of one language."""
        check_some(text)
        tokenizer = self.tokenizer(language)
        length = self.max_length.get(language) if isinstance(self.max_length, dict) else self.max_length
        padding = self.padding.get(language, True) if isinstance(self.padding, dict) else self.padding
        if empty := [i for i, t in enumerate(text) if not (isinstance(t, str) and t.strip())]:
            raise ValueError(f"Text {empty[0]} is empty or no string: {text[empty[0]]!r}.")
        length = limit_of(tokenizer, self.limits.get(language)) if length is None else length
        found = tokenizer(list(text), padding=padding, padding_side="right", return_tensors="pt", **truncation(length))
        # A tokenizer that gives no mask belongs to a model that reads its padding.
        mask = found.get("attention_mask", torch.ones_like(found["input_ids"]))
        return {"input_ids": found["input_ids"], "attention_mask": mask}

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        language: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        """A batch for the model.

        Args:
            text: A text or a list of them.
            images: One or several, as `read_image` takes them, for the image processor, with `kwargs`.
            language: Of all texts, or of each; by default the model's own.

        Returns:
            input_ids and attention_mask int64 `(B, L)`, and adapter_names, a list of B names that sends each row through
            its language, whatever adapter is active; pixel_values where there are images.
        """
        batch: dict[str, Any] = {}
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            if language is None or isinstance(language, str):
                name = language or self.base
                batch |= {**self.tokenize(texts, name), "adapter_names": self._routes([name] * len(texts))}
            else:
                batch |= self._mixed(texts, list(language))
        if images is not None:
            if self.image_processor is None:
                raise ValueError("This LanguageProcessor has no image_processor.")
            images = [images] if is_image(images) else images
            read = [read_image(image, f"Image {i}") for i, image in enumerate(images)]
            batch |= self.image_processor(read, **{"return_tensors": "pt", **kwargs})
        return BatchEncoding(batch)

    def _mixed(self, texts: list[str], languages: list[str]) -> dict[str, Any]:
        if len(languages) != len(texts):
            raise ValueError(f"{len(languages)} languages for {len(texts)} texts.")
        check_some(texts)
        rows = {name: [i for i, n in enumerate(languages) if n == name] for name in dict.fromkeys(languages)}
        parts = {name: self.tokenize([texts[i] for i in found], name) for name, found in rows.items()}
        longest = max(part["input_ids"].shape[1] for part in parts.values())
        ids = torch.zeros(len(texts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for name, part in parts.items():
            width = part["input_ids"].shape[1]
            ids[rows[name], :width] = part["input_ids"]
            mask[rows[name], :width] = part["attention_mask"]
        return {"input_ids": ids, "attention_mask": mask, "adapter_names": self._routes(languages)}

    def _routes(self, languages: list[str]) -> list[str]:
        return [self._route(name) for name in languages]

    def _route(self, language: str) -> str:
        return "__base__" if language == self.base else self.adapters.get(language, language)

    def batch_decode(self, input_ids: Any, language: str | None = None, **kwargs: Any) -> list[str]:
        return self.tokenizer(language or self.base).batch_decode(input_ids, **kwargs)

    def save_pretrained(self, folder: Any, **kwargs: Any) -> None:
        """`language_processor.json`, and a folder a language in `tokenizers` (an adapter's folder bears its name)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, tokenizer in self.tokenizers.items():
            tokenizer.save_pretrained(folder / self.TOKENIZERS / name)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder / "image_processor")
        settings = {
            "languages": self.languages,
            "padding": self.padding,
            "max_length": self.max_length,
            "limits": self.limits,
            "adapters": self.adapters,
            "images": self.image_processor is not None,
        }
        (folder / self.FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name_or_path: Any, **kwargs: Any) -> LanguageProcessor:
        """Read what `save_pretrained` wrote, from a folder or the Hub (`revision`, `token`, `cache_dir`)."""
        file = cached_file(str(name_or_path), cls.FILE, **kwargs)
        assert file is not None  # a missing file raises
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
        languages = settings["languages"]
        names: dict[str, Any] = dict.fromkeys(languages)
        cls(**names)  # refuses a name that is a path
        read: dict[str, Any] = {
            name: AutoTokenizer.from_pretrained(name_or_path, subfolder=f"{cls.TOKENIZERS}/{name}", **kwargs)
            for name in languages
        }
        images = None
        if settings["images"]:
            images = AutoImageProcessor.from_pretrained(name_or_path, subfolder="image_processor", **kwargs)
        options: dict[str, Any] = {"padding": settings["padding"], "max_length": settings["max_length"]}
        made = cls(image_processor=images, adapters=settings.get("adapters"), **options, **read)
        made.limits = settings.get("limits", {})
        return made


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
        found = column_of(row, column, name, setting)
        texts = list(found) if isinstance(found, (list, tuple, np.ndarray)) else [found]
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
