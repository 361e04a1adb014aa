"""Does every method train, save, load and compile on this GPU, and what does a step cost beside LoRA's?

    python -m benchmarks.gpu_check                              # make gpu-check; says why and stops where there is no GPU
    python -m benchmarks.gpu_check --device cpu --size tiny --rounds 1 --compiler eager    # the script itself

Methods come from the registry, their configs from the cases of their tests (`tests/case.py`). Models have random weights
of the named shapes (CLIP ViT-B/32; a language model of SmolLM2-135M's shape), with small vocabularies. Times are
medians of interleaved training steps under bfloat16 autocast, with the quartiles of their ratios to LoRA's step of the
same round; memory is the allocator's peak in one step over what stood there before. Results are kept under the
device's name in `results/gpu_check/`. The exit code is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

import peft_multimodal as pm

from .records import RESULTS, compact, environment, write_atomically
from .report import markdown
from .tasks.speed import ratios

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from case import ANY_MARKER, ANY_WIDTH, declared
from families import BOS, EOS, PAD, VOCAB, reads_media
from methods import word_tokenizer

LORA = "LoRA r=16"
CLASSES = ["w4 w5", "w6", "w7 w8 w9", "w4"]
SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
Batch = dict[str, Any]


@dataclass(frozen=True)
class Base:
    """A frozen model's shape and its batch."""

    name: str
    build: Callable[[bool], nn.Module]  # of a tiny shape or the whole
    batch: Callable[[bool], Batch]


@dataclass(frozen=True)
class Trial:
    """A method as it is checked: its config, and whether it tells classes apart."""

    config: Callable[[], PeftConfig]
    classes: bool = False


# --- the models ------------------------------------------------------------------------------------------------------


def tower(tiny: bool, width: int, layers: int, **rest: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = small if tiny else sizes
    return {**shape, "intermediate_size": 4 * shape["hidden_size"], **rest}


def clip(tiny: bool) -> CLIPModel:
    vision = {**tower(tiny, 768, 12), "image_size": 32 if tiny else 224, "patch_size": 16 if tiny else 32}
    text = tower(tiny, 512, 12, vocab_size=VOCAB, **SPECIAL)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision))


def clip_batch(tiny: bool) -> Batch:
    rows, size = (2, 32) if tiny else (64, 224)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCAB, (rows, 16), generator=generator)
    ids[:, -1] = VOCAB - 1  # CLIP models of old configs (eos_token_id 2) pool at the largest id
    return {
        "pixel_values": torch.randn(rows, 3, size, size, generator=generator),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


def lm(tiny: bool) -> LlamaForCausalLM:
    sizes = {**tower(tiny, 576, 30), "num_key_value_heads": 1 if tiny else 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000 if tiny else 49152, **sizes))


