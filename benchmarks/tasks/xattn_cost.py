"""What gated cross-attention costs beside its peers, with many images in one text: decoding, training, memory.

Ratios in one process, interleaved, one thread, medians of paired ratios with their quartiles. All ways have the same
shape (d = D = 512, 8 heads of 64, 64 tokens an image, FFW 4 d, of Idefics's gated MLP 8/3 d) and random weights, gates
moved off zero; the dense way has the very weights of ours, and is checked to give the same outputs. The floor is our
block without the attention's core: norms, maps and FFW alone.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import IdeficsConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteria
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from peft_multimodal import GatedXAttnConfig
from peft_multimodal.methods.gated_xattn import make_block
from peft_multimodal.nn.media import sight_of, text_time

from .. import report as tables
from ..experiment import Experiment
from ..peers.dense_flamingo import DenseBlock, IdeficsBlock, PeerLayer
from ..records import Record
from . import Split
from .speed import cell, interleaved, ratios, saved_bytes

WIDTH, HEADS, HEAD_DIM, TOKENS = 512, 8, 64, 64
LAYERS, VOCABULARY, PROMPT = 4, 4096, 256
MANY = 16
OURS, DENSE, IDEFICS, FLOOR, BARE = "ours", "dense", "Idefics", "floor", "language model alone"


def block_config(**changes: Any) -> GatedXAttnConfig:
    sizes: dict[str, Any] = {
        "resampler": "perceiver",
        "every_n_layers": 1,
        "ff_mult": 4,
        "gate_init": 0.0,
        "resampler_depth": 1,
        "num_latents": TOKENS,
        "resampler_heads": HEADS,
        "head_dim": HEAD_DIM,
    }
    return GatedXAttnConfig(**sizes, vision_hidden_size=WIDTH, media_token_id=VOCABULARY, **changes)


def idefics_layer() -> IdeficsGatedCrossAttentionLayer:
    config = IdeficsConfig(
        hidden_size=WIDTH,
        intermediate_size=8 * WIDTH // 3,
        num_attention_heads=HEADS,
        alpha_initializer="ones",
        vision_config={"embed_dim": WIDTH},
    )
    config._attn_implementation = "sdpa"
    return IdeficsGatedCrossAttentionLayer(config, layer_idx=0)


def open_gates(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "_gate_norm" in name:
            nn.init.constant_(parameter, 0.5)


def spread_markers(rows: int, length: int, images: int) -> Tensor:
    """(rows, length) random ids with the images' markers evenly spread, the first at the first place."""
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, [i * length // images for i in range(images)]] = VOCABULARY
    return ids


# -------------------------------------------------------------------------------------------------------------- blocks


def train_step(rounds: int, rows: int = 2, length: int = 512) -> dict[str, Any]:
    """Forward and backward of one block on 16 images a row: seconds relative to the dense way, MiB kept for backward."""
    torch.manual_seed(0)
    block: Any = make_block(block_config(), WIDTH)
    open_gates(block)
    peers = {DENSE: DenseBlock(copy.deepcopy(block)), IDEFICS: IdeficsBlock(idefics_layer())}
    times = text_time(spread_markers(rows, length, MANY) == VOCABULARY)
    numbers = torch.arange(1, MANY + 1).expand(rows, -1)
    y, grad = torch.randn(2, rows, length, WIDTH)
    m = torch.randn(rows, MANY, TOKENS, WIDTH)

    class Call(nn.Module):
        """A block as a module whose inputs need gradients, for `saved_bytes`."""

        def __init__(self, part: nn.Module, call: Callable[[Tensor, Tensor], Tensor]) -> None:
            super().__init__()
            self.part, self.call = part, call

        def forward(self, y: Tensor, m: Tensor) -> Any:
            out = self.call(y, m)
            return Loss(out, out)

    def ours(y: Tensor, m: Tensor) -> Tensor:
        sight = sight_of(times, numbers, "last")
        assert sight is not None
        return block(y, sight, sight.pick(*block.attention.keys_values(m)))

    def floor(y: Tensor, m: Tensor) -> Tensor:
        maps = block.attention
        _, v = maps.keys_values(m)
        q = maps.queries(block.attention_norm(y))
        stream = y + block.attention_gate_norm.tanh() * maps.output(q + v.mean())
        return stream + block.ffw_gate_norm.tanh() * block.ffw(block.ffw_norm(stream))

    calls = {OURS: Call(block, ours), FLOOR: Call(block, floor)}
    calls |= {name: Call(peer, partial(peer, times=times)) for name, peer in peers.items()}
    with torch.no_grad():
        torch.testing.assert_close(ours(y, m), peers[DENSE](y, m, times), atol=1e-4, rtol=1e-4)

    def inputs() -> dict[str, Tensor]:
        return {"y": y.clone().requires_grad_(), "m": m.clone().requires_grad_()}

    def step(call: Call) -> None:
        call(**inputs()).loss.backward(grad)

    found: dict[str, Any] = {name: {"saved_mib": saved_bytes(call, inputs()) / 2**20} for name, call in calls.items()}
    steps: dict[str, Callable[[], Any]] = {name: partial(step, call) for name, call in calls.items()}
    for name, ratio in ratios(interleaved(steps, rounds), DENSE).items():
        found[name]["relative_to_dense"] = ratio
    return found


class Loss:
    """An output with a `loss`, and the output itself, which keeps the graph."""

    def __init__(self, loss: Tensor, output: Tensor) -> None:
        self.loss, self.output = loss, output


# ------------------------------------------------------------------------------------------------------------ decoding


class Stopwatch(StoppingCriteria):
    """Seconds between a generation's tokens."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.at.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def median(self) -> float:
        """Of the tokens behind the first, which has read the prompt."""
        return statistics.median(b - a for a, b in zip(self.at[1:], self.at[2:], strict=False))


def language_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def decode(rounds: int, tokens: int = 10) -> dict[str, Any]:
    """Seconds a token at 1 and at 16 images, in a prompt of one length, relative to ours at 1 and at 16."""
    model: Any = get_peft_model(language_model(), block_config()).eval()
    open_gates(model)
    reader, bare = model.base_model.reader(), language_model()
    layers = list(model.get_base_model().model.layers)
    marker = model.get_base_model().model.embed_tokens
    blocks = [layer.gated_xattn_block["default"] for layer in layers]
    peers: dict[str, Any] = {}
    for name in (DENSE, IDEFICS):
        peers[name] = peer = language_model()
        peer.model.embed_tokens = copy.deepcopy(marker)  # the marker lies beyond the vocabulary
        peer.model.layers = nn.ModuleList(
            PeerLayer(DenseBlock(b) if name == DENSE else IdeficsBlock(idefics_layer()), layer, VOCABULARY)
            for b, layer in zip(blocks, peer.model.layers, strict=True)
        )
        peer.eval()
    given = {n: spread_markers(1, PROMPT, n) for n in (1, MANY)}
    images = {n: torch.randn(1, n, 1, 16, WIDTH, generator=torch.Generator().manual_seed(1)) for n in given}
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    seconds: dict[str, list[float]] = {}
    written: dict[str, list[int]] = {}

    def generate(name: str, number: int, keep: bool) -> None:
        watch, ids = Stopwatch(), given[number]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "stopping_criteria": [watch], **options}
        if name == BARE:
            out = bare.generate(**inputs | {"input_ids": ids.clamp_max(VOCABULARY - 1)})
        elif name == OURS:
            out = model.generate(**inputs, vision_features=images[number])
        else:
            latents = reader.tokens("default", images[number][0])[None]
            for layer in peers[name].model.layers:
                layer.look(latents, ids)
            out = peers[name].generate(**inputs)
        key = f"{name}, {number}"
        written[key] = out[0, PROMPT:].tolist()
        if keep:
            seconds.setdefault(key, []).append(watch.median())

    with torch.no_grad():
        for round_ in range(rounds + 1):
            for name in (BARE, OURS, DENSE, IDEFICS):
                for number in given:
                    generate(name, number, keep=round_ > 0)
    for number in given:
        if written[f"{OURS}, {number}"] != written[f"{DENSE}, {number}"]:
            raise AssertionError("The dense way wrote something else.")
    return {
        "relative_to_ours_at_1": ratios(seconds, f"{OURS}, 1"),
        "relative_to_ours_at_16": ratios(seconds, f"{OURS}, {MANY}"),
        "own_growth": {
            name: ratios({"many": seconds[f"{name}, {MANY}"], "one": seconds[f"{name}, 1"]}, "one")["many"]
            for name in (BARE, OURS, DENSE, IDEFICS)
        },
    }


# ------------------------------------------------------------------------------------------------------------ the task


def run(experiment: Experiment, seed: int, split: Split) -> dict[str, Any]:
    """Measure everything once; there is nothing random in it but the machine."""
    torch.set_num_threads(1)
    rounds = experiment.settings["rounds"]
    if "max_steps" in experiment.training:  # a smoke test
        rounds = dict.fromkeys(rounds, 3)
    items = {"block": train_step(rounds["block"]), "decode": decode(rounds["decode"])}
    metrics = {
        "block": items["block"][OURS]["relative_to_dense"]["median"],
        "saved_mib": items["block"][OURS]["saved_mib"],
        "growth": items["decode"]["own_growth"][OURS]["median"],
        "decode_dense": items["decode"]["relative_to_ours_at_16"][f"{DENSE}, {MANY}"]["median"],
    }
    return {"metrics": metrics, "items": items, "cost": {}}


def score(metrics: Mapping[str, float]) -> float:
    """Time of the block's step relative to the dense way; nothing is chosen by it."""
    return metrics["block"]


def report(records: Sequence[Record], plots: Path) -> str:
    """Decoding and training, time and memory."""
    items = records[0].items
    decoding = [
        [
            name,
            cell(items["decode"]["own_growth"][name]),
            cell(items["decode"]["relative_to_ours_at_1"][f"{name}, 1"]),
            cell(items["decode"]["relative_to_ours_at_16"][f"{name}, {MANY}"]),
        ]
        for name in (BARE, OURS, DENSE, IDEFICS)
    ]
    training = [
        [name, cell(items["block"][name]["relative_to_dense"]), f"{items['block'][name]['saved_mib']:.0f}"]
        for name in (FLOOR, OURS, DENSE, IDEFICS)
    ]
    return (
        "Medians of paired ratios [quartiles], interleaved in one process with one thread; d = D = 512, 8 heads of 64, 64 "
        "tokens an image. Dense: all images' keys and values anew in every call, under a mask, with the same weights "
        f"and the same outputs. Decoding: {LAYERS} layers, a prompt of {PROMPT} tokens, seconds a token.\n\n"
        + tables.markdown(["", f"{MANY} images / 1", "1 image / ours", f"{MANY} images / ours"], decoding)
        + f"\nA training step of one block, 2 rows of 512 tokens and {MANY} images. Floor: without the attention's core.\n\n"
        + tables.markdown(["", "time / dense", "kept for backward, MiB"], training)
    )
