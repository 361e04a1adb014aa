"""Two processes on a CPU under DDP, FSDP2 and FSDP1; and what many would exchange.

    torchrun --nproc-per-node=2 tests/test_processes.py FOLDER           # what each process does
    accelerate launch ... tests/test_processes.py FOLDER CASE            # one of DDP's cases alone

Every method takes the same two steps on the same batches under each of them; what one way gives, the others have to.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_trainer
import torch
import torch.nn.functional as F
import transformers as hf
from case import Case, declared
from families import BOS, FAMILIES
from methods import wrap
from peft import PeftModel
from safetensors.torch import load_file
from test_contract import Rows
from test_trainer import NAMES, TRAINERS, arguments, contrastive, stock, trained_on

from peft_multimodal import HardSampleBank, last_checkpoint

TRAINED = [*NAMES, "contrastive"]
# Those that act in a decoder, whatever it reads.
WITHOUT_IMAGES = [name for name in NAMES if declared()[name].promises.acts_on in ("matrices", "decoder")]
STEPS: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "ddp_backend": "gloo"}
STEPS |= {"per_device_eval_batch_size": 3}
Launched = tuple[Path, list[dict[str, Any]]]

# --------------------------------------------------------------------------------------------- what each process does


def ddp(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in TRAINED:
        found[name] = trained(name, folder / name, ddp_find_unused_parameters=False)
    for method in WITHOUT_IMAGES:
        found[f"{method}, some without images"] = some_without_images(method, folder / f"{method}-texts")
    return found


def fsdp2(folder: Path) -> dict[str, Any]:
    found = {name: trained(name, folder / name, **fsdp_options(name)) for name in TRAINED}
    options = {**STEPS, **fsdp_options("aurora_mode_approx")}
    options["fsdp_config"]["state_dict_type"] = "SHARDED_STATE_DICT"
    trainer = stock("aurora_mode_approx", folder / "parts", **options)
    trainer.train()
    trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder / "parts" / "final"))
    return {**found, "parts": {"eval_loss": trainer.evaluate(trainer.train_dataset)["eval_loss"]}}


def fsdp1(folder: Path) -> dict[str, Any]:
    """Steps alone: torch's FSDP1 ends in a segmentation fault where it gathers a state on a CPU."""
    found = {}
    for name in ("aurora_mode_approx", "cross_lingual_adapter", "hard_sample_domain_adapter"):
        trainer = stock(name, folder / name, **{**STEPS, "save_strategy": "no"}, **fsdp_options(name, version=1))
        trainer.train()
        found[name] = {"losses": losses(trainer), "wrappers": wrappers(trainer)}
    return found


def fsdp_options(name: str, version: int = 2) -> dict[str, Any]:
    config: dict[str, Any] = {"version": version, "state_dict_type": "FULL_STATE_DICT"}
    policy = declared()[name].fsdp_policy if name in NAMES else Case.fsdp_policy
    config |= {"auto_wrap_policy": policy, "cpu_ram_efficient_loading": False}
    if name in NAMES and trained_on(name).name == "llava":  # its own list names classes that CLIP's vision tower hasn't
        config["transformer_layer_cls_to_wrap"] = ["LlamaDecoderLayer", "CLIPEncoderLayer"]
    if version == 1:
        config |= {"use_orig_params": True, "sync_module_states": False}
    return {"fsdp": True, "fsdp_config": config}


@contextlib.contextmanager
def fsdp_on_a_cpu() -> Iterator[None]:
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    def create_accelerator(trainer: hf.Trainer) -> None:
        # accelerate shards on accelerators alone, and calls a process's CPU "cpu:0", which no tensor's device is.
        shards = {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
        PartialState._shared_state.update(shards)
        create(trainer)

    def wrapped(*args: Any, **kwargs: Any) -> PeftModel:
        model = wrap(*args, **kwargs)
        scale = getattr(model.get_base_model(), "logit_scale", None)
        if scale is not None:  # CLIP's: FSDP2 takes no scalars
            scale.data = scale.data.reshape(1)
        return model

    create = hf.Trainer.create_accelerator_and_postprocess
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf.Trainer, "create_accelerator_and_postprocess", create_accelerator)
        patch.setattr(test_trainer, "wrap", wrapped)
        yield


