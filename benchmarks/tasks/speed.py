"""What an adapter costs beside its peers: time, FLOPs, memory kept for backward, files, graph breaks.

Ratios in one process, interleaved, one thread, medians of paired ratios with their quartiles; figures that a machine's
load can't touch (FLOPs, bytes, counts) stand beside them. The floor is the frozen model, forward and activation
gradients. All models have random weights of the named shape; adapters are moved off zero first.
"""

from __future__ import annotations

import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

from peft_multimodal import AuroraModeApproxConfig
from peft_multimodal.methods.aurora_mode_approx.layers import AuroraMatrixLayer, drop_scope

from .. import report as tables
from ..experiment import Experiment
from ..records import Record
from . import Split

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
OURS = "Aurora r=64"
SIDES = ("relative_to_floor", "relative_to_lora_64")


def aurora(**kwargs: Any) -> AuroraModeApproxConfig:
    return AuroraModeApproxConfig(
        **{"r": 64, "share": "per_shape", "dropout": 0.0, "target_modules": TARGETS, **kwargs}
    )


METHODS: dict[str, Callable[[], Any]] = {
    "floor": lambda: None,
    "LoRA r=8": lambda: LoraConfig(r=8, target_modules=TARGETS),
    "LoRA r=64": lambda: LoraConfig(r=64, target_modules=TARGETS),
    "VeRA r=256": lambda: VeraConfig(r=256, target_modules=TARGETS),
    "Aurora r=64": aurora,
    "Aurora r=64, nothing shared in a call": aurora,
    "Aurora r=64, Tucker core": lambda: aurora(core="tucker"),
}


def wrap(model: nn.Module, name: str) -> nn.Module:
    """The frozen model with the method's adapter, or bare for the floor; "full" trains every weight of a copy."""
    if name == "full":
        return copy.deepcopy(model).requires_grad_()
    shared: dict[int, Any] = {id(p): p.requires_grad_(False) for p in model.parameters()}
    model = copy.deepcopy(model, shared)  # one copy of the frozen weights serves all
    if name == "floor":
        return model
    wrapped = get_peft_model(model, METHODS[name]())
    if "nothing shared" in name:
        for module in model.modules():
            drop_scope(module)
            if isinstance(module, AuroraMatrixLayer):
                module.scope = None
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    return wrapped


