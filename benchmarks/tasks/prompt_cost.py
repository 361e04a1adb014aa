"""What prompts that look at the image cost beside CoOp, at the shape of CLIP-base's text tower.

Times are medians of paired ratios, interleaved in one process with one thread, relative to CoOp with trimmed sequences,
which reads C texts where a prompt for each image makes B C. Memory is what a forward pass keeps for backward, and the
highest resident memory of a whole step in a process of its own. Weights are random, images are given patches, and every
context is moved off its start first.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPooling

from peft_multimodal import StructuredPromptConfig

from .. import report as tables
from ..experiment import Experiment
from ..peers.prompts import CoCoOp
from ..records import Record
from . import Split
from .speed import cell, interleaved, ratios, saved_bytes

IMAGES, PATCHES, NAME_TOKENS = 4, 49, 3
PREFIX = {"general_init": None, "num_general": 4, "num_domain": 2, "num_instance": 4}
METHODS = {
    "CoOp, trimmed": PREFIX | {"num_instance": 0},
    "CoCoOp, padded to 77": None,
    "StructuredPrompt, whole sequences": PREFIX,
    "StructuredPrompt, GDI": PREFIX | {"order": "GDI"},
    "StructuredPrompt, GID": PREFIX | {"order": "GID"},
}
COOP, NAIVE, WHOLE, GDI, GID = METHODS
KNOWN = "StructuredPrompt, GDI, class list known"


def words(size: int = 1000) -> PreTrainedTokenizerFast:
    """A tokenizer of words w0, w1, ... with CLIP's frame."""
    vocabulary = {"[PAD]": 0, "[BOS]": 49406, "[EOS]": 49407} | {f"w{i}": i + 1 for i in range(size)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    frame = [(token, vocabulary[token]) for token in ("[BOS]", "[EOS]")]
    made.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=frame)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]")


def clip_with_given_patches(layers: int = 12) -> CLIPModel:
    """CLIP with the base's text tower, frozen; its vision tower gives the same patches whatever it sees."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(num_hidden_layers=1)
    model = CLIPModel(CLIPConfig(text_config=CLIPTextConfig(num_hidden_layers=layers), vision_config=vision))
    states = torch.randn(IMAGES, 1 + PATCHES, vision.hidden_size)

    def forward(pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        seen = states[: len(pixel_values)]
        return BaseModelOutputWithPooling(last_hidden_state=seen, pooler_output=seen[:, 0])

    model.vision_model.forward = forward
    return model.requires_grad_(False).eval()


def names(classes: int) -> list[str]:
    return [" ".join(f"w{(i // 1000**k) % 1000}" for k in range(NAME_TOKENS)) for i in range(classes)]


def classifier(method: str, classes: int, chunk_size: int | None = None, layers: int = 12) -> nn.Module:
    """The method's model for so many classes, all of them at once unless `chunk_size` is given."""
    model, tokenizer, options = clip_with_given_patches(layers), words(), METHODS[method]
    torch.manual_seed(1)
    if options is None:
        peer = CoCoOp(model, tokenizer, "w1 w2 w3 w4", padded=True)
        peer.set_classes(names(classes))
        return peer
    wrapped: Any = get_peft_model(model, StructuredPromptConfig(chunk_size=chunk_size or classes, **options))
    wrapped.set_classes(names(classes), tokenizer)
    for name, parameter in wrapped.named_parameters():
        if "attention.out" in name:
            nn.init.normal_(parameter, std=0.02)
    if method in (COOP, WHOLE):
        wrapped.base_model.classifier().reader.attention.give_back()  # no prefix is reused
    return wrapped


def batch() -> dict[str, Tensor]:
    return {"pixel_values": torch.zeros(IMAGES, 3, 224, 224), "labels": torch.arange(IMAGES)}


def train_step(model: nn.Module) -> None:
    model(**batch()).loss.backward()
    model.zero_grad()


@torch.no_grad()
def forward(model: Any, forget: bool = True) -> None:
    """Logits of a batch; `forget`: nothing is known of the class list."""
    if forget and hasattr(model, "base_model"):
        model.base_model.classifier().keeper.kept.clear()
    model(pixel_values=batch()["pixel_values"])


def training(classes: int, rounds: int) -> dict[str, Any]:
    """A training step, relative to CoOp trimmed."""
    models_ = {name: classifier(name, classes).train() for name in METHODS}
    steps: dict[str, Callable[[], Any]] = {name: lambda m=m: train_step(m) for name, m in models_.items()}  # type: ignore[misc]
    seconds = interleaved(steps, rounds)
    return {"relative_to_coop": ratios(seconds, COOP), "relative_to_naive": ratios(seconds, NAIVE)}


