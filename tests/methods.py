"""The methods under contract, and what the contract's tests do with each of them alike.

    METHODS["my_method"] = my_method   # a function (family, **changes) -> config, or None where it doesn't apply

A new method joins the contract by such a line and its formula in `PARAMETERS`.

    python tests/methods.py FOLDER     # the fresh process: reloads what `save_all` saved, prints {family: difference}
"""

from __future__ import annotations

import atexit
import functools
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from families import BOS, EOS, FAMILIES, PAD, SEP, VOCAB, Family, text_tower, tiny
from peft import PeftConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from peft_multimodal import (
    AuroraModeApproxConfig,
    CrossLingualAdapterConfig,
    GatedXAttnConfig,
    HardSampleDomainAdapterConfig,
    StructuredPromptConfig,
)
from peft_multimodal.methods.structured_prompt import PromptedClassifier

R = 4

# Families whose layers hold a self- and a cross-attention, and those whose text encoder also runs without the picture.
CROSS_ATTENTION = ("blip_retrieval", "bridgetower", "blip_vqa", "blip_captioning", "blip_2", "florence2")
TEXT_ENCODER = ("blip_retrieval", "blip_vqa")


def aurora(family: Family, **changes: Any) -> PeftConfig:
    return AuroraModeApproxConfig(**{"r": R, "alpha": 2.0 * R, "dropout": 0.0, **changes})


def aurora_fusion(family: Family, **changes: Any) -> PeftConfig | None:
    """With the gated query transformation and the context enhancement, where the model has a fusion encoder."""
    if family.name not in CROSS_ATTENTION:
        return None
    parts = {"use_gqt": True, "use_ice": family.name in TEXT_ENCODER, "ice_bank_size": 4}
    return aurora(family, **{**parts, "gqt_branches": ["query", "cross"], **changes})


# Families with a text tower of its own, that can be exchanged as a whole.
TEXT_TOWER = ("clip", "siglip", "chinese_clip", "altclip", "vision_text_dual_encoder", "flava")
ENCODER_WIDTH = 28


@functools.cache
def language(width: int = ENCODER_WIDTH, words: str = "w") -> str:
    """A folder with the tiny encoder of another language and its tokenizer: the words w4, w5, ... are its tokens."""
    folder = tempfile.mkdtemp(prefix="language-encoder-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save_encoder(folder, width, words)
    return folder


def save_encoder(folder: str | Path, width: int = ENCODER_WIDTH, words: str = "w") -> None:
    config = hf.BertConfig(**text_tower(width), hidden_dropout_prob=0.0)
    tiny(hf.BertModel, config)().save_pretrained(folder)
    tokens = {PAD: "[PAD]", BOS: "[CLS]", EOS: "[UNK]", SEP: "[SEP]"}
    vocabulary = {tokens.get(i, f"{words}{i}"): i for i in range(VOCAB)}
    hf.BertTokenizer(vocab=vocabulary).save_pretrained(folder)


def cross_lingual(family: Family, **changes: Any) -> PeftConfig | None:
    if family.name not in TEXT_TOWER:
        return None
    changes = {"encoder": language(), **changes}
    return CrossLingualAdapterConfig(**{"bottleneck_dim": 16, "num_heads": 2, **changes})


# Families whose text is read by one decoder.
DECODER = ("blip_2", "llava", "qwen2_5_vl", "paligemma", "idefics3", "mllama")


def gated_xattn(family: Family, **changes: Any) -> PeftConfig | None:
    """The pictures are the families' `media`."""
    if family.name not in DECODER:
        return None
    sizes = {"num_latents": 3, "resampler_depth": 1, "resampler_heads": 2, "head_dim": 8, "max_frames": 2}
    return GatedXAttnConfig(**{"media_token_id": BOS, "vision_hidden_size": 20, **sizes, **changes})


def domain(family: Family, **changes: Any) -> PeftConfig:
    return HardSampleDomainAdapterConfig(**{"bottleneck_dim": 8, "num_heads": 2, **changes})


# Families whose pictures and texts have features of their own.
DUAL = ("clip", "siglip", "chinese_clip", "altclip", "vision_text_dual_encoder")
CLASSES = ["w4 w5", "w6", "w7 w8 w9", "w4"]


@functools.cache
def word_tokenizer(bos: int | None = BOS, eos: int | None = VOCAB - 1, size: int = VOCAB) -> hf.PreTrainedTokenizerFast:
    """Knows "a" and the words w0, w1, ... by their ids; puts [BOS] and [EOS] around a text.

    CLIP models of old configs (eos_token_id 2) pool at the largest id, which therefore is [EOS]'s.
    """
    special = {"[PAD]": PAD, "[BOS]": bos, "[EOS]": eos}
    frame = [(token, i) for token, i in special.items() if i is not None and token != "[PAD]"]
    vocabulary = {f"w{i}": i for i in range(size) if i not in special.values()}
    vocabulary = {"a": vocabulary.pop("w3"), **vocabulary, **dict(frame), "[PAD]": PAD}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    around = ["[BOS]"] * (bos is not None) + ["$A"] + ["[EOS]"] * (eos is not None)
    made.post_processor = processors.TemplateProcessing(single=" ".join(around), special_tokens=frame)
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]")


