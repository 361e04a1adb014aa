"""Tiny models under the names of those in the documentation: the same architectures and kinds of tokenizer, random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as hf
from families import tiny

SIDE = 32  # pixels
NAMES = {  # English: Chinese
    "red apple": "红苹果",
    "green apple": "绿苹果",
    "green pear": "绿梨",
    "yellow lemon": "黄柠檬",
    "blue car": "蓝色汽车",
    "red car": "红色汽车",
    "black cat": "黑猫",
    "white dog": "白狗",
}
OTHER_WORDS = ("a photo of a", "what colour is it?", "this is", "fruit animal vehicle", "一个", "一张照片", "query:")
TEXTS = [*NAMES, *NAMES.values(), *OTHER_WORDS] * 3  # BPE merges what it reads more than once

IMAGE = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer(kind: type, size: int = 600, **settings: Any) -> Any:
    """A tokenizer of a kind that knows the words of `TEXTS`."""
    return kind().train_new_from_iterator(TEXTS, size, show_progress=False, **settings)


def special(tokens: Any) -> dict[str, int]:
    """A tokenizer's size and special tokens, as configs take them."""
    ids = {name: getattr(tokens, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"vocab_size": len(tokens), **{name: value for name, value in ids.items() if value is not None}}


def clip(folder: Path) -> None:
    tokens = tokenizer(hf.CLIPTokenizer, model_max_length=77)
    text = hf.CLIPTextConfig(hidden_size=32, intermediate_size=64, projection_dim=24, **LAYERS, **special(tokens))
    vision = hf.CLIPVisionConfig(hidden_size=48, intermediate_size=96, image_size=SIDE, patch_size=8, **LAYERS)
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    tiny(hf.CLIPModel, config)().save_pretrained(folder)
    images = hf.CLIPImageProcessorPil(**{**IMAGE, "size": {"shortest_edge": SIDE}}, crop_size=SIDE)
    hf.CLIPProcessor(images, tokens).save_pretrained(folder)


def e5(folder: Path) -> None:
    tokens = tokenizer(hf.XLMRobertaTokenizer, model_max_length=512)
    tiny(
        hf.BertModel, hf.BertConfig(hidden_size=28, intermediate_size=56, **LAYERS, **special(tokens))
    )().save_pretrained(folder)
    tokens.save_pretrained(folder)


def language_model(folder: Path) -> None:
    tokens = tokenizer(hf.GPT2Tokenizer)
    config = hf.LlamaConfig(hidden_size=32, intermediate_size=64, num_key_value_heads=2, **LAYERS, **special(tokens))
    tiny(hf.LlamaForCausalLM, config)().save_pretrained(folder)
    tokens.save_pretrained(folder)


def dinov2(folder: Path) -> None:
    config = hf.Dinov2Config(hidden_size=48, image_size=SIDE, patch_size=8, **LAYERS)
    tiny(hf.Dinov2Model, config)().save_pretrained(folder)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": SIDE}
    hf.BitImageProcessorPil(**{**IMAGE, **size}).save_pretrained(folder)


def blip(model_class: type, folder: Path) -> None:
    tokens = tokenizer(hf.BertTokenizer, model_max_length=512)
    ends = {
        "bos_token_id": tokens.cls_token_id,
        "eos_token_id": tokens.sep_token_id,
        "sep_token_id": tokens.sep_token_id,
    }
    text = hf.BlipTextConfig(
        hidden_size=32, intermediate_size=64, encoder_hidden_size=32, **LAYERS, **{**special(tokens), **ends}
    )
    vision = hf.BlipVisionConfig(hidden_size=32, intermediate_size=64, image_size=SIDE, patch_size=8, **LAYERS)
    config = hf.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=24)
    tiny(model_class, config)().save_pretrained(folder)
    hf.BlipProcessor(hf.BlipImageProcessorPil(**IMAGE), tokens).save_pretrained(folder)


def llava(folder: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, **LAYERS}
    vision = hf.CLIPVisionConfig(image_size=SIDE, patch_size=8, **{**sizes, "num_hidden_layers": 3})
    text = hf.LlamaConfig(num_key_value_heads=2, vocab_size=64, **sizes)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=60, image_seq_length=16)
    tiny(hf.LlavaForConditionalGeneration, config)().save_pretrained(folder)


MODELS: dict[str, Callable[[Path], None]] = {
    "openai/clip-vit-base-patch32": clip,
    "intfloat/multilingual-e5-small": e5,
    "HuggingFaceTB/SmolLM2-135M": language_model,
    "facebook/dinov2-small": dinov2,
    "Salesforce/blip-itm-base-coco": lambda folder: blip(hf.BlipForImageTextRetrieval, folder),
    "llava-hf/llava-1.5-7b-hf": llava,
    "Salesforce/blip-vqa-base": lambda folder: blip(hf.BlipForQuestionAnswering, folder),
}