class Attention(nn.Module):
    """The four projections of one attention layer; q, k and v read one input."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x), self.out_proj(context)


class Layer(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.self_attn = Attention(d)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        return self.self_attn(x, context)


def interleaved(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, A B C A B C ..., after two rounds that don't count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], to: str) -> dict[str, dict[str, float]]:
    """{name: median and quartiles of the paired ratios to `to`}."""
    found = {}
    for name, values in seconds.items():
        paired = [a / b for a, b in zip(values, seconds[to], strict=True)]
        low, middle, high = statistics.quantiles(paired, n=4)
        found[name] = {"median": middle, "low": low, "high": high}
    return found


def one_layer(d: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Forward and backward of q, k, v and o of one layer."""
    torch.manual_seed(0)
    base = Layer(d)
    x, context, grad = (torch.randn(16, tokens // 16, d) for _ in range(3))

    def step(model: nn.Module) -> None:
        outputs = model(x.detach().requires_grad_(), context.detach().requires_grad_())
        torch.autograd.backward(outputs, [grad] * 4)

    models = {name: wrap(base, name) for name in METHODS}
    seconds = interleaved({n: lambda m=m: step(m) for n, m in models.items()}, rounds)  # type: ignore[misc]
    return {"relative_to_floor": ratios(seconds, "floor"), "relative_to_lora_64": ratios(seconds, "LoRA r=64")}


def clip_b32() -> CLIPModel:
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig()).train()


def clip_batch(rows: int = 16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 49000, (rows, 16), generator=generator)  # captions of 16 tokens
    ids[:, -1] = 49407
    return {"pixel_values": torch.randn(rows, 3, 224, 224, generator=generator), "input_ids": ids, "return_loss": True}


def activations_need_gradients(model: Any) -> None:
    """Let gradients flow down to the embeddings, as they do below the lowest adapter."""
    for embeddings in (model.vision_model.embeddings, model.text_model.embeddings):
        embeddings.register_forward_hook(lambda _m, _a, out: out.requires_grad_())


def saved_bytes(model: nn.Module, batch: dict[str, Any]) -> int:
    """Bytes kept for backward, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**batch).loss  # the graph keeps what was packed, so no address is used twice
    del loss
    return sum(kept.values())


def whole_step(rounds: int, rows: int = 16) -> dict[str, Any]:
    """A training step of CLIP ViT-B/32 on one batch: seconds, FLOPs, bytes kept, parameters."""
    base, batch = clip_b32(), clip_batch(rows)
    found: dict[str, Any] = {}
    steps: dict[str, Callable[[], Any]] = {}
    for name in ["floor", "full", *[m for m in METHODS if m != "floor"]]:
        model = wrap(base, name)
        activations_need_gradients(model.get_base_model() if isinstance(model, PeftModel) else model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

        def step(model: nn.Module = model, optimizer: Any = optimizer) -> None:
            model(**batch).loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        with FlopCounterMode(display=False) as counter:
            step()
        found[name] = {
            "parameters": sum(p.numel() for p in trained),
            "flops": counter.get_total_flops(),
            "saved_mib": saved_bytes(model, batch) / 2**20,
        }
        steps[name] = step
    for name, ratio in ratios(interleaved(steps, rounds), "floor").items():
        found[name]["seconds_relative_to_floor"] = ratio
        found[name]["flops_relative_to_floor"] = found[name]["flops"] / found["floor"]["flops"]
        found[name]["saved_relative_to_floor"] = found[name]["saved_mib"] / found["floor"]["saved_mib"]
    return found


def files(rounds: int) -> dict[str, Any]:
    """Bytes of the adapter's file, and time to save and load it, relative to LoRA r=64."""
    base = clip_b32()
    found: dict[str, Any] = {}
    saves: dict[str, Callable[[], Any]] = {}
    loads: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as root:
        for name in [m for m in METHODS if m != "floor" and "nothing shared" not in m]:
            model: Any = wrap(base, name)
            folder = Path(root, name.replace(" ", "_"))
            model.save_pretrained(folder)
            found[name] = {"bytes_fp32": (folder / "adapter_model.safetensors").stat().st_size}
            half: Any = get_peft_model(copy.deepcopy(base).half(), METHODS[name](), autocast_adapter_dtype=False)
            half.save_pretrained(folder / "half")
            found[name]["bytes_fp16"] = (folder / "half" / "adapter_model.safetensors").stat().st_size

            def save(model: Any = model, folder: Path = folder) -> None:
                model.save_pretrained(folder)

            saves[name] = save
            fresh = copy.deepcopy(base)

            def load(fresh: Any = fresh, folder: Path = folder) -> None:
                PeftModel.from_pretrained(fresh, folder).unload()

            loads[name] = load
        for key, steps in (("save", saves), ("load", loads)):
            for name, ratio in ratios(interleaved(steps, rounds), "LoRA r=64").items():
                found[name][f"{key}_relative_to_lora_64"] = ratio
    return found


def graph_breaks() -> dict[str, int]:
    """Graph breaks of `torch.compile` on a small CLIP beyond those of the bare model."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**small, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    base = CLIPModel(CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16}))
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": torch.randint(3, 99, (2, 7))}
    batch["input_ids"][:, -1] = 2
    counts = {}
    for name in METHODS:
        torch._dynamo.reset()
        counts[name] = torch._dynamo.explain(wrap(base, name))(**batch).graph_break_count
    return {name: count - counts["floor"] for name, count in counts.items()}


def import_seconds(rounds: int) -> dict[str, float]:
    """Median seconds of `import peft` and `import peft_multimodal`, each in fresh processes, and their ratio."""
    code = "import sys, time, importlib; t = time.perf_counter(); importlib.import_module(sys.argv[1]); print(time.perf_counter() - t)"
    seconds: dict[str, list[float]] = {"peft": [], "peft_multimodal": []}
    for _ in range(rounds):
        for name, values in seconds.items():
            out = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True)
            values.append(float(out.stdout))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return medians | {"ratio": medians["peft_multimodal"] / medians["peft"]}


# ------------------------------------------------------------------------------------------------------------ the task


def run(experiment: Experiment, seed: int, split: Split) -> dict[str, Any]:
    """Measure everything once; there is nothing random in it but the machine."""
    torch.set_num_threads(1)
    rounds = experiment.settings["rounds"]
    if "max_steps" in experiment.training:  # a smoke test
        rounds = dict.fromkeys(rounds, 4)
    items = {
        "layer_768": one_layer(768, 16 * 50, rounds["layer"]),
        "layer_512": one_layer(512, 16 * 77, rounds["layer"]),
        "step": whole_step(rounds["step"]),
        "files": files(rounds["files"]),
        "graph_breaks": graph_breaks(),
        "import": import_seconds(rounds["import"]),
    }
    return {
        "metrics": {"layer_768": items["layer_768"]["relative_to_lora_64"][OURS]["median"]},
        "items": items,
        "cost": {},
    }


def score(metrics: Mapping[str, float]) -> float:
    """Time of one layer relative to LoRA r=64; nothing is chosen by it."""
    return metrics["layer_768"]


def report(records: Sequence[Record], plots: Path) -> str:
    """Time, work and memory of one layer and of a whole step; files; graph breaks."""
    items = records[0].items
    layers = [
        [name, *(cell(items[key][side][name]) for key in ("layer_768", "layer_512") for side in SIDES)]
        for name in METHODS
    ]
    steps = [
        [
            name,
            tables.count(row["parameters"]) if name != OURS else f"{row['parameters']:,}",
            f"{100 * (row['flops_relative_to_floor'] - 1):+.1f} %",
            f"{row['saved_mib'] - items['step']['floor']['saved_mib']:.1f} ({100 * (row['saved_relative_to_floor'] - 1):+.1f} %)",
            cell(row["seconds_relative_to_floor"]),
        ]
        for name, row in items["step"].items()
    ]
    saved = [
        [
            name,
            f"{row['bytes_fp32'] / 1e6:.3f}",
            f"{row['bytes_fp16'] / 1e6:.3f}",
            cell(row["save_relative_to_lora_64"]),
            cell(row["load_relative_to_lora_64"]),
        ]
        for name, row in items["files"].items()
    ]
    breaks = ", ".join(f"{name} {count}" for name, count in items["graph_breaks"].items())
    return (
        "Medians of paired ratios [quartiles], interleaved in one process with one thread. The floor is the frozen model, "
        "forward and activation gradients.\n\nq, k, v and o of one layer, forward and backward, 16 rows:\n\n"
        + tables.markdown(["", "d 768 / floor", "/ LoRA r=64", "d 512 / floor", "/ LoRA r=64"], layers)
        + "\nA training step of CLIP ViT-B/32 (random weights of that shape, 16 images, captions of 16 tokens, 96 matrices), "
        "AdamW included:\n\n"
        + tables.markdown(["", "trained", "FLOPs", "kept for backward beyond the floor, MiB", "time / floor"], steps)
        + "\nThe adapter's file, and the time to save and load it:\n\n"
        + tables.markdown(["", "fp32, MB", "fp16, MB", "save / LoRA r=64", "load / LoRA r=64"], saved)
        + f"\nGraph breaks of `torch.compile` beyond the bare model's: {breaks}.\n"
        + f"`import peft_multimodal` takes {items['import']['ratio']:.2f} times `import peft`.\n"
    )


def cell(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