def structured_prompt(family: Family, **changes: Any) -> PeftConfig | None:
    if family.name not in DUAL:
        return None
    small = {"general_init": "w10 w11", "attention_dim": 16, "num_heads": 2}
    return StructuredPromptConfig(**{**small, **changes})


METHODS: dict[str, Callable[..., PeftConfig | None]] = {
    "aurora_mode_approx": aurora,
    "aurora_mode_approx-fusion": aurora_fusion,
    "cross_lingual_adapter": cross_lingual,
    "gated_xattn": gated_xattn,
    "hard_sample_domain_adapter": domain,
    "structured_prompt": structured_prompt,
}

# Where a method differs in what it promises.
# Read other texts than the base from the start; what they give for pictures is the base's.
NOT_IDENTITY = {"cross_lingual_adapter", "structured_prompt"}
# Take a tower as a whole: have no target_modules, and nothing is recomputed in it.
WHOLE_TOWER = {"cross_lingual_adapter", "structured_prompt"}
WHOLE_LAYERS = {"gated_xattn"}  # stands before the layers of a decoder: has no target_modules
OWN_LAYERS = {"hard_sample_domain_adapter"}  # its target_modules are layers, not matrices
ROUTES_ROWS = {"cross_lingual_adapter", "hard_sample_domain_adapter"}  # knows adapter_names=[...]
COMPANIONS = {"cross_lingual_adapter": {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}}  # files beside

CASES = [
    (name, method)
    for method, config in METHODS.items()
    for name, family in FAMILIES.items()
    if config(family) is not None
]


def home(method: str) -> Family:
    """The family on which a method is looked at where one is enough."""
    return FAMILIES[next(name for name in ("blip_retrieval", "clip", "llava") if (name, method) in CASES)]


