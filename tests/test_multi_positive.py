"""Several captions of an image as its matches, and both losses over two processes as over one.

torchrun --nproc-per-node=2 tests/test_multi_positive.py FOLDER      # what each process does
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from families import FAMILIES
from methods import wrap
from test_hard_samples import Pairs
from test_parameter_groups import arguments
from torch import Tensor

from peft_multimodal import ContrastiveTrainer
from peft_multimodal.training.gathering import gather_with_gradients
from peft_multimodal.training.losses import pair_losses, sigmoid_pair_losses

IMAGES, TEXTS = torch.tensor([0, 0, 1, 2, 3, 3, 3, 4]), torch.tensor([0, 1, 2, 2, 4, 5, 6, 7])
SCALE, BIAS = 7.0, -3.0
LOSSES = {"infonce": (pair_losses, (SCALE,)), "sigmoid": (sigmoid_pair_losses, (SCALE, BIAS))}


def embeddings() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(len(IMAGES), 6, generator=generator), dim=-1) for _ in range(2)]


def slow(name: str, images: Tensor, texts: Tensor) -> list[float]:
    """Pair by pair, in Python floats; two pairs match where they share an image or a text."""
    found, size = [], len(images)
    for i in range(size):
        matches = [j for j in range(size) if IMAGES[i] == IMAGES[j] or TEXTS[i] == TEXTS[j]]
        sides = []
        for one, other in ((images, texts), (texts, images)):
            logits = [SCALE * float(one[i] @ other[j]) for j in range(size)]
            if name == "infonce":
                whole = math.log(sum(map(math.exp, logits)))
                sides.append(sum(whole - logits[j] for j in matches) / len(matches))
            else:
                signs = [1 if j in matches else -1 for j in range(size)]
                sides.append(sum(math.log1p(math.exp(-y * (x + BIAS))) for y, x in zip(signs, logits, strict=True)))
        found.append(sum(sides) / 2)
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_each_match_counts(name: str) -> None:
    loss, temper = LOSSES[name]
    images, texts = embeddings()
    options: dict[str, Any] = {"chunk_size": 3} if name == "sigmoid" else {}
    found = loss(images, texts, images, texts, *temper, IMAGES, TEXTS, multi_positive=True, **options)
    assert found.tolist() == pytest.approx(slow(name, images, texts), rel=1e-5)
    alone = torch.arange(len(IMAGES))
    one = [loss(images, texts, images, texts, *temper, alone, alone, multi_positive=many) for many in (True, False)]
    torch.testing.assert_close(one[0], one[1])


@pytest.mark.parametrize("name", LOSSES)
def test_the_trainer_learns_from_all_captions_of_an_image(name: str, tmp_path: Path) -> None:
    family = FAMILIES["siglip" if name == "sigmoid" else "clip"]
    values = []
    for many in (False, True):
        model = wrap(family, "aurora_mode_approx", stirred=False)
        options: dict[str, Any] = {"loss": name, "multi_positive": many}
        trainer = ContrastiveTrainer(model, arguments(tmp_path), train_dataset=Pairs(6), **options)
        batch = {**family.inputs(model), "ids": torch.tensor([5, 5, 6])}
        values.append(float(trainer.compute_loss(model, batch)))
        image, text = trainer._embed(model, {k: v for k, v in batch.items() if k != "ids"})
    ids, keys = batch["ids"], torch.arange(3)
    loss: Any = LOSSES[name][0]
    expected = [
        loss(image, text, image, text, *trainer._temper(model), ids, keys, 0, multi_positive=m).mean()
        for m in (False, True)
    ]
    assert values == pytest.approx([float(e) for e in expected], rel=1e-5)
    assert values[0] != pytest.approx(values[1])


def test_two_processes_give_the_loss_and_the_gradients_of_one(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        __file__,
        str(tmp_path),
    ]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, (loss, temper) in LOSSES.items():
        for many in (False, True):
            images, texts = (x.requires_grad_() for x in embeddings())
            whole = loss(images, texts, images, texts, *temper, IMAGES, TEXTS, multi_positive=many).mean()
            whole.backward()
            found = [rank[name, many] for rank in ranks]
            assert sum(value for value, *_ in found) / 2 == pytest.approx(float(whole.detach()), abs=1e-5)
            for side, expected in enumerate((images.grad, texts.grad), 1):
                torch.testing.assert_close(torch.cat([part[side] for part in found]) / 2, expected, atol=1e-5, rtol=0)


def of_this_process(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, half = dist.get_rank(), len(IMAGES) // 2
    rows, found = slice(rank * half, (rank + 1) * half), {}
    for name, (loss, temper) in LOSSES.items():
        for many in (False, True):
            images, texts = (x[rows].clone().requires_grad_() for x in embeddings())
            every = gather_with_gradients(images), gather_with_gradients(texts)
            value = loss(images, texts, *every, *temper, IMAGES, TEXTS, rows.start, multi_positive=many).mean()
            value.backward()
            found[name, many] = (float(value.detach()), images.grad, texts.grad)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    of_this_process(Path(sys.argv[1]))
