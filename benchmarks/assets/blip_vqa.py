"""A BLIP question answerer from pretrained towers, taught easy-VQA's questions about some of its colours.

No package ships a VQA model, so `blip_vqa()` assembles one: a `BlipForQuestionAnswering` with DINOv2-S as its vision
tower and MiniLM in its text encoder and decoder, in one folder with its `BlipProcessor`. What the towers lack, the
cross-attentions and the decoder's head, starts at random. All but the vision tower learns from the old colours' part of
`vqa_questions()`; the new colours are drawn by a seed, and neither they nor their names are ever seen.
`assembly.json` beside the weights holds the settings and the accuracies on validation images.
"""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.progress import track
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertModel,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    BlipProcessor,
    Dinov2Model,
)

from .easy_vqa import easy_vqa
from .fetch import CONSOLE, AssetError, build_once
from .towers import dinov2_small, minilm

KINDS = ("colour", "shape")
"""What is asked. Yes-or-no questions are left out: after training for minutes, this base still answered them by chance."""


@dataclass(frozen=True)
class Settings:
    """What the base learns, and how."""

    new_colours: int = 3
    colour_seed: int = 0
    image_size: int = 56
    steps: int = 240
    batch_size: int = 32
    learning_rate: float = 5e-4
    """Of the parameters that start at random."""
    tower_learning_rate: float = 5e-5
    """Of those that come from MiniLM."""
    weight_decay: float = 0.05
    seed: int = 0


def blip_vqa() -> Path:
    """The model's folder: load it with `BlipForQuestionAnswering` and `BlipProcessor`."""
    return build_once("blip-vqa-1", lambda folder: _build(folder, Settings()))


def vqa_questions(settings: Settings = Settings()) -> datasets.Dataset:
    """The questions of `easy_vqa()` for a colour or a shape: rows with `kind` and `colours` besides.

    `colours` is the image's part of the colours, `old` or `new`; where neither question nor answer of an image names
    its colour, its rows are left out.
    """
    rows = easy_vqa().filter(lambda question: question.startswith("what"), input_columns="question")
    colours = {a for q, a in zip(rows["question"], rows["answer"], strict=True) if "color" in words_of(q)}
    new = set(random.Random(settings.colour_seed).sample(sorted(colours), settings.new_colours))
    shown: dict[str, str] = {}
    for image, question, answer in zip(rows["image_id"], rows["question"], rows["answer"], strict=True):
        if named := (words_of(question) | {answer}) & colours:
            shown[image] = named.pop()
    rows = rows.add_column("kind", ["colour" if answer in colours else "shape" for answer in rows["answer"]])
    parts = ["unknown" if p not in shown else "new" if shown[p] in new else "old" for p in rows["image_id"]]
    return rows.add_column("colours", parts).filter(lambda part: part != "unknown", input_columns="colours")


def words_of(question: str) -> set[str]:
    return set(question.rstrip("?").split())


