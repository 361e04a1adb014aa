"""Tiny random vision-language models: one `Family` for each architecture, all of them in `FAMILIES`.

Every family builds in a fraction of a second from a config (no download): widths of 16-64, two layers, images of
16-32 pixels, a vocabulary of 64, no dropout. Widths differ between towers and between queries and keys wherever the
architecture allows it, and every weight is drawn anew (`wake`), so that each tower influences the output.

    family = FAMILIES["clip"]
    model = family.build()
    family.output(model(**family.inputs(model)))  # [3, 3]
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from peft_multimodal.nn.media_reader import MediaReader

VOCAB = 64
PAD, BOS, EOS, SEP = 0, 1, 2, 3
IMAGE = 60  # the placeholder of one image embedding in `input_ids`
WORDS = (4, 50)  # ordinary tokens; every special one lies outside this range
ROWS = 3

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One architecture.

    `inputs()` is a batch of different rows for `model(**inputs)`, and `output` picks the tensor to compare.
    `targets` adds to such a batch what makes the class compute a loss; it is None where the class computes none.
    `towers` says where the towers are: role -> module path. `silent` names modules that the output doesn't depend on.
    """

    name: str
    kind: Literal["dual", "fusion", "generative"]
    build: Callable[[], hf.PreTrainedModel]
    batch: Callable[[], Inputs]
    output: Callable[[Any], Tensor]
    towers: dict[str, str]
    targets: Callable[[Inputs], Inputs] | None = None
    silent: tuple[str, ...] = ()
    generates: bool = False
    text_only: bool = False  # whether `forward` works on `text_inputs`, without an image

    def inputs(self, model: Any = None) -> Inputs:
        """A fresh batch on the model's device: `model(**inputs)` works.

        Where an adapter reads media, each row brings an image of its own, whose marker is BOS.
        """
        batch = {**self.batch(), **media(model)}
        return batch if model is None else {k: v.to(model.device) for k, v in batch.items()}

    def train_inputs(self, model: Any = None) -> Inputs | None:
        """A batch that yields a loss, or None when the class computes no loss."""
        return self.targets(self.inputs(model)) if self.targets else None

    def generate_inputs(self, model: Any = None) -> Inputs:
        """A batch for `model.generate`."""
        return {k: v for k, v in self.inputs(model).items() if k != "labels"}

    def text_inputs(self, model: Any = None) -> Inputs:
        """The batch without its images: their placeholders become words."""
        inputs = {k: v for k, v in self.inputs(model).items() if k in ("input_ids", "attention_mask", "labels")}
        return {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, WORDS[0])}

    def loss(self, model: Any) -> Tensor:
        """The loss of the class, or the mean square of the output when the class computes none."""
        batch = self.train_inputs(model)
        if batch is None:
            return self.output(model(**self.inputs(model))).square().mean()
        return model(**batch).loss


# ------------------------------------------------------------------------------------------------------------ models


def tiny(model_class: type[hf.PreTrainedModel], config: hf.PreTrainedConfig) -> Callable[[], hf.PreTrainedModel]:
    """The builder of a fresh model in eval mode. Each call gives the same weights and leaves torch's seed alone."""

    def build() -> hf.PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return wake(model_class(without_dropout(deepcopy(config)))).float().eval()

    return build


def without_dropout(config: hf.PreTrainedConfig) -> hf.PreTrainedConfig:
    """Set every dropout rate of a config and of its sub-configs to 0, so that training is deterministic."""
    for name, value in vars(config).items():
        if isinstance(value, hf.PreTrainedConfig):
            without_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


@torch.no_grad()
def wake(model: nn.Module, std: float = 0.1) -> nn.Module:
    """Draw every matrix anew at the scale of its input, and every vector that is zero.

    transformers starts some weights at zero (gates, class and query tokens, biases) and some at subnormal numbers
    (`BlipVisionConfig.initializer_range` is 1e-10): whole towers then leave the output alone and get no gradient.
    """
    for parameter in model.parameters():
        if parameter.ndim > 1:  # [out, ...]
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif parameter.abs().max() < 1e-3:  # norms, temperatures and layer scales keep their value
            parameter.normal_(std=std)
    return model


# ------------------------------------------------------------------------------------------------------------ inputs