def aurora_parameters(base: nn.Module, config: AuroraModeApproxConfig) -> int:
    """(d_in + d_out) R + N R + R a group of N matrices of equal shape, 2 d + 1 a layer and branch, 1 for the context.

    Counted on the base model's own modules: the default targets are its attentions' q, k and v.
    """
    shapes: dict[tuple[int, int], int] = {}
    for path, module in base.named_modules():
        leaf = path.rpartition(".")[2]
        if isinstance(module, nn.MultiheadAttention):
            shape, count = (module.embed_dim, module.embed_dim), 3
        elif not isinstance(module, nn.Linear):
            continue
        elif leaf == "qkv":
            shape, count = (module.in_features, module.out_features // 3), 3
        elif re.fullmatch("[qkv]_proj|query|key|value", leaf):
            shape, count = (module.in_features, module.out_features), 1
        else:
            continue
        shapes[shape] = shapes.get(shape, 0) + count
    total = sum((d_in + d_out) * config.r + n * config.r + config.r for (d_in, d_out), n in shapes.items())
    if config.use_gqt:
        widths = [
            next(m.in_features for p, m in layer.named_modules() if re.search("(query|q_proj)$", p))
            for path, layer in base.named_modules()
            if re.search(r"\.\d+$", path)
            and any(re.search("crossattention$|encoder_attn$", p) for p, _ in layer.named_modules())
        ]
        total += sum((2 * d + 1) * len(config.gqt_branches) for d in widths)
    return total + config.use_ice


def cross_lingual_parameters(base: nn.Module, config: CrossLingualAdapterConfig) -> int:
    """(d_s m + m) + n (12 m^2 + 13 m) + (m d_t + d_t), d_t being the width of the tower's output."""
    d_s, m, n = ENCODER_WIDTH, config.bottleneck_dim, config.num_layers
    d_t = TOWER_OUTPUT.get(type(base).__name__, 32)
    return (d_s * m + m) + n * (12 * m**2 + 13 * m) + (m * d_t + d_t)


TOWER_OUTPUT = {"SiglipModel": 48, "AltCLIPModel": 40}  # where the tower projects; elsewhere its width, 32


def gated_xattn_parameters(base: nn.Module, config: GatedXAttnConfig) -> int:
    """R D + F D + depth (4 D + 4 D I + 2 D + 8 D^2) + 2 D; 2 d + d I + 2 D I + I d + 1 + 2 d + 8 d^2 + 1 a layer; a row."""
    D, R, F, depth = config.vision_hidden_size, config.num_latents, config.max_frames, config.resampler_depth
    I, d = config.resampler_heads * config.head_dim, base.get_input_embeddings().embedding_dim  # noqa: E741
    resampler = R * D + F * D + depth * (4 * D + 4 * D * I + 2 * D + 8 * D**2) + 2 * D
    block = 2 * d + d * I + 2 * D * I + I * d + 1 + 2 * d + 8 * d**2 + 1
    return resampler + 2 * block + d


# Widths of the layers of each family's encoders that attend to their own sequence through a known mask.
SELF_ATTENDING = {
    "CLIPModel": [48, 48, 32, 32],
    "SiglipModel": [48, 48, 32, 32],
    "ChineseCLIPModel": [48, 48, 32, 32],
    "AltCLIPModel": [48, 48, 32, 32],
    "VisionTextDualEncoderModel": [48, 48, 32, 32],
    "BlipForImageTextRetrieval": [48, 48, 32, 32],
    "FlavaModel": [48, 48, 32, 32, 40, 40],
    "ViltForQuestionAnswering": [32, 32],
    "BridgeTowerForImageAndTextRetrieval": [64, 64, 32, 32, 32, 32, 32, 32],  # both streams of the fusion
    "BlipForQuestionAnswering": [32, 32, 32, 32],
    "BlipForConditionalGeneration": [48, 48],
    "Blip2ForConditionalGeneration": [48, 48, 32, 32],
    "LlavaForConditionalGeneration": [48, 48, 48],
    "Qwen2_5_VLForConditionalGeneration": [48, 48],
    "PaliGemmaForConditionalGeneration": [48, 48],
    "Idefics3ForConditionalGeneration": [48, 48],
    "MllamaForConditionalGeneration": [16, 16, 16],  # local and global
    "Florence2ForConditionalGeneration": [32, 32],  # the text's: the pictures' convolve
}


def domain_parameters(base: nn.Module, config: HardSampleDomainAdapterConfig) -> int:
    """2 d + (d m + m) + n (12 m^2 + 13 m) + m d + 1 a layer."""
    m, n = config.bottleneck_dim, config.num_layers
    widths = SELF_ATTENDING[type(base).__name__]
    return sum(2 * d + (d * m + m) + n * (12 * m**2 + 13 * m) + m * d + 1 for d in widths)


def structured_prompt_parameters(base: nn.Module, config: StructuredPromptConfig) -> int:
    """(M_g + n_dom M_d + M_i) d_t + d_t (2 + 2 a) + d_v (2 + 2 a) + 1, with d_t 32 and d_v 48."""
    tokens = config.num_general + config.num_domains * config.num_domain + config.num_instance
    return 32 * tokens + (32 + 48) * (2 + 2 * config.attention_dim) + 1


PARAMETERS: dict[str, Callable[[nn.Module, Any], int]] = {
    "aurora_mode_approx": aurora_parameters,
    "aurora_mode_approx-fusion": aurora_parameters,
    "cross_lingual_adapter": cross_lingual_parameters,
    "gated_xattn": gated_xattn_parameters,
    "hard_sample_domain_adapter": domain_parameters,
    "structured_prompt": structured_prompt_parameters,
}

# What no optimizer may decay.
NO_DECAY = re.compile(r"norm|bias|gate|scale|shift|gamma|lambda|_P[._]")


# ------------------------------------------------------------------------------------------------------------- steps


def wrap(family: Family, method: str, stirred: bool = True, base: nn.Module | None = None, **changes: Any) -> PeftModel:
    """A fresh model with an adapter: as it is at its start, or `stirred`, far from it."""
    name = changes.pop("adapter_name", "default")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(base or family.build(), METHODS[method](family, **changes), adapter_name=name)
    fill(family, model)
    return stir(model, name) if stirred else model


def fill(family: Family, model: PeftModel) -> None:
    """Put something into the active adapter's context bank, without which its gate has no gradient."""
    ready(model)
    if any(getattr(config, "use_ice", False) for config in model.peft_config.values()):
        model.base_model.collect_context([family.text_inputs(model)])


def adapter(model: PeftModel, name: str = "default") -> dict[str, nn.Parameter]:
    """The parameters of an adapter."""
    prefix = model.base_model.prefix
    found = {n: p for n, p in model.named_parameters() if f".{prefix}" in n and adapter_of(n, prefix) == name}
    assert found
    return found


def adapter_of(tensor: str, prefix: str) -> str:
    """The adapter that a tensor belongs to: its name follows its container's, `<prefix>P_norm.default`."""
    return tensor.rpartition(f".{prefix}")[2].split(".")[1]


@torch.no_grad()
def stir(model: PeftModel, name: str = "default", seed: int = 0) -> PeftModel:
    """Move every parameter of an adapter by noise."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter(model, name).values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(0.1 * noise.to(parameter))
    return model


def ready(model: nn.Module, tokenizer: Any = None) -> nn.Module:
    """With a tokenizer, for the method that reads captions with it: none is saved."""
    for part in (m for m in model.modules() if isinstance(m, PromptedClassifier)):
        if part.tokenizer is None:
            part.set_tokenizer(tokenizer or word_tokenizer())
    return model


@torch.no_grad()
def run(family: Family, model: nn.Module, **changes: Any) -> Tensor:
    """The model's output on the family's batch."""
    ready(model)
    return family.output(model(**{**inputs(family, model), **changes}))


def inputs(family: Family, model: nn.Module) -> dict[str, Any]:
    """The batch in the dtype of the model."""
    dtype = next(p.dtype for p in model.parameters())
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in family.inputs(model).items()}


def gradients(family: Family, model: PeftModel, name: str = "default") -> dict[str, Tensor | None]:
    model.zero_grad()
    family.loss(model).backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in adapter(model, name).items()}


def silent(family: Family, parameter: str) -> bool:
    """Whether the output never depends on the module of a parameter."""
    return parameter.removeprefix("base_model.model.").startswith(family.silent or " ")


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything that a method could leave behind in a model."""
    return {
        path: (
            type(module),
            set(vars(module)) - {"peft_config"},  # PEFT leaves it after any method
            {k: len(v) for k, v in vars(module).items() if "hooks" in k and hasattr(v, "__len__")},
            *(list(vars(module)[k]) for k in ("_modules", "_parameters", "_buffers")),
        )
        for path, module in model.named_modules()
    }


# --------------------------------------------------------------------------------------------------- a fresh process


def save_all(method: str, folder: Path) -> None:
    """An adapter of each family and its outputs."""
    for name in (n for n, m in CASES if m == method):
        family = FAMILIES[name]
        model = wrap(family, method)
        model.save_pretrained(folder / name)
        torch.save({"base": run(family, family.build()), "adapted": run(family, model)}, folder / name / "outputs.pt")


def reload_all(folder: Path) -> dict[str, list[float]]:
    """{family: [distance to the output that was saved, to the base model's]}."""
    result = {}
    for path in sorted(folder.iterdir()):
        family, saved = FAMILIES[path.name], torch.load(path / "outputs.pt")
        output = run(family, PeftModel.from_pretrained(family.build(), path))
        result[path.name] = [distance(output, saved["adapted"]), distance(output, saved["base"])]
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(reload_all(Path(sys.argv[1]))))