def losses(trainer: hf.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def wrappers(trainer: hf.Trainer) -> list[str]:
    names = [type(module).__name__ for module in trainer.model_wrapped.modules()]
    return [name for name in names if "FSDP" in name or "FullySharded" in name or name == "DistributedDataParallel"]


def trained(name: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Two steps, and the second of them once more after a restart."""
    trainer = TRAINERS[name](folder, **STEPS, **copy.deepcopy(options))
    trainer.train()
    again = TRAINERS[name](folder, **STEPS, **copy.deepcopy(options))
    again.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    again.save_model(str(folder / "final"))
    if isinstance(getattr(again, "bank", None), HardSampleBank):
        again.bank.save(folder / f"bank-{again.args.process_index}")
    evaluated = again.evaluate(again.train_dataset)["eval_loss"]
    return {
        **{"losses": losses(trainer), "resumed": losses(again), "eval_loss": evaluated},
        **{"wrappers": wrappers(trainer), "last": last_checkpoint(folder)},
    }


def some_without_images(method: str, folder: Path) -> dict[str, Any]:
    """In each step one of the processes has a batch of texts alone."""
    family = FAMILIES["llava"]
    model = wrap(family, method, stirred=False)
    rows = Rows(family, model)
    assert family.targets is not None
    text = family.targets(family.text_inputs(model))
    text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] == BOS, 5)  # no marker of an adapter's either
    alone = [{name: value[i] for name, value in text.items()} for i in range(3)]
    rows.rows = [*rows.rows[:3], *alone, *alone, *rows.rows[:3]]
    gives_all_gradients = declared()[method].promises.acts_on == "decoder"
    own = {"ddp_find_unused_parameters": False} if gives_all_gradients else {}  # others: Trainer's own choice
    args = arguments(
        folder,
        **{"max_steps": 2, "per_device_train_batch_size": 3, "train_sampling_strategy": "sequential"},
        **{"ddp_backend": "gloo", **own},
    )
    seen: list[bool] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append("pixel_values" in kwargs), with_kwargs=True
    )
    trainer = hf.Trainer(model, args, rows.collate, train_dataset=rows)
    trainer.train()
    return {"losses": losses(trainer), "seen": seen}


# ------------------------------------------------------------------------------------------------------------ the tests


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """A folder, and what each of two processes found that were started with torchrun."""
    return started(["torch.distributed.run", "--nproc-per-node=2", "--master-port"], tmp_path_factory.mktemp("two"))


def started(launcher: list[str], folder: Path, *case: str) -> Launched:
    """By a module and its options, of which the last is the port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *launcher, str(port), __file__, str(folder), *case],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder, [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


def evaluated_alone(name: str, adapter: Path, folder: Path) -> float:
    """The eval_loss that one process gives with an adapter of two."""
    trainer = TRAINERS[name](folder, per_device_eval_batch_size=3)
    trainer.model.load_adapter(adapter, trainer.model.active_adapter)
    return trainer.evaluate(trainer.train_dataset)["eval_loss"]


@pytest.mark.parametrize("name", TRAINED)
def test_ddp(name: str, launched: Launched, tmp_path: Path):
    folder = launched[0] / "ddp"
    one, other = (rank["ddp"][name] for rank in launched[1])
    assert one == other
    assert one["wrappers"] == ["DistributedDataParallel"]
    assert one["resumed"] == one["losses"]
    assert len(one["losses"]) == 2
    assert one["last"] == str(folder / name / "checkpoint-2")
    assert evaluated_alone(name, folder / name / "final", tmp_path) == pytest.approx(one["eval_loss"], rel=1e-4)
    if name == "contrastive":
        banks = [HardSampleBank.load(folder / name / f"bank-{rank}").state() for rank in range(2)]
        assert banks[0]["visits"].sum() == 8
        for key, array in banks[0].items():
            np.testing.assert_array_equal(banks[1][key], array, err_msg=key)


def test_accelerate_launch(launched: Launched, tmp_path: Path):
    """accelerate starts several processes by --multi_gpu alone (or by MPI); that they are on CPUs is the script's word."""
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launcher = ["accelerate.commands.launch", *options, "--main_process_port"]
    _, found = started(launcher, tmp_path, "aurora_mode_approx")
    for mine, theirs in zip(found, launched[1], strict=True):
        expected = theirs["ddp"]["aurora_mode_approx"]
        assert mine["wrappers"] == ["DistributedDataParallel"]
        for key in ("losses", "resumed", "eval_loss"):
            assert mine[key] == pytest.approx(expected[key], rel=1e-5), key


def test_some_processes_have_no_images(launched: Launched):
    for name in (key for key in launched[1][0]["ddp"] if "without" in key):
        one, other = (rank["ddp"][name] for rank in launched[1])
        assert one["losses"] == other["losses"]
        assert [one["seen"], other["seen"]] == [[True, False], [False, True]]


@pytest.mark.parametrize("name", TRAINED)
def test_fsdp2(name: str, launched: Launched, tmp_path: Path):
    folder = launched[0] / "fsdp2"
    one, other = (rank["fsdp2"][name] for rank in launched[1])
    same = launched[1][0]["ddp"][name]
    assert one == other
    assert "FSDPPeftModel" in one["wrappers"]
    assert (len(one["wrappers"]) > 4) == (name != "structured_prompt")
    assert one["resumed"] == one["losses"]
    assert one["last"] == str(folder / name / "checkpoint-2")
    assert one["losses"] == pytest.approx(same["losses"], rel=1e-4)
    assert one["eval_loss"] == pytest.approx(same["eval_loss"], rel=1e-3)
    files = [load_file(where / name / "final" / "adapter_model.safetensors") for where in (folder, launched[0] / "ddp")]
    assert {k: v.shape for k, v in files[0].items()} == {k: v.shape for k, v in files[1].items()}
    assert evaluated_alone(name, folder / name / "final", tmp_path) == pytest.approx(one["eval_loss"], rel=1e-4)


def test_fsdp2_with_checkpoints_in_parts(launched: Launched, tmp_path: Path):
    """What is saved from whole states in the end is an adapter like any other."""
    folder = launched[0] / "fsdp2"
    checkpoint = folder / "parts" / "checkpoint-2"
    assert last_checkpoint(folder / "parts") == str(checkpoint)
    (checkpoint / "optimizer_0" / ".metadata").unlink()
    with pytest.warns(UserWarning, match="checkpoint-2 is passed over: it has no optimizer"):
        assert last_checkpoint(folder / "parts") == str(folder / "parts" / "checkpoint-1")
    alone = evaluated_alone("aurora_mode_approx", folder / "parts" / "final", tmp_path)
    assert alone == pytest.approx(launched[1][0]["fsdp2"]["parts"]["eval_loss"], rel=1e-4)


def test_fsdp1_takes_the_same_steps(launched: Launched):
    for name, found in launched[1][0]["fsdp1"].items():
        assert found["losses"] == pytest.approx(launched[1][0]["ddp"][name]["losses"], rel=1e-4)
        assert len(found["wrappers"]) > 4


# ------------------------------------------------------------------------------------------- what many would exchange


class Ranks:
    """Stands in for torch.distributed within the trainer: this process is the first of many, the others' rows noise."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.gathered: dict[torch.dtype, int] = dict.fromkeys((torch.float32, torch.int64), 0)
        self.reduced = 0

    def get_rank(self) -> int:
        return 0

    def get_world_size(self) -> int:
        return self.processes

    def all_gather(self, parts: list[torch.Tensor], x: torch.Tensor) -> None:
        self.gathered[x.dtype] += sum(part.nbytes for part in parts)
        for i, part in enumerate(parts):
            noise = F.normalize(torch.randn(x.shape), dim=-1) if x.ndim > 1 else torch.rand(x.shape)
            part.copy_(x if i == 0 else noise if x.is_floating_point() else x + i * len(x))

    def all_reduce(self, x: torch.Tensor) -> None:
        self.reduced += x.nbytes


def step_of_many(processes: int, rows: int, width: int, pairs: int = 0) -> dict[str, float]:
    """Bytes of one process in a step of `ContrastiveTrainer`: gathered, reduced, and kept of the loss matrices."""
    bank = HardSampleBank(range(pairs)) if pairs else None
    ranks, kept = Ranks(processes), {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.numel() == processes * rows * rows:
            kept[x.data_ptr(), x.dtype] = x.nbytes
        return x

    trainer = contrastive(Path("unused"))
    trainer.bank, trainer.sampler = bank, None
    images, texts = (F.normalize(torch.randn(rows, width), dim=-1).requires_grad_() for _ in range(2))
    keys = {name: torch.arange(rows) for name in ("sample", "image", "text")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft_multimodal.training.gathering.dist", ranks)
        patch.setattr(hf.TrainingArguments, "world_size", processes)
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = trainer._loss(trainer.model.train(), images, texts, [torch.tensor(10.0)], {}, keys)
        loss.backward()
        seconds = time.perf_counter() - start
    assert bank is None or (bank.visits > 0).sum() == processes * rows
    found = {"embeddings and difficulties": ranks.gathered[torch.float32], "keys": ranks.gathered[torch.int64]}
    return {**found, "reduced": ranks.reduced, "matrices": sum(kept.values()), "seconds": seconds}


@pytest.mark.parametrize("processes", [8, 64, 1024])
@pytest.mark.parametrize("remembers", [False, True])
def test_what_a_step_of_many_processes_exchanges(processes: int, remembers: bool):
    """The arithmetic of docs/guides/many-processes.md."""
    rows, width = 4, 24
    total = processes * rows
    found = step_of_many(processes, rows, width, pairs=2 * total if remembers else 0)
    assert found["embeddings and difficulties"] == 4 * total * (2 * width + remembers)
    assert found["keys"] == 8 * total * 3
    assert found["reduced"] == 4 * total * 2 * width
    assert found["matrices"] == rows * total * (2 * 4 + 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    into = Path(sys.argv[1])
    result: dict[str, Any]
    if case := sys.argv[2:]:
        result = trained(case[0], into / case[0], ddp_find_unused_parameters=False)
    else:
        result = {"ddp": ddp(into / "ddp")}  # first: accelerate remembers in its environment that it has sharded
        with fsdp_on_a_cpu():
            result |= {"fsdp2": fsdp2(into / "fsdp2"), "fsdp1": fsdp1(into / "fsdp1")}
    (into / f"found-{os.environ['RANK']}.json").write_text(json.dumps(result))
