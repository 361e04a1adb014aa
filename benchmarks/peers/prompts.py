"""Classifiers whose texts go through the text tower: CoCoOp, and a template for LoRA to train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from peft_multimodal.core.anatomy import token_embeddings
from peft_multimodal.methods.structured_prompt.dual_encoder import scaled
from peft_multimodal.methods.structured_prompt.pieces import Texts, join
from peft_multimodal.methods.structured_prompt.reader import PromptReader


class TemplateClassifier(nn.Module):
    """The zero-shot classifier as a module that trains: logits = exp(s) v(x) . f_t("a photo of a {name}").

    CLIP-LoRA (Zanella and Ben Ayed 2024, arXiv 2405.18541) puts LoRA on the towers of this.
    """

    def __init__(self, model: Any, tokenizer: Any, template: str = "a photo of a {}") -> None:
        super().__init__()
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.texts: dict[str, Tensor] = {}

    def set_classes(self, names: Sequence[str]) -> None:
        texts = [self.template.format(name) for name in names]
        self.texts = dict(self.tokenizer(texts, padding=True, return_tensors="pt"))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        v = F.normalize(
            self.model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output, dim=-1
        )
        w = F.normalize(self.model.get_text_features(**self.texts, return_dict=True).pooler_output, dim=-1)
        return outcome(scaled(self.model, v @ w.T), labels)


class CoCoOp(nn.Module):
    """The context of class c's prompt for image x is v_m + pi(v(x)): one token for the image, added to all.

    Zhou et al. 2022, arXiv 2203.05557: M = 4 tokens that start from "a photo of a", pi = Linear e -> e/16, ReLU,
    Linear -> d_t. Its own code pads every text to the tower's length and goes through the images one by one: `padded`.
    The towers are to be frozen by the caller.
    """

    def __init__(self, model: Any, tokenizer: Any, words: str = "a photo of a", padded: bool = False) -> None:
        super().__init__()
        path = next(p for p in token_embeddings(model) if p.startswith("text_model"))
        embedding = model.get_submodule(path)
        self.model, self.tokenizer, self.padded = model, tokenizer, padded
        self.reader = PromptReader(model, model.text_model, embedding)
        embedding.register_forward_hook(self.reader.replace)
        self.reader.measure(tokenizer)
        self.reader.attention.give_back()  # CoCoOp reads each prompt as a whole
        ids = self.reader.tokenizer_frame().words(tokenizer, [words])[0]
        self.context = nn.Parameter(self.reader.tokens(ids).embeds[0].detach().clone())  # (M, d_t)
        width = self.features_width()
        self.meta = nn.Sequential(
            nn.Linear(width, width // 16), nn.ReLU(), nn.Linear(width // 16, self.context.shape[1])
        )
        self.texts: Texts | None = None

    def features_width(self) -> int:
        """e."""
        with torch.no_grad():
            ids = torch.ones(1, 2, dtype=torch.long)
            return self.model.get_text_features(input_ids=ids, return_dict=True).pooler_output.shape[-1]

    def set_classes(self, names: Sequence[str]) -> None:
        frame = self.reader.tokenizer_frame()
        self.texts = Texts.of_lists(frame.words(self.tokenizer, names), frame.pad, self.context.device)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        v = F.normalize(
            self.model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output, dim=-1
        )
        contexts = self.context + self.meta(v)[:, None]  # (B, M, d_t)
        if self.padded:
            w = torch.stack([self.features(context[None]) for context in contexts])[:, 0]
        else:
            w = self.features(contexts)
        return outcome(scaled(self.model, (w @ v[..., None])[..., 0]), labels)

    def features(self, contexts: Tensor) -> Tensor:
        """(B, C, e) for contexts (B, M, d_t)."""
        assert self.texts is not None
        classes, reader = len(self.texts), self.reader
        context, names = (
            reader.vectors(contexts).repeat_each(classes),
            reader.tokens(self.texts.ids, self.texts.mask).repeat_all(len(contexts)),
        )
        text = join(reader.lead(), context, names, reader.tail())
        if self.padded:
            text = reader.filled(text, reader.longest or 0)
        return reader.features(text).unflatten(0, (len(contexts), classes))


def outcome(logits: Tensor, labels: Tensor | None) -> ImageClassifierOutput:
    """What `Trainer` takes."""
    return ImageClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)