def reading(classes: int, rounds: int) -> dict[str, Any]:
    """A forward pass without gradients, relative to CoOp trimmed, which reads its texts anew."""
    models_ = {name: classifier(name, classes).eval() for name in METHODS if name != NAIVE}
    steps: dict[str, Callable[[], Any]] = {name: lambda m=m: forward(m) for name, m in models_.items()}  # type: ignore[misc]
    known = classifier(GDI, classes).eval()
    steps[KNOWN] = lambda: forward(known, forget=False)
    return ratios(interleaved(steps, rounds), COOP)


def held(classes: int) -> dict[str, int]:
    """Bytes that a training step keeps for backward; the naive one's for ten classes, times the rest: computed."""
    found = {}
    for name in METHODS:
        counted = min(classes, 10) if name == NAIVE else classes
        found[name] = saved_bytes(classifier(name, counted).train(), batch()) * classes // counted
    return found


def peak(classes: int, chunk_size: int) -> int:
    """Bytes of resident memory that one training step (GDI) adds at its highest, in a process of its own."""
    code = f"from benchmarks.tasks.prompt_cost import peak_here; print(peak_here({classes}, {chunk_size}))"
    # Freed memory goes back at once: what the step needs is counted, and not what malloc keeps of it for later.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=settings).stdout
    return int(json.loads(output.splitlines()[-1]))


def peak_here(classes: int, chunk_size: int) -> int:
    torch.set_num_threads(1)
    model = classifier(GDI, classes, chunk_size).train()
    train_step(classifier(GDI, IMAGES, 1).train())  # what the first step of a process takes for good
    gc.collect()  # the first model is gone before the step, and not in its midst
    Path("/proc/self/clear_refs").write_text("5")  # the highest is what there is now
    before = highest()
    train_step(model)
    return highest() - before


def highest() -> int:
    """The process's largest resident memory in bytes. What getrusage says includes that of the process's parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


# ------------------------------------------------------------------------------------------------------------ the task


def run(experiment: Experiment, seed: int, split: Split) -> dict[str, Any]:
    """Measure everything once; there is nothing random in it but the machine."""
    torch.set_num_threads(1)
    settings = experiment.settings
    rounds, few, many, most = (settings[key] for key in ("rounds", "few", "many", "most"))
    if "max_steps" in experiment.training:  # a smoke test
        rounds, few, many, most = 2, 4, 8, 16
    items = {
        "sizes": {"few": few, "many": many, "most": most, "chunk_size": settings["chunk_size"]},
        "training": training(few, rounds),
        "forward": reading(many, rounds),
        "held": {str(classes): held(classes) for classes in (few, many)},
        "peak": {str(classes): peak(classes, settings["chunk_size"]) for classes in (many, most)},
    }
    return {
        "metrics": {"training": items["training"]["relative_to_coop"][GDI]["median"]},
        "items": items,
        "cost": {},
    }


def score(metrics: Mapping[str, float]) -> float:
    """Time of a training step relative to CoOp; nothing is chosen by it."""
    return metrics["training"]


def report(records: Sequence[Record], plots: Path) -> str:
    """Time and memory."""
    items = records[0].items
    few, many, most, chunk = (items["sizes"][key] for key in ("few", "many", "most", "chunk_size"))
    step = items["training"]
    rows = []
    for name in (*METHODS, KNOWN):
        timed = name in step["relative_to_coop"]
        rows.append(
            [
                name,
                cell(step["relative_to_coop"][name]) if timed else "",
                f"{1 / step['relative_to_naive'][name]['median']:.1f}" if timed else "",
                cell(items["forward"][name]) if name in items["forward"] else "",
                *(f"{items['held'][str(c)][name] / 2**20:.0f}" if timed else "" for c in (few, many)),
            ]
        )
    heads = [
        f"training step, C {few} / CoOp",
        "times under naive",
        f"forward, C {many} / CoOp",
        f"kept for backward, C {few}, MiB",
        f"C {many}, MiB",
    ]
    peaks = items["peak"]
    return (
        f"{IMAGES} images a batch, names of {NAME_TOKENS} tokens, 4 general, 2 domain and 4 instance tokens, all classes "
        "at once. Medians of paired ratios [quartiles]. The naive row's memory at many classes is computed from that of ten.\n\n"
        + tables.markdown(["", *heads], rows)
        + f"\nWith chunk_size={chunk} a whole training step (GDI) adds {peaks[str(many)] / 2**30:.2f} GiB of resident memory "
        f"at {many} classes and {peaks[str(most)] / 2**30:.2f} GiB at {most}: {peaks[str(most)] / peaks[str(many)]:.2f} times.\n"
    )