def lm_batch(tiny: bool) -> Batch:
    rows, length = (2, 12) if tiny else (16, 256)
    ids = torch.randint(10, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = ANY_MARKER  # of an image, where an adapter reads one
    return {"input_ids": ids, "labels": ids.clone()}


BASES = [Base("CLIP ViT-B/32", clip, clip_batch), Base("language model, 135M", lm, lm_batch)]


def trials(base: Base, tiny: bool, only: str) -> dict[str, Trial]:
    """{method: how it is checked} of LoRA and of the registered methods that the base takes."""
    chosen = {LORA: Trial(lambda: LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj"]))}
    with torch.device("meta"):
        model = base.build(tiny)
    for case in declared().values():
        config = case.anywhere if tiny else case.whole or case.anywhere
        if config is None or not re.search(only, case.method.title):
            continue
        try:
            pm.matched_modules(model, config())
        except ValueError as refusal:
            if not case.refusal or case.refusal not in str(refusal):
                raise
        else:
            chosen[case.method.title] = Trial(config, case.promises.classes)
    return chosen


# --- the checks ------------------------------------------------------------------------------------------------------


class Checks:
    """What one method does on one base, each check by itself: a failure is a result, not the end."""

    def __init__(self, base: Base, trial: Trial, device: torch.device, tiny: bool, compiler: str) -> None:
        self.base, self.trial, self.device, self.tiny, self.compiler = base, trial, device, tiny, compiler
        self.batch = {k: v.to(device) for k, v in base.batch(tiny).items()}
        self.model = self.fresh()
        self.found: dict[str, Any] = {}

    def frozen(self) -> Any:
        torch.manual_seed(0)
        return self.base.build(self.tiny).requires_grad_(False).to(self.device).eval()

    def fresh(self) -> Any:
        torch.manual_seed(0)
        return self.prepared(get_peft_model(self.frozen(), self.trial.config()))

    def prepared(self, model: Any) -> Any:
        if self.trial.classes:
            model.set_classes(CLASSES, word_tokenizer())
        return model

    def loss(self, model: Any, batch: Batch | None = None) -> Tensor:
        batch = batch or self.batch
        if self.trial.classes:
            images = batch["pixel_values"]
            labels = torch.arange(len(images), device=images.device) % len(CLASSES)
            return model(pixel_values=images, labels=labels).loss
        if reads_media(self.model):
            rows = len(batch["input_ids"])
            features = torch.linspace(-1, 1, ANY_WIDTH, device=self.device).expand(rows, 1, 1, 50, -1)
            batch = {**batch, "vision_features": features}
        return model(**batch, **({} if "labels" in batch else {"return_loss": True})).loss

    @torch.no_grad()
    def value(self, model: Any) -> float:
        return float(self.loss(model.eval()))

    def gradients(self, model: Any, run: Any = None) -> dict[str, Tensor]:
        model.zero_grad()
        self.loss(model if run is None else run).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def run(self) -> dict[str, Any]:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.found["parameters"] = sum(p.numel() for p in self.trained)
        for check in (self.trains, self.half, self.checkpoints, self.saves, self.switches, self.compiles, self.graphs):
            self.found[check.__name__] = self.outcome(check)
        return self.found

    def outcome(self, check: Callable[[], str]) -> str:
        try:
            return check()
        except Exception as error:  # whatever it is, it belongs into the table
            return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"

    def trains(self) -> str:
        """Ten steps under bfloat16 autocast lower the loss; every parameter gets a finite gradient."""
        optimizer = torch.optim.AdamW(self.trained, lr=1e-3)
        losses = []
        for _ in range(10):
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.loss(self.model.train())
            optimizer.zero_grad()
            loss.backward()
            _require(all(p.grad is not None and p.grad.isfinite().all() for p in self.trained), "a gradient is missing")
            optimizer.step()
            losses.append(float(loss.detach()))
        _require(losses[-1] < losses[0], f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
        return "ok"

    def half(self) -> str:
        """A bfloat16 and a float16 base give what the float32 base gives, as near as their digits go."""
        exact = self.value(self.model)
        for dtype in (torch.bfloat16, torch.float16):
            half = self.fresh()
            half.load_state_dict(self.model.state_dict())
            half = half.to(dtype)
            batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.batch.items()}
            with torch.no_grad():
                value = float(self.loss(half.eval(), batch))
            _require(abs(value - exact) <= 0.05 * abs(exact) + 0.05, f"{dtype}: a loss of {value:.4f}, not {exact:.4f}")
        return "ok"

    def checkpoints(self) -> str:
        """Gradient checkpointing, which on a GPU recomputes in another thread, gives the same gradients."""
        self.model.train()
        with exact(self.device):
            expected = self.gradients(self.model)
            for reentrant in (False, True):
                other = copy.deepcopy(self.model)
                other.gradient_checkpointing_enable({"use_reentrant": reentrant})
                if reentrant:
                    other.enable_input_require_grads()
                for name, gradient in self.gradients(other).items():
                    off = float((gradient - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-6))
                    _require(off <= 1e-2, f"use_reentrant={reentrant}: {name} is off by {off:.1e}")
        return "ok"

    def saves(self) -> str:
        """Saved and loaded into a new base it gives the same loss."""
        expected = self.value(self.model)
        with tempfile.TemporaryDirectory() as folder:
            pm.save(self.model, Path(folder, "adapter"), save_embedding_layers=False)
            loaded = PeftModel.from_pretrained(self.frozen(), str(Path(folder, "adapter")))
            value = self.value(self.prepared(loaded))
        _require(abs(value - expected) <= 1e-5 * max(1.0, abs(expected)), f"{value} after loading, {expected} before")
        return "ok"

    def switches(self) -> str:
        """Switched off, and taken out, it is the base model, to the last bit."""
        other = copy.deepcopy(self.model).eval()
        bare = {k: v for k, v in self.batch.items() if k != "labels"}
        with torch.no_grad(), exact(self.device):
            expected = self.frozen()(**bare)[0]
            with other.disable_adapter():
                _require(torch.equal(other(**bare)[0], expected), "disabled it isn't the base model")
            _require(torch.equal(other.unload()(**bare)[0], expected), "taken out it isn't the base model")
        return "ok"

    def compiles(self) -> str:
        """One graph without a break gives the same loss and gradients."""
        torch._dynamo.reset()
        self.model.train()
        expected, compiled = (
            self.gradients(self.model),
            torch.compile(self.model, fullgraph=True, backend=self.compiler),
        )
        for name, gradient in self.gradients(self.model, compiled).items():
            off = float((gradient - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-6))
            _require(off <= 5e-2, f"{name} is off by {off:.1e}")
        return "ok"

    def graphs(self) -> str:
        """CUDA graphs (`mode="reduce-overhead"`), replayed, give the same loss."""
        if self.device.type != "cuda":
            return "no GPU"
        torch._dynamo.reset()
        expected, compiled = self.value(self.model), torch.compile(self.model, mode="reduce-overhead")
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                value = float(self.loss(compiled))
            _require(abs(value - expected) <= 1e-2 * max(1.0, abs(expected)), f"{value}, not {expected}")
        return "ok"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Without TensorFloat32, whose rounding depends on the shapes of a call."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# --- time and memory -------------------------------------------------------------------------------------------------


def costs(
    base: Base, methods: dict[str, Trial], device: torch.device, tiny: bool, rounds: int
) -> dict[str, dict[str, Any]]:
    """{method: seconds of a training step, its ratio to LoRA's, bytes at its peak}, steps interleaved."""
    steps = {method: training_step(base, trial, device, tiny) for method, trial in methods.items()}
    seconds: dict[str, list[float]] = {method: [] for method in steps}
    peaks: dict[str, int | None] = {}
    for round_ in range(rounds + 2):
        for method, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                peaks[method] = torch.cuda.max_memory_allocated(device) - before
            if round_ >= 2:  # two rounds that don't count
                seconds[method].append(time.perf_counter() - start)
    paired = ratios(seconds, LORA) if rounds > 1 else {}
    return {
        method: {
            "step_seconds": statistics.median(values),
            "relative_to_lora": paired.get(method),
            "peak_bytes": peaks.get(method),
        }
        for method, values in seconds.items()
    }


def training_step(base: Base, trial: Trial, device: torch.device, tiny: bool) -> Callable[[], None]:
    checks = Checks(base, trial, device, tiny, "eager")
    model = checks.model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = checks.loss(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# --- the command -----------------------------------------------------------------------------------------------------


def report(found: dict[str, Any]) -> str:
    """A table for each base."""
    texts = []
    for name, methods in found["bases"].items():
        checks = [key for key in next(iter(methods.values())) if key not in ("parameters", "cost")]
        header = ["method", "parameters", *checks, "step, ms", "of LoRA's [quartiles]", "peak, MiB"]
        rows = []
        for method, result in methods.items():
            cost, ratio = result["cost"], result["cost"]["relative_to_lora"]
            rows.append(
                [
                    method,
                    f"{result['parameters']:,}",
                    *(result[key] for key in checks),
                    f"{1000 * cost['step_seconds']:.1f}",
                    "-" if ratio is None else f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]",
                    "-" if cost["peak_bytes"] is None else f"{cost['peak_bytes'] / 2**20:,.0f}",
                ]
            )
        texts.append(f"{name}, {found['device']}\n\n" + markdown(header, rows))
    return "\n\n".join(texts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks on a GPU, and the cost of a step beside LoRA's.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu to try the script itself")
    parser.add_argument("--size", choices=("whole", "tiny"), default="whole")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each method")
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend")
    parser.add_argument("--only", default="", help="a regular expression for methods")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_check")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build without CUDA"
        print(f"gpu-check: skipped, nothing was checked. torch {torch.__version__} {built} and sees no GPU.")
        return 0
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} (no GPU)"
    tiny = options.size == "tiny"
    found: dict[str, Any] = {"device": name, "size": options.size, "environment": environment(), "bases": {}}
    for base in BASES:
        methods = trials(base, tiny, options.only)
        results = {m: Checks(base, trial, device, tiny, options.compiler).run() for m, trial in methods.items()}
        for method, cost in costs(base, methods, device, tiny, options.rounds).items():
            results[method]["cost"] = cost
        found["bases"][base.name] = results
    path = options.out / f"{re.sub('[^A-Za-z0-9]+', '-', name).strip('-').lower()}.json"
    write_atomically(path, compact(found))
    print(report(found))
    failed = [
        f"{base}, {method}, {key}: {value}"
        for base, methods in found["bases"].items()
        for method, result in methods.items()
        for key, value in result.items()
        if isinstance(value, str) and value.startswith("failed")
    ]
    print("\n".join(["", *failed, f"kept in {path}"]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
