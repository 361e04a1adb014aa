"""Every vision-language class in transformers' auto mappings, shrunk and called without knowing its name.

`auto_cases()` lists the classes. A case is lazy: `build()` shrinks the default config by the names and values of its
fields and gives the model, `inputs(model)` tries calls that the signature of `forward` suggests until one works and
its output depends on the image. Both raise `Unsupported`, with the reason, where that can't be done generically.

    python tests/auto_families.py           # prints what works and why the rest doesn't
    python tests/auto_families.py qwen3     # only the classes whose name contains this
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from families import wake, without_dropout
from torch import Tensor
from transformers.models.auto import modeling_auto

MAPPINGS = (
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "VISUAL_QUESTION_ANSWERING",
    "DOCUMENT_QUESTION_ANSWERING",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "RETRIEVAL",
)
# Classes of vision-language models that these mappings miss.
MORE = (
    "BlipForImageTextRetrieval",
    "BridgeTowerForImageAndTextRetrieval",
    "FlavaModel",
    "GroupViTModel",
    "LxmertModel",
    "ViltForImageAndTextRetrieval",
    "VisualBertModel",
    "XCLIPModel",
)

MAX_PARAMETERS = 20_000_000
VOCAB, WIDTH, HEADS, LAYERS = 128, 64, 2, 2
SIZE, PATCH = 32, 8
GRID = SIZE // PATCH
ROWS = 2
WORDS = torch.tensor([[9, 10, 11, 12, 13, 14], [15, 16, 17, 18, 19, 20]])


class Unsupported(Exception):
    """Why a class can't be built or called here."""


# ----------------------------------------------------------------------------------------------------------- configs

# The first pattern found in a field's name decides; only larger values are replaced, and `layers` is handled apart.
SMALLER = {
    r"vocab|num_embeddings$|codebook_size": VOCAB,
    r"(key_value|kv)_heads": HEADS // 2,
    r"head_dim$|^d_kv$|dim_head": WIDTH // HEADS,
    r"heads$": HEADS,
    r"_group$|^n_groups?$": 1,
    r"per_tok$|topk|^moe_k$": 2,
    r"experts$": 4,
    r"layers$|depth$|num_blocks$": LAYERS,
    r"tokens_per_image|num_image_tokens|image_seq_length|query_num|num_quer": 4,
    r"^(image|img|crop|max_image|max_img|input)_size$|^resolution$": SIZE,
    r"^patch_sizes?$": PATCH,
    r"position|max_text_len": 256,
    r"window_size$": 2 * PATCH,
    r"^coordinate_size$": 12,  # 4 coordinates and 2 shapes make a width
    r"^shape_size$": 8,
    r"^patch_embed_hidden_size$|^patch_dim$": 3 * PATCH**2,
    r"^video_patch_dim$": 6 * PATCH**2,
    r"^vision_output_dim$": 2 * WIDTH,  # the last layer and one intermediate layer
    r"rank$": WIDTH // 2,
    r"^(moe_)?intermediate_size$|ffn_dim$|^d_ff$|^mlp_dim$|^mlp_hidden_size$": 2 * WIDTH,  # an FFN is known by widening
    r"(size|dim|width|hidden|channels|d_model|d_ff|n_embd|mult|_in|_out)$": WIDTH,
}
LAYER_COUNT = ("num_hidden_layers", "depth", "num_layers", "n_layers", "layers", "encoder_layers")
TOKEN = re.compile(r"(_token_ids?|_token_index|_id|_ids)$")


