"""What remembering and drawing hard pairs costs: seconds and bytes for millions of pairs, and its share of a step.

Ratios in one process, interleaved, one thread, medians of paired ratios with their quartiles. Drawing depends on the
number of pairs alone, not on what they show: difficulties are drawn at random.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor
from torch.utils.data import WeightedRandomSampler
from transformers import TrainingArguments

from peft_multimodal import ContrastiveTrainer, HardSampleBank, HardSampleDomainAdapterConfig
from peft_multimodal.training.hard_samples import stack_rows
from peft_multimodal.training.hard_samples.draws import weighted_order

from .. import report as tables
from ..experiment import Experiment
from ..records import Record
from . import Split
from .speed import cell, clip_b32, clip_batch, interleaved, ratios

CHUNK, BATCH = 1024, 128


def bank_of(size: int) -> HardSampleBank:
    """A bank of so many pairs with random difficulties."""
    bank = HardSampleBank(range(size))
    bank.difficulty[:] = bank.base_difficulty[:] = np.random.default_rng(0).random(size, np.float32)
    bank.start_epoch()
    return bank


def epoch_order(size: int, rounds: int) -> dict[str, Any]:
    """Half of the pairs in an order drawn at once from given weights, beside torch's sampler: its draws of as many, and
    the epoch that a loader gets from it, as many draws as there are pairs.

    That an epoch ranks the difficulties first, which gives those weights, is told apart.
    """
    bank = bank_of(size)
    weights = bank.probabilities(slice(None))
    tensor, rng = torch.from_numpy(weights), np.random.default_rng(0)

    def rank() -> None:
        bank.start_epoch()
        bank.probabilities(slice(None))

    steps: dict[str, Any] = {
        "ours": lambda: weighted_order(weights.__getitem__, size, size // 2, rng),
        "WeightedRandomSampler's draw, no pair twice": lambda: torch.multinomial(tensor, size // 2, False),
        "WeightedRandomSampler's draw, with replacement": lambda: torch.multinomial(tensor, size // 2, True),
        "an epoch of WeightedRandomSampler": lambda: deque(WeightedRandomSampler(tensor, size), maxlen=0),  # type: ignore[arg-type]
        "ranking": rank,
    }
    seconds = interleaved(steps, rounds)
    return {"seconds": {name: statistics.median(s) for name, s in seconds.items()}} | {
        f"relative_to_{i}": ratios(seconds, name)["ours"] for i, name in enumerate(list(steps)[1:4])
    }


def chunk(size: int, rounds: int) -> dict[str, Any]:
    """A chunk's difficulties taken over and the next one drawn, beside a race of all pairs."""
    bank, rng = bank_of(size), np.random.default_rng(0)
    keys = rng.choice(size, CHUNK, replace=False)
    values = rng.random(CHUNK, np.float32)

    def ours() -> None:
        bank.update(keys, values, 1)
        for _ in range(CHUNK // BATCH):
            bank.draw(BATCH, rng)

    log_p = torch.from_numpy(np.log(bank.probabilities(slice(None))).astype(np.float32))

    def gumbel() -> None:
        log_p[keys] = 0.0
        noise = torch.empty_like(log_p).exponential_().log_()
        torch.topk(log_p - noise, CHUNK)

    seconds = interleaved({"ours": ours, "gumbel": gumbel}, rounds)
    return {
        "seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "relative": ratios(seconds, "gumbel")["ours"],
    }


def bytes_a_pair(size: int) -> dict[str, float]:
    """Of the bank without its ids, of the ids, and of the tree."""
    bank = bank_of(size)
    bank.sum_tree()
    own = ("difficulty", "base_difficulty", "visits", "last_step", "flag")
    assert bank.tree is not None
    return {
        "bank": sum(getattr(bank, name).nbytes for name in own) / size,
        "ids": bank.keys.nbytes / size,
        "tree": bank.tree.nbytes / size,
    }


PEAK = """
import sys, numpy as np
from benchmarks.measure import PeakMemory
from peft_multimodal.training.hard_samples.draws import weighted_order
size = int(sys.argv[1])
weights = np.random.default_rng(0).random(size, np.float32)
with PeakMemory() as memory:
    order = weighted_order(lambda part: weights[part] + np.float32(0.01), size, size // 2, np.random.default_rng(1))
print(memory.extra / 2**20)
assert len(np.unique(order)) == size // 2
"""


def peak_mib(size: int) -> float:
    """Resident memory at its highest beyond the weights while half of so many pairs are drawn, in a fresh process."""
    out = subprocess.run([sys.executable, "-c", PEAK, str(size)], capture_output=True, text=True, check=True)
    return float(out.stdout)


class TimedTrainer(ContrastiveTrainer):
    """Adds up the processor's seconds that bank and sampler take."""

    spent = 0.0

    def _visit(self, *args: Any, **kwargs: Any) -> Tensor:
        started = time.process_time()
        try:
            return super()._visit(*args, **kwargs)
        finally:
            self.spent += time.process_time() - started

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        draw = sampler._draw

        def timed() -> np.ndarray:
            started = time.process_time()
            try:
                return draw()
            finally:
                self.spent += time.process_time() - started

        sampler._draw = timed
        return sampler


def share_of_a_step(steps: int, pairs: int, rows: int = 32) -> dict[str, float]:
    """What a training of CLIP ViT-B/32 with the adapter spends on bank and sampler, the chunk's start included."""
    model = get_peft_model(clip_b32(), HardSampleDomainAdapterConfig())
    batch = clip_batch(rows)
    data = [
        {"pixel_values": batch["pixel_values"][i % rows], "input_ids": batch["input_ids"][i % rows], "id": i}
        for i in range(pairs)
    ]
    bank = bank_of(pairs)
    # A queue as full as it gets.
    filled = torch.nn.functional.normalize(torch.randn(bank.queue.size, 512), dim=-1)
    keys = torch.arange(bank.queue.size) + pairs
    bank.queue.push(filled, filled, {"image": keys, "text": keys})
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, per_device_train_batch_size=rows, max_steps=steps, use_cpu=True, save_strategy="no", report_to="none",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = TimedTrainer(model, args, stack_rows, data, hard_samples=bank)
        started = time.process_time()
        trainer.train()
        whole = time.process_time() - started
    return {"bank_and_sampler": trainer.spent / steps, "step": whole / steps, "share": 100 * trainer.spent / whole}


# ------------------------------------------------------------------------------------------------------------ the task


def run(experiment: Experiment, seed: int, split: Split) -> dict[str, Any]:
    """Measure everything once."""
    torch.set_num_threads(1)
    settings = experiment.settings
    rounds = settings["rounds"] if "max_steps" not in experiment.training else 2  # a smoke test
    items = {
        "order": epoch_order(settings["order_pairs"], rounds),
        "chunk": chunk(settings["order_pairs"], rounds),
        "bytes": bytes_a_pair(settings["order_pairs"]),
        "peak_pairs": settings["peak_pairs"],
        "peak_mib": peak_mib(settings["peak_pairs"]),
        "step": share_of_a_step(settings["steps"], settings["step_pairs"]),
        "settings": settings,
    }
    return {"metrics": {"share_of_a_step": items["step"]["share"]}, "items": items, "cost": {}}


def score(metrics: Mapping[str, float]) -> float:
    """The share of a step; nothing is chosen by it."""
    return metrics["share_of_a_step"]


def report(records: Sequence[Record], plots: Path) -> str:
    """A row for each cost."""
    items = records[0].items
    order, part, size = items["order"], items["chunk"], items["settings"]["order_pairs"]
    once, again, epoch = list(order["seconds"])[1:4]
    step = items["step"]
    rows = [
        [
            f"half of {size:,} pairs in an order drawn at once: {order['seconds']['ours']:.2f} s",
            f"{once}: {order['seconds'][once]:.1f} s",
            cell(order["relative_to_0"]),
        ],
        ["", f"{again}: {order['seconds'][again]:.1f} s", cell(order["relative_to_1"])],
        ["", f"{epoch}, {size:,} draws: {order['seconds'][epoch]:.1f} s", cell(order["relative_to_2"])],
        [
            f"{CHUNK:,} difficulties changed and {CHUNK:,} pairs of {size:,} drawn: {1000 * part['seconds']['ours']:.1f} ms",
            f"a race of all pairs: {1000 * part['seconds']['gumbel']:.0f} ms",
            f"{part['relative']['median']:.4f} [{part['relative']['low']:.4f}, {part['relative']['high']:.4f}]",
        ],
    ]
    return (
        tables.markdown(["", "peer", "of its time"], rows)
        + f"\nRanking all {size:,} difficulties anew, once an epoch, takes {order['seconds']['ranking']:.1f} s. Drawing half of {items['peak_pairs']:,} pairs takes {items['peak_mib']:.0f} MiB at its highest beside the weights "
        "(torch's samplers refuse more than 2^24). "
        f"A pair takes {items['bytes']['bank']:.0f} bytes of bank, {items['bytes']['ids']:.0f} of its id and "
        f"{items['bytes']['tree']:.2f} of tree.\n\nTraining CLIP ViT-B/32 with the adapter, batches of 32 and a full queue of "
        f"4,096: bank and sampler take {1000 * step['bank_and_sampler']:.1f} ms of a step's {1000 * step['step']:.0f}, "
        f"{step['share']:.2f} %.\n"
    )