def balanced(rows: datasets.Dataset, size: int, rng: random.Random) -> datasets.Dataset:
    """`size` rows, each kind as often as the others and within a kind each answer, repeated where there are too few."""
    cells: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, (kind, answer) in enumerate(zip(rows["kind"], rows["answer"], strict=True)):
        cells[kind][answer].append(index)
    chosen: list[int] = []
    for position, kind in enumerate(KINDS):
        wanted = (size + position) // len(KINDS)
        answers = [rng.sample(found, len(found)) for _, found in sorted(cells[kind].items())]
        rng.shuffle(answers)
        for turn in range(wanted):
            found = answers[turn % len(answers)]
            chosen.append(found[turn // len(answers) % len(found)])
    rng.shuffle(chosen)
    return rows.select(chosen)


# --- the towers in BLIP's classes ------------------------------------------------------------------------------------


def assemble(image_size: int) -> tuple[Any, Any]:
    """The untrained model, whose vision tower is DINOv2 exactly, and its processor."""
    vision: Any = Dinov2Model.from_pretrained(dinov2_small())
    text = BertModel.from_pretrained(minilm())
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    config = BlipConfig(
        vision_config={
            "hidden_size": vision.config.hidden_size,
            "intermediate_size": vision.config.hidden_size * vision.config.mlp_ratio,
            "num_hidden_layers": vision.config.num_hidden_layers,
            "num_attention_heads": vision.config.num_attention_heads,
            "image_size": image_size,
            "patch_size": vision.config.patch_size,
            "layer_norm_eps": vision.config.layer_norm_eps,
            "initializer_range": vision.config.initializer_range,
        },
        text_config={
            name: getattr(text.config, name)
            for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "max_position_embeddings", "hidden_act", "layer_norm_eps", "initializer_range",
            )
        }
        | {
            "bos_token_id": tokenizer.cls_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )  # fmt: skip
    model: Any = BlipForQuestionAnswering(config)
    side = image_size // vision.config.patch_size
    model.vision_model.load_state_dict(vision_weights(vision, side))
    for tower in (model.text_encoder, model.text_decoder.bert):
        report = tower.load_state_dict(text_weights(text), strict=False)
        if report.unexpected_keys or not all(".crossattention." in key for key in report.missing_keys):
            raise AssetError(f"MiniLM does not fit BLIP's text tower in this transformers version: {report}")
        for layer in tower.encoder.layer:  # the norm after the cross-attention begins near the identity
            norm, after = layer.attention.output.LayerNorm.state_dict(), layer.crossattention.output.LayerNorm
            torch.nn.init.constant_(after.weight, (norm["weight"].square().mean() + norm["bias"].var()).sqrt().item())
            torch.nn.init.constant_(after.bias, norm["bias"].mean().item())
    for layer in model.text_decoder.bert.encoder.layer:  # it reads MiniLM's states, as its self-attention does
        layer.crossattention.load_state_dict(layer.attention.state_dict())
    images = BlipImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return model, BlipProcessor(images, tokenizer)


@torch.no_grad()
def vision_weights(dino: Any, side: int) -> dict[str, Tensor]:
    """DINOv2's weights as those of a `BlipVisionModel` for `side` x `side` patches, the layer scales multiplied in."""
    found = dino.state_dict()
    grid = torch.empty(1, side * side + 1, dino.config.hidden_size)
    pixels = side * dino.config.patch_size
    weights = {
        "embeddings.class_embedding": found["embeddings.cls_token"],
        "embeddings.position_embedding": dino.embeddings.interpolate_pos_encoding(grid, pixels, pixels),
        "post_layernorm.weight": found["layernorm.weight"],
        "post_layernorm.bias": found["layernorm.bias"],
    }
    for kind in ("weight", "bias"):
        weights[f"embeddings.patch_embedding.{kind}"] = found[f"embeddings.patch_embeddings.projection.{kind}"]
    prefix = next(key for key in found if key.endswith(".0.norm1.weight")).removesuffix("0.norm1.weight")
    for index in range(dino.config.num_hidden_layers):
        for kind in ("weight", "bias"):

            def of(name: str, scale: str | None = None, source: str = f"{prefix}{index}", kind: str = kind) -> Tensor:
                value = found[f"{source}.{name}.{kind}"]
                if scale is None:
                    return value
                factor = found[f"{source}.{scale}.lambda1"]
                return value * (factor[:, None] if value.dim() == 2 else factor)

            target = f"encoder.layers.{index}"
            weights |= {
                f"{target}.layer_norm1.{kind}": of("norm1"),
                f"{target}.layer_norm2.{kind}": of("norm2"),
                f"{target}.self_attn.qkv.{kind}": torch.cat([of(f"attention.{letter}_proj") for letter in "qkv"]),
                f"{target}.self_attn.projection.{kind}": of("attention.o_proj", "layer_scale1"),
                f"{target}.mlp.fc1.{kind}": of("mlp.fc1"),
                f"{target}.mlp.fc2.{kind}": of("mlp.fc2", "layer_scale2"),
            }
    return weights


def text_weights(bert: BertModel) -> dict[str, Tensor]:
    """BERT's weights as those of a `BlipTextModel`, which has no token types: the first one joins the positions."""
    weights = {name: value for name, value in bert.state_dict().items() if not name.startswith("pooler.")}
    types = weights.pop("embeddings.token_type_embeddings.weight")
    weights["embeddings.position_embeddings.weight"] = weights["embeddings.position_embeddings.weight"] + types[0]
    return weights


# --- the base --------------------------------------------------------------------------------------------------------


def _build(folder: Path, settings: Settings) -> None:
    started = time.perf_counter()
    rng = random.Random(settings.seed)
    torch.manual_seed(settings.seed)
    model, processor = assemble(settings.image_size)
    rows = vqa_questions(settings).filter(lambda part: part == "old", input_columns="colours")
    train = rows.filter(lambda split: split == "train", input_columns="split")
    model.vision_model.requires_grad_(False)
    for tower in (model.text_encoder, model.text_decoder.bert):
        tower.embeddings.requires_grad_(False)  # the words that are not taught stay where they were
    train_text(model, processor, balanced(train, settings.steps * settings.batch_size, rng), settings)

    model.requires_grad_(True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    validation = rows.filter(lambda split: split == "validation", input_columns="split")
    accuracies = accuracy(model, processor, balanced(validation, 300, rng))
    seconds = round(time.perf_counter() - started, 1)
    report = {"settings": asdict(settings), "validation_accuracy": accuracies, "build_seconds": seconds}
    (folder / "assembly.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    CONSOLE.print(f"BLIP for VQA assembled in {seconds:.0f} s; accuracy on the old colours in per cent:", accuracies)


def question_length(tokenizer: Any) -> int:
    """Tokens of easy-VQA's longest question: every question is padded to it, see `QuestionAnswerCollator`."""
    return max(map(len, tokenizer(sorted(set(easy_vqa()["question"])))["input_ids"]))


def encode_images(model: Any, processor: Any, rows: datasets.Dataset) -> dict[str, Tensor]:
    """The vision tower's states `(patches + 1, width)` of each image of `rows`, by its `image_id`."""
    first = {image: index for index, image in enumerate(rows["image_id"])}
    names, states = list(first), []
    with torch.inference_mode():
        for start in track(range(0, len(names), 64), "Encoding images", console=CONSOLE, transient=True):
            images = rows.select([first[name] for name in names[start : start + 64]])["image"]
            batch = processor.image_processor([image.convert("RGB") for image in images], return_tensors="pt")
            states.append(model.vision_model(**batch).last_hidden_state)
    return dict(zip(names, torch.cat(states), strict=True))


def train_text(model: Any, processor: Any, rows: datasets.Dataset, settings: Settings) -> None:
    """One pass over `rows` with the answers' cross-entropy: text encoder, decoder and its head."""
    states = encode_images(model, processor, rows)
    length = question_length(processor.tokenizer)
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["fresh" if "crossattention" in name or ".cls." in name else "tower"].append(parameter)
    rates = {"fresh": settings.learning_rate, "tower": settings.tower_learning_rate}
    optimizer = torch.optim.AdamW(
        [{"params": groups[name], "lr": rate} for name, rate in rates.items()], weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, list(rates.values()), total_steps=settings.steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    columns = {name: rows[name] for name in ("image_id", "question", "answer")}
    for step in track(range(settings.steps), "Training the question answerer", console=CONSOLE, transient=True):
        part = slice(step * settings.batch_size, (step + 1) * settings.batch_size)
        images = torch.stack([states[name] for name in columns["image_id"][part]])
        asked = processor.tokenizer(
            columns["question"][part], padding="max_length", max_length=length, return_tensors="pt"
        )
        answers = processor.tokenizer(columns["answer"][part], padding=True, return_tensors="pt")
        fused = model.text_encoder(
            asked["input_ids"], attention_mask=asked["attention_mask"], encoder_hidden_states=images
        ).last_hidden_state
        loss = model.text_decoder(
            answers["input_ids"],  # begin with [CLS], the decoder's start token
            attention_mask=answers["attention_mask"],
            encoder_hidden_states=fused,
            labels=answers["input_ids"].masked_fill(answers["attention_mask"] == 0, -100),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.inference_mode()
def accuracy(model: Any, processor: Any, rows: datasets.Dataset) -> dict[str, float]:
    """Share in per cent of the questions of each kind whose generated answer is right."""
    length, right = question_length(processor.tokenizer), defaultdict(list)
    for batch in rows.batch(64):
        inputs = processor(
            images=[image.convert("RGB") for image in batch["image"]],
            text=batch["question"],
            padding="max_length",
            max_length=length,
            return_tensors="pt",
        )
        said = processor.batch_decode(model.generate(**inputs, max_new_tokens=4), skip_special_tokens=True)
        for kind, answer, expected in zip(batch["kind"], said, batch["answer"], strict=True):
            right[kind].append(answer == expected)
    return {kind: round(100 * sum(right[kind]) / len(right[kind]), 1) for kind in KINDS}
