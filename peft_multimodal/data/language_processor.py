"""Texts of several languages, each by the tokenizer of its own."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, BatchEncoding
from transformers.utils import cached_file

from ..images import is_image, read_image
from ..languages import multilingual_tower
from ..rows import check_some
from ..text_limits import limit_of, longest_text, reads_padding, truncation


class LanguageProcessor:
    """Tokenises each text by the tokenizer of its language, for a model whose text tower reads several languages.

    A language is called as its adapter. The first one is that of the model's own text tower, English in general.

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

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import AutoTokenizer
        >>> config = CrossLingualAdapterConfig(encoder="intfloat/multilingual-e5-small")
        >>> model = get_peft_model(clip, config, adapter_name="zh")
        >>> english = AutoTokenizer.from_pretrained("openai/clip-vit-base-patch32")
        >>> processor = LanguageProcessor(en=english, zh=AutoTokenizer.from_pretrained("intfloat/multilingual-e5-small"))
        >>> model.get_text_features(**processor(["a red apple", "一个红苹果"], language=["en", "zh"])).pooler_output
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
        tower = multilingual_tower(model)
        read = {} if tower is None else tower.longest
        limits = {self.base: longest_text(model)} | {name: read.get(self._route(name)) for name in self.languages[1:]}
        self.limits = {name: longest for name, longest in limits.items() if longest is not None}
        pads = reads_padding(model, self.tokenizers[self.base]) if tower is None else tower.reads_padding
        if pads and not self._padding_is_given:
            self.padding = {self.base: "max_length"}

    @property
    def base(self) -> str:
        """The language of the model's own text tower."""
        return next(iter(self.tokenizers))

    @property
    def languages(self) -> list[str]:
        """Names of the languages, the model's own first."""
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
        tokens = tokenizer(list(text), padding=padding, padding_side="right", return_tensors="pt", **truncation(length))
        # A tokenizer that gives no mask belongs to a model that reads its padding.
        mask = tokens.get("attention_mask", torch.ones_like(tokens["input_ids"]))
        return {"input_ids": tokens["input_ids"], "attention_mask": mask}

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
                batch |= {**self.tokenize(texts, name), "adapter_names": [self._route(name)] * len(texts)}
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
        parts = {name: self.tokenize([texts[i] for i in of_name], name) for name, of_name in rows.items()}
        longest = max(part["input_ids"].shape[1] for part in parts.values())
        ids = torch.zeros(len(texts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for name, part in parts.items():
            width = part["input_ids"].shape[1]
            ids[rows[name], :width] = part["input_ids"]
            mask[rows[name], :width] = part["attention_mask"]
        return {"input_ids": ids, "attention_mask": mask, "adapter_names": [self._route(name) for name in languages]}

    def _route(self, language: str) -> str:
        return "__base__" if language == self.base else self.adapters.get(language, language)

    def batch_decode(self, input_ids: Any, language: str | None = None, **kwargs: Any) -> list[str]:
        """Texts of a language out of token ids int64 `(B, L)`.

        Args:
            input_ids: Token ids.
            language: By default the model's own.
            kwargs: For the tokenizer, such as `skip_special_tokens=True`.
        """
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
