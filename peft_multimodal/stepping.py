"""A step with a model and an adapter from folders, on a batch that is made up: `doctor MODEL ADAPTER --step`."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .core.anatomy import base_model, media_tokens
from .files.saving import load
from .training.check import check_training
from .training.check_report import TrainingReport

_TEXTS = ("a red square", "two blue circles on a table")
_IMAGE = (64, 64)


def take_step(model: str | Path, adapter: str | Path, **kwargs: Any) -> TrainingReport:
    """`check_training` of a model and an adapter for it, with noise for images and two short texts.

    Args:
        model: A folder or Hub id with weights and a processor or a tokenizer.
        adapter: A folder or Hub id.
        kwargs: Of the adapter: revision, subfolder, token.
    """
    report = TrainingReport()
    try:
        wrapped = load(_built(str(model)), adapter, is_trainable=True, **kwargs)
        batch = made_up_batch(wrapped, _processor(str(model)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return check_training(wrapped, batch)
    except (ValueError, OSError, TypeError) as error:
        report.problem(
            f"No step can be taken: {' '.join(str(error).split())}",
            "With a batch and a loss of your own: peft_multimodal.check_training(model, batch, loss=...).",
        )
        return report


def made_up_batch(model: nn.Module, processor: Any) -> dict[str, Any]:
    """Two rows of noise and text, with labels, or with `return_loss` where the model's forward takes it.

    Args:
        processor: A processor of images and text, or a tokenizer for a model that reads text alone.
    """
    texts, images = list(_TEXTS), None
    if hasattr(processor, "image_processor"):
        from PIL import Image

        noise = torch.randint(256, (len(texts), *_IMAGE, 3), generator=torch.Generator().manual_seed(0))
        images = [Image.fromarray(image.to(torch.uint8).numpy()) for image in noise]
        texts = [_beside_an_image(text, processor, model) for text in texts]
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    given = {} if images is None else {"images": images}
    batch = dict(processor(text=texts, padding=True, return_tensors="pt", **given))
    if "return_loss" in inspect.signature(base_model(model).forward).parameters:
        return {**batch, "return_loss": True}
    labels: Tensor = batch["input_ids"].clone()
    mask = batch.get("attention_mask", torch.ones_like(labels))
    return {**batch, "labels": labels.masked_fill(mask == 0, -100)}


def _beside_an_image(text: str, processor: Any, model: nn.Module) -> str:
    """A text with the place of its image, as the processor writes it."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    token = getattr(processor, "image_token", None)
    return f"{token} {text}" if isinstance(token, str) and media_tokens(base_model(model)) else text


def _built(name: str) -> Any:
    """The model with its weights, of the class that its config names."""
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    named = (config.architectures or [""])[0]
    found = getattr(transformers, named, None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return (found if is_model else transformers.AutoModel).from_pretrained(name, trust_remote_code=False)  # type: ignore[union-attr]


def _processor(name: str) -> Any:
    return transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)