def pixels(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def media(model: Any) -> Inputs:
    """One image a row, as the adapter of the model takes it: pixels for its encoder, or features."""
    readers = [m for m in model.modules() if isinstance(m, MediaReader)] if isinstance(model, nn.Module) else ()
    acting = [(reader, adapter) for reader in readers for adapter in reader.live_adapters()]
    if not acting:
        return {}
    if any(adapter in reader.encoder_of for reader, adapter in acting):
        return {"pixel_values": pixels(ROWS, 1, 3, 16, 16)}  # [rows, images, channels, height, width]
    # [rows, images, frames, places, width]
    return {"vision_features": torch.randn(ROWS, 1, 1, 5, 20, generator=torch.Generator().manual_seed(7))}


def reads_media(model: Any) -> bool:
    """Whether an adapter of the model takes images out of a call."""
    return bool(media(model))


def text(end: int | None = None, images: tuple[int, ...] = (0,) * ROWS, left: bool = False) -> Inputs:
    """`input_ids` and `attention_mask`, both [ROWS, longest row]: `images[row]` placeholders, then 4-7 words."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for count, length in zip(images, (7, 4, 6), strict=True):
        words = torch.randint(*WORDS, (length,), generator=generator)
        words[0], words[-1] = BOS, words[-1] if end is None else end
        rows.append(torch.cat([torch.full((count,), IMAGE), words]))

    def pad(sequences: list[Tensor], value: int) -> Tensor:
        side = "left" if left else "right"
        return nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value, padding_side=side)

    return {"input_ids": pad(rows, PAD), "attention_mask": pad([torch.ones_like(row) for row in rows], 0)}


def pairs(size: int = 16, **text_options: Any) -> Callable[[], Inputs]:
    """Texts padded on the right, each with one image [3, size, size]: for encoders."""
    return lambda: {**text(**text_options), "pixel_values": pixels(ROWS, 3, size, size)}


def prompts(images: int = 0, size: int = 16) -> Callable[[], Inputs]:
    """Texts padded on the left, each with one image of `images` placeholders: for decoders."""
    return pairs(size, images=(images,) * ROWS, left=True)


def contrastive(inputs: Inputs) -> Inputs:
    return {**inputs, "return_loss": True}


def next_token(inputs: Inputs) -> Inputs:
    ignored = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == IMAGE)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(ignored, -100)}


def answers(inputs: Inputs) -> Inputs:
    """Targets of a decoder with its own tokens."""
    return {**inputs, "labels": text(end=EOS)["input_ids"].flip(0).to(inputs["input_ids"].device)}


# ---------------------------------------------------------------------------------------------------------- families


def tower(width: int, **fields: Any) -> dict[str, Any]:
    """A transformer of two layers, as the keyword arguments that most configs share."""
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**shape, **fields}


def text_tower(width: int, **fields: Any) -> dict[str, Any]:
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    return tower(width, **{"vocab_size": VOCAB, "max_position_embeddings": 64, **special, **fields})


def vision_tower(width: int, **fields: Any) -> dict[str, Any]:
    return tower(width, **{"image_size": 16, "patch_size": 8, **fields})


def dual(model_class: type, config: hf.PreTrainedConfig, name: str, batch: Callable[[], Inputs]) -> Family:
    return Family(
        name=name,
        kind="dual",
        build=tiny(model_class, config),
        batch=batch,
        targets=contrastive,
        output=lambda out: out.logits_per_image,
        towers={"vision": "vision_model", "text": "text_model"},
    )


def clip() -> Family:
    text = hf.CLIPTextConfig(**text_tower(32))
    vision = hf.CLIPVisionConfig(**vision_tower(48))
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    return dual(hf.CLIPModel, config, "clip", pairs(end=EOS))


def siglip() -> Family:
    text = hf.SiglipTextConfig(**text_tower(32), projection_size=48)
    vision = hf.SiglipVisionConfig(**vision_tower(48))
    return dual(hf.SiglipModel, hf.SiglipConfig(text_config=text, vision_config=vision), "siglip", pairs())


def chinese_clip() -> Family:
    text = hf.ChineseCLIPTextConfig(**text_tower(32))
    vision = hf.ChineseCLIPVisionConfig(**vision_tower(48))
    config = hf.ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    return dual(hf.ChineseCLIPModel, config, "chinese_clip", pairs())


def altclip() -> Family:
    text = hf.AltCLIPTextConfig(**text_tower(32), project_dim=40)
    vision = hf.AltCLIPVisionConfig(**vision_tower(48))
    config = hf.AltCLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    return dual(hf.AltCLIPModel, config, "altclip", pairs())


def vision_text_dual_encoder() -> Family:
    text, vision = hf.BertConfig(**text_tower(32)), hf.ViTConfig(**vision_tower(48))
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=24)
    return dual(hf.VisionTextDualEncoderModel, config, "vision_text_dual_encoder", pairs())


def blip_config(vision_width: int = 48) -> hf.BlipConfig:
    text = hf.BlipTextConfig(**text_tower(32, sep_token_id=SEP))
    vision = hf.BlipVisionConfig(**vision_tower(vision_width))
    return hf.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=24)


def blip_retrieval() -> Family:
    return Family(
        name="blip_retrieval",
        kind="fusion",
        build=tiny(hf.BlipForImageTextRetrieval, blip_config()),
        batch=pairs(),
        output=lambda out: out.itm_score,
        towers={"vision": "vision_model", "text": "text_encoder"},
        silent=("vision_proj", "text_proj"),  # use_itm_head=True
    )


def blip_vqa() -> Family:
    return Family(
        name="blip_vqa",
        kind="generative",
        build=tiny(hf.BlipForQuestionAnswering, blip_config(32)),  # the decoder reads text in the image's width
        batch=lambda: answers(pairs()()),  # its forward needs an answer and returns no logits, only their loss
        targets=answers,
        output=lambda out: out.loss,
        towers={"vision": "vision_model", "text": "text_encoder", "decoder": "text_decoder"},
        generates=True,
    )


def blip_captioning() -> Family:
    return Family(
        name="blip_captioning",
        kind="generative",
        build=tiny(hf.BlipForConditionalGeneration, blip_config()),
        batch=pairs(end=SEP),  # its generate drops the last token
        targets=next_token,
        output=lambda out: out.logits,
        towers={"vision": "vision_model", "decoder": "text_decoder"},
        generates=True,
    )


def blip_2() -> Family:
    text = hf.OPTConfig(**text_tower(40), ffn_dim=80, word_embed_proj_dim=40)
    vision = hf.Blip2VisionConfig(**vision_tower(48))
    qformer = hf.Blip2QFormerConfig(**tower(32), vocab_size=VOCAB, encoder_hidden_size=48)
    config = hf.Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=3, image_token_index=IMAGE
    )
    return Family(
        name="blip_2",
        kind="generative",
        build=tiny(hf.Blip2ForConditionalGeneration, config),
        batch=prompts(images=3),
        targets=next_token,
        output=lambda out: out.logits,
        towers={"vision": "vision_model", "fusion": "qformer", "decoder": "language_model"},
        generates=True,
    )


def flava() -> Family:
    config = hf.FlavaConfig(
        text_config=hf.FlavaTextConfig(**tower(32), vocab_size=VOCAB, max_position_embeddings=64),
        image_config=hf.FlavaImageConfig(**vision_tower(48)),
        multimodal_config=hf.FlavaMultimodalConfig(**tower(40)),
        hidden_size=40,
        projection_dim=24,
    )
    return Family(
        name="flava",
        kind="fusion",
        build=tiny(hf.FlavaModel, config),
        batch=pairs(),
        output=lambda out: out.multimodal_embeddings,
        towers={"vision": "image_model", "text": "text_model", "fusion": "multimodal_model"},
        silent=(
            *("text_model.pooler", "image_model.pooler", "multimodal_model.pooler"),
            *("text_model.layernorm", "image_model.layernorm", "text_projection", "image_projection"),
        ),
    )


def vilt() -> Family:
    config = hf.ViltConfig(**vision_tower(32), vocab_size=VOCAB, max_position_embeddings=40, num_labels=5)

    def batch() -> Inputs:
        # ViLT shuffles the patches of an image without padding; with its last patch padded they keep their order.
        pixel_mask = torch.ones(ROWS, 16, 16, dtype=torch.long)
        pixel_mask[:, 8:, 8:] = 0
        return {**pairs()(), "pixel_mask": pixel_mask}

    return Family(
        name="vilt",
        kind="fusion",
        build=tiny(hf.ViltForQuestionAnswering, config),
        batch=batch,
        targets=lambda inputs: {**inputs, "labels": torch.eye(ROWS, 5).to(inputs["input_ids"].device)},
        output=lambda out: out.logits,
        towers={"fusion": "vilt.encoder"},
        silent=("vilt.encoder.layer.1.uni_adapter_image",),  # the head reads the first token, a text's
    )


def bridgetower() -> Family:
    text = hf.BridgeTowerTextConfig(**text_tower(32))
    vision = hf.BridgeTowerVisionConfig(hidden_size=64, num_hidden_layers=2, image_size=16, patch_size=8)
    config = hf.BridgeTowerConfig(
        text_config=text, vision_config=vision, hidden_size=32, num_attention_heads=4, num_hidden_layers=2
    )
    return Family(
        name="bridgetower",
        kind="fusion",
        build=tiny(hf.BridgeTowerForImageAndTextRetrieval, config),
        batch=pairs(),
        targets=lambda inputs: {**inputs, "labels": (torch.arange(ROWS) % 2).to(inputs["input_ids"].device)},
        output=lambda out: out.logits,
        towers={
            "vision": "bridgetower.vision_model",
            "text": "bridgetower.text_model",
            "fusion": "bridgetower.cross_modal_text_layers",
        },
        silent=("bridgetower.text_model.pooler",),
    )


def llava() -> Family:
    text = hf.LlamaConfig(**text_tower(32, num_key_value_heads=2))
    vision = hf.CLIPVisionConfig(**vision_tower(48, num_hidden_layers=3))
    config = hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, image_seq_length=4)
    return Family(
        name="llava",
        kind="generative",
        build=tiny(hf.LlavaForConditionalGeneration, config),
        batch=prompts(images=4),
        targets=next_token,
        output=lambda out: out.logits,
        towers={"vision": "model.vision_tower", "decoder": "model.language_model"},
        silent=("model.vision_tower.encoder.layers.2", "model.vision_tower.post_layernorm"),  # vision_feature_layer=-2
        generates=True,
        text_only=True,
    )


def llama() -> Family:
    """A language model alone, which sees only by an adapter's eyes."""
    return Family(
        name="llama",
        kind="generative",
        build=tiny(hf.LlamaForCausalLM, hf.LlamaConfig(**text_tower(32, num_key_value_heads=2))),
        batch=lambda: text(left=True),
        targets=next_token,
        output=lambda out: out.logits,
        towers={"decoder": "model"},
        generates=True,
        text_only=True,
    )


def qwen2_5_vl() -> Family:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = text_tower(32, num_key_value_heads=2, rope_parameters=rope)
    vision = {"depth": 2, "hidden_size": 48, "intermediate_size": 96, "num_heads": 3, "patch_size": 4}
    vision |= {"window_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=IMAGE + 1)

    def batch() -> Inputs:
        # Images of 1, 2 and 4 merged patches; the pixels of all rows lie in one list of patches.
        grids = torch.tensor([[1, 2, 2], [1, 2, 4], [1, 4, 4]])
        inputs = pairs(images=(1, 2, 4), left=True)()
        patches = pixels(int(grids.prod(-1).sum()), 3 * 2 * 4 * 4)
        kinds = (inputs["input_ids"] == IMAGE).int()
        return {**inputs, "pixel_values": patches, "image_grid_thw": grids, "mm_token_type_ids": kinds}

    return Family(
        name="qwen2_5_vl",
        kind="generative",
        build=tiny(hf.Qwen2_5_VLForConditionalGeneration, config),
        batch=batch,
        targets=next_token,
        output=lambda out: out.logits,
        towers={"vision": "model.visual", "decoder": "model.language_model"},
        generates=True,
        text_only=True,
    )


def paligemma() -> Family:
    text = hf.GemmaConfig(**text_tower(24, num_key_value_heads=1), head_dim=8)
    vision = hf.SiglipVisionConfig(**vision_tower(48), vision_use_head=False)
    config = hf.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=24, image_token_index=IMAGE)
    return Family(
        name="paligemma",
        kind="generative",
        build=tiny(hf.PaliGemmaForConditionalGeneration, config),
        batch=prompts(images=4),
        targets=lambda inputs: {**next_token(inputs), "token_type_ids": (inputs["input_ids"] != IMAGE).long()},
        output=lambda out: out.logits,
        towers={"vision": "model.vision_tower", "decoder": "model.language_model"},
        generates=True,
        text_only=True,
    )


def idefics3() -> Family:
    text = hf.LlamaConfig(**text_tower(32, num_key_value_heads=2))
    vision = hf.Idefics3VisionConfig(**vision_tower(48))
    config = hf.Idefics3Config(text_config=text, vision_config=vision, image_token_id=IMAGE)

    def batch() -> Inputs:
        # Two images a row, each of 2 * 2 patches, shuffled into one embedding.
        return {**prompts(images=2)(), "pixel_values": pixels(ROWS, 2, 3, 16, 16)}

    return Family(
        name="idefics3",
        kind="generative",
        build=tiny(hf.Idefics3ForConditionalGeneration, config),
        batch=batch,
        targets=next_token,
        output=lambda out: out.logits,
        towers={"vision": "model.vision_model", "decoder": "model.text_model"},
        generates=True,
        text_only=True,
    )


def mllama() -> Family:
    text = MllamaTextConfig(**text_tower(32, num_key_value_heads=2), cross_attention_layers=[1])
    vision = MllamaVisionConfig(
        **vision_tower(16, image_size=16, patch_size=8),
        num_global_layers=1,
        intermediate_layers_indices=[0],
        vision_output_dim=32,  # the last layer and one intermediate layer
        max_num_tiles=2,
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )

    def batch() -> Inputs:
        # One image a row, of one or two tiles; the first word comes before the image and doesn't see it.
        inputs = prompts()()
        tiles = torch.tensor([[[1, 1]], [[1, 0]], [[1, 1]]])  # [rows, images, tiles]
        seen = (inputs["input_ids"] >= WORDS[0]).long()
        return {
            **inputs,
            "pixel_values": pixels(ROWS, 1, 2, 3, 16, 16),
            "aspect_ratio_ids": torch.tensor([[2], [1], [3]]),
            "aspect_ratio_mask": tiles,
            "cross_attention_mask": torch.einsum("rw,rpt->rwpt", seen, tiles),
        }

    return Family(
        name="mllama",
        kind="generative",
        build=tiny(hf.MllamaForConditionalGeneration, hf.MllamaConfig(text_config=text, vision_config=vision)),
        batch=batch,
        targets=next_token,
        output=lambda out: out.logits,
        towers={"vision": "model.vision_model", "decoder": "model.language_model"},
        generates=True,
        text_only=True,
    )


def bart_config() -> hf.BartConfig:
    return hf.BartConfig(
        **{"vocab_size": VOCAB, "max_position_embeddings": 64, "d_model": 32},
        **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
        **{"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "forced_eos_token_id": EOS},
        decoder_start_token_id=EOS,
    )


def florence2() -> Family:
    text = bart_config()
    vision = hf.Florence2VisionConfig(
        **{"depths": [1, 1], "embed_dim": [16, 32], "num_heads": [2, 4], "num_groups": [2, 4], "window_size": 2},
        **{"patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True]},
        projection_dim=32,
    )
    return Family(
        name="florence2",
        kind="generative",
        build=tiny(
            hf.Florence2ForConditionalGeneration,
            hf.Florence2Config(text_config=text, vision_config=vision, image_token_id=IMAGE),
        ),
        batch=lambda: answers(pairs(images=(5,) * ROWS)()),  # 2 * 2 patches and their mean
        targets=answers,
        output=lambda out: out.logits,
        towers={
            "vision": "model.vision_tower",
            "text": "model.language_model.encoder",
            "decoder": "model.language_model.decoder",
        },
        generates=True,
        text_only=True,
    )


def text_to_text(model_class: type, config: hf.PreTrainedConfig, name: str, inside: str) -> Family:
    """An encoder-decoder of text alone."""
    return Family(
        name=name,
        kind="generative",
        build=tiny(model_class, config),
        batch=lambda: answers(text(end=EOS)),
        targets=answers,
        output=lambda out: out.logits,
        towers={"text": f"{inside}encoder", "decoder": f"{inside}decoder"},
        generates=True,
        text_only=True,
    )


def t5() -> Family:
    width = {"d_model": 32, "d_kv": 6, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    special = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
    config = hf.T5Config(vocab_size=VOCAB, **width, **special)
    return text_to_text(hf.T5ForConditionalGeneration, config, "t5", "")


def bart() -> Family:
    return text_to_text(hf.BartForConditionalGeneration, bart_config(), "bart", "model.")


FAMILIES: dict[str, Family] = {
    make.__name__: make()
    for make in (
        *(clip, siglip, chinese_clip, altclip, vision_text_dual_encoder),
        *(blip_retrieval, flava, vilt, bridgetower),
        *(blip_vqa, blip_captioning, blip_2, llava, qwen2_5_vl, paligemma, idefics3, mllama, florence2),
        *(llama, t5, bart),
    )
}