def shrink(config: hf.PreTrainedConfig, tokens: dict[int, int]) -> hf.PreTrainedConfig:
    """Make a config and its sub-configs tiny, in place. `tokens`: special token -> its new place in the vocabulary."""
    fields = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    layers = next((fields[k] for k in LAYER_COUNT if isinstance(fields.get(k), int)), 0)
    kv_heads = fields.get("num_key_value_heads")
    shared = kv_heads is not None and kv_heads < fields.get("num_attention_heads", 0)
    for name, value in fields.items():
        if isinstance(value, hf.PreTrainedConfig):
            shrink(value, tokens)
        elif name in ("id2label", "label2id", "dtype"):
            continue
        elif name == "rope_parameters" and "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
            # The sections split the rotated half of each head; their default is in the code, not in the config.
            half = int(WIDTH // HEADS * (value or {}).get("partial_rotary_factor", 1)) // 2
            third = half // 3
            config.rope_parameters = {**(value or {}), "mrope_section": [half - 2 * third, third, third]}
        elif name == "num_key_value_heads" and not shared:
            config.num_key_value_heads = None if value is None else HEADS
        else:
            smaller = shrunk(name, value, layers, tokens)
            if smaller != value:
                setattr(config, name, smaller)
    return config


def shrunk(name: str, value: Any, layers: int, tokens: dict[int, int]) -> Any:
    """The small value of one field of a config that had `layers` layers."""
    if re.search(r"image_token_i(d|ndex)$", name) and value is None:
        return tokens.setdefault(-1, VOCAB - 1 - len(tokens))
    if isinstance(value, bool | dict) or value is None:
        return value
    if name == "vision_feature_layer":
        return [max(-LAYERS, min(v, LAYERS)) for v in value] if isinstance(value, list | tuple) else max(-LAYERS, value)
    if isinstance(value, list | tuple):
        if value and layers > LAYERS:
            if len(value) == layers:  # one entry a layer: keep one of each kind
                kinds = list(dict.fromkeys(value)) if all(isinstance(v, str) for v in value) else list(value)
                return type(value)((kinds + list(value))[:LAYERS])
            indices = all(type(v) is int and 0 <= v <= layers for v in value)
            if indices and re.search(r"layers?$|ind(ice|exe)s$|idxs$", name):
                return type(value)([LAYERS - 1])
        if name == "image_grid_pinpoints":
            return type(value)([[SIZE, SIZE]])
        if name == "depths":
            return type(value)(min(v, 1) for v in value)
        return type(value)(shrunk(name, v, 0, tokens) if isinstance(v, int) else v for v in value)
    if not isinstance(value, int):
        return value
    if TOKEN.search(name):
        if "layer" in name:
            return min(value, LAYERS - 1)
        return value if value < 9 else tokens.setdefault(value, VOCAB - 1 - len(tokens))
    for pattern, limit in SMALLER.items():
        if re.search(pattern, name):
            return min(value, limit)
    return value


def configs(config: hf.PreTrainedConfig) -> Iterator[hf.PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, hf.PreTrainedConfig):
            yield from configs(value)


# ------------------------------------------------------------------------------------------------------------ inputs


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def images(model: hf.PreTrainedModel, names: dict[str, bool]) -> Iterator[dict[str, Tensor]]:
    """Forms in which models take one image a row; the first entry is the pixels."""
    vision = next((c for c in configs(model.config) if hasattr(c, "patch_size")), model.config)
    patch, size = (
        value[0] if isinstance(value, list | tuple) and value else value or default
        for value, default in ((getattr(vision, "patch_size", 0), PATCH), (getattr(vision, "image_size", 0), SIZE))
    )
    steps, side = getattr(vision, "temporal_patch_size", 1), size // patch
    sizes = torch.tensor([[size, size]] * ROWS)
    grid = next((n for n in ("image_grid_thw", "image_grid_hw", "grid_thws", "grids") if n in names), None)
    if grid:
        shape = torch.tensor([[1, GRID, GRID]] * ROWS) if "thw" in grid else torch.tensor([[GRID, GRID]] * ROWS)
        extra = {n: torch.tensor([2] * ROWS) for n in names if n == "image_merge_sizes"}
        for time in dict.fromkeys((steps, 1, 2)):
            yield {"pixel_values": noise(ROWS * GRID**2, 3 * time * patch**2), grid: shape, **extra}
        yield {"pixel_values": noise(ROWS * GRID**2, 3, patch, patch), grid: shape, **extra}
        yield {"pixel_values": noise(1, ROWS * GRID**2, 3, patch, patch), grid: shape, **extra}
    if "spatial_shapes" in names:
        yield {
            "pixel_values": noise(ROWS, side**2, 3 * patch**2),
            "pixel_attention_mask": torch.ones(ROWS, side**2, dtype=torch.long),
            "spatial_shapes": torch.tensor([[side, side]] * ROWS),
        }
    if "image_position_ids" in names:
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(ROWS, -1, -1)
        yield {"pixel_values": noise(ROWS, side**2, 3 * patch**2), "image_position_ids": places}
    if "target_sizes" in names:
        yield {
            "pixel_values": noise(1, 3, patch, ROWS * side**2 * patch),
            "target_sizes": torch.tensor([[side, side]] * ROWS),
        }
    if "high_res_pixel_values" in names:
        yield {n: noise(ROWS, 3, size, size) for n in ("pixel_values", "high_res_pixel_values")}
    if "aspect_ratio_ids" in names:
        tiles = getattr(vision, "max_num_tiles", 1)
        yield {
            "pixel_values": noise(ROWS, 1, tiles, 3, size, size),
            "aspect_ratio_ids": torch.ones(ROWS, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(ROWS, 1, tiles, dtype=torch.long),
        }
    for name in ("pixel_values", "pixel_values_images", "image"):
        if name in names:
            for shape in ((ROWS, 3, size, size), (ROWS, 1, 3, size, size), (ROWS, 2, 3, size, size)):
                if "image_sizes" in names:
                    yield {name: noise(*shape), "image_sizes": sizes}
                if "pixel_attention_mask" in names and len(shape) == 5:
                    yield {name: noise(*shape), "pixel_attention_mask": torch.ones(*shape[:2], size, size)}
                yield {name: noise(*shape)}
    if "flattened_patches" in names:
        places = 1 + torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).expand(ROWS, -1, -1)
        yield {"flattened_patches": torch.cat([places, noise(ROWS, GRID**2, 3 * patch**2)], dim=-1)}
    for name in ("pixel_values_videos", "pixel_values"):
        if name in names:
            frames = next((c.num_frames for c in configs(model.config) if hasattr(c, "num_frames")), 2)
            yield {name: noise(ROWS, frames, 3, size, size)}
    if "visual_feats" in names:
        yield {
            "visual_feats": noise(ROWS, 4, getattr(model.config, "visual_feat_dim", WIDTH)),
            "visual_pos": noise(ROWS, 4, 4),
        }
    if "visual_embeds" in names:
        yield {"visual_embeds": noise(ROWS, 4, getattr(model.config, "visual_embedding_dim", WIDTH))}


def placeholder(model: hf.PreTrainedModel) -> int | None:
    """The token that stands for a piece of an image."""
    for name in ("image_token_id", "image_token_index", "image_patch_id", "video_token_id"):
        for config in configs(model.config):
            if getattr(config, name, None) is not None:
                return getattr(config, name)
    return None


def counts(model: hf.PreTrainedModel, image: dict[str, Tensor]) -> list[int]:
    """Guesses of how many placeholders one image needs, best first."""
    if placeholder(model) is None:
        return [0]
    guesses = [0, 1, 2, 4, 5, 6, 8, 9, 16, 17, 20, 24, 32, 36, 64]
    if hasattr(model, "get_image_features"):
        try:
            features = model.get_image_features(**image)
        except Exception:
            return guesses
        features = getattr(features, "pooler_output", features)
        if isinstance(features, list | tuple):
            features = torch.cat([f.flatten(0, -2) for f in features])
        if isinstance(features, Tensor):
            exact = features.numel() // features.shape[-1] // ROWS
            return [exact, *(n for n in guesses if n != exact)]
    return guesses


def texts(model: hf.PreTrainedModel, names: dict[str, bool], count: int) -> Iterator[dict[str, Tensor]]:
    """`count` placeholders and some words a row, first with the usual arguments, then with every one that is known."""
    image = placeholder(model)
    words = WORDS.clone()
    ids = torch.cat([words[:, :1], torch.full((ROWS, count), image or 0), words[:, 1:]], dim=1) if count else words
    mask = torch.ones_like(ids)
    is_image = (ids == (-1 if image is None else image)).long()
    usual = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": is_image, "decoder_input_ids": words}
    more = {
        "moe_mm_token_type_ids": is_image,
        "token_type_ids": is_image,
        "image_embeds_position_mask": is_image.bool(),
        "bbox": torch.zeros(*ids.shape, 4, dtype=torch.long),
        "qformer_input_ids": words,
        "qformer_attention_mask": torch.ones_like(words),
        "image_attention_mask": torch.ones(*ids.shape, 1, dtype=torch.long),
        "pixel_mask": torch.ones(ROWS, SIZE, SIZE, dtype=torch.long),
    }
    yield {k: v for k, v in (usual | more).items() if k in names and (k in usual or names[k])}
    if more.keys() & names.keys():
        yield {k: v for k, v in (usual | more).items() if k in names}


# ------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class AutoCase:
    """One class of transformers, by name."""

    model_class_name: str

    def __str__(self) -> str:
        return self.model_class_name

    def build(self) -> hf.PreTrainedModel:
        """A fresh tiny model: the same weights at each call, eval mode, float32."""
        model_class = getattr(hf, self.model_class_name, None)
        if model_class is None or not hasattr(model_class, "config_class"):
            raise Unsupported("not in this version of transformers")
        names = inspect.signature(model_class.forward).parameters
        if not any(re.search(r"pixel|image|visual|flattened_patches", name) for name in names):
            raise Unsupported("takes no images")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                config = model_class.config_class()
                if getattr(config, "vision_config", 0) is None:
                    config = model_class.config_class(vision_config={})
                config = without_dropout(shrink(config, {}))
                with torch.device("meta"):
                    size = sum(p.numel() for p in model_class(config).parameters())
                if size > MAX_PARAMETERS:
                    raise Unsupported(f"{size / 1e6:.0f}M parameters after shrinking")
                return wake(model_class(config)).float().eval()
            except Unsupported:
                raise
            except Exception as error:
                raise Unsupported(f"build: {brief(error)}") from error

    @torch.no_grad()
    def inputs(self, model: hf.PreTrainedModel) -> dict[str, Tensor]:
        """A batch of ROWS rows on which `forward` works and gives an output that depends on the image."""
        parameters = inspect.signature(model.forward).parameters.values()
        names = {p.name: p.default is p.empty for p in parameters}  # name -> whether it is required
        reasons: list[str] = []
        for image in images(model, names):
            for count in counts(model, image):
                for text in texts(model, names, count):
                    pixels = next(iter(image))
                    try:
                        before = self.output(model(**text, **image))
                        after = self.output(model(**text, **{**image, pixels: image[pixels] + 0.5}))
                    except Exception as error:
                        reasons.append(brief(error))
                        continue
                    if before.isfinite().all() and (before - after).abs().max() > 1e-5:
                        return {**text, **image}
                    reasons.append("the output doesn't depend on the image, or isn't finite")
        raise Unsupported(f"call: {reasons[0]}" if reasons else "no known form of image")

    @staticmethod
    def output(out: Any) -> Tensor:
        """The tensor to compare."""
        for name in ("logits", "logits_per_image", "itm_score", "embeddings", "multimodal_embeddings", "start_logits"):
            if isinstance(out.get(name), Tensor):
                return out[name]
        return next(v for v in out.values() if isinstance(v, Tensor) and v.is_floating_point())


def brief(error: Exception) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:110]}"


def auto_cases() -> list[AutoCase]:
    """All classes of the mappings, in order and without repetition."""
    names: dict[str, None] = dict.fromkeys(MORE)
    for mapping in MAPPINGS:
        for classes in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {}).values():
            names.update(dict.fromkeys([classes] if isinstance(classes, str) else classes))
    return [AutoCase(name) for name in names]


def main(pattern: str = "") -> None:
    from time import perf_counter

    torch.set_num_threads(1)
    working, begin = 0, perf_counter()
    for case in auto_cases():
        if pattern.lower() not in case.model_class_name.lower():
            continue
        start = perf_counter()
        try:
            model = case.build()
            batch = case.inputs(model)
            shapes = {k: tuple(v.shape) for k, v in batch.items() if k not in ("attention_mask", "decoder_input_ids")}
            result = f"{sum(p.numel() for p in model.parameters()) / 1e3:.0f}k {shapes}"
            working += 1
        except Unsupported as error:
            result = f"-- {error}"
        print(f"{case.model_class_name:45s} {perf_counter() - start:5.1f}s {result}", flush=True)
    print(f"{working} work, {perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:])
