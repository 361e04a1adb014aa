"""Every method under `transformers.Trainer` and our subclasses of it: exact restarts after kills, and Trainer's options.

Evaluation, adapter-only checkpoints and load_best_model_at_end are looked at in test_contract.py, for more families.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from case import declared
from families import FAMILIES, Family
from methods import CASES, METHODS, adapter, language, word_tokenizer, wrap
from test_contract import Rows
from test_hard_samples import Pairs
from test_hard_weather import in_a_child, result

from peft_multimodal import (
    ContrastiveTrainer,
    CrossLingualTrainer,
    HardSampleBank,
    ImageTextRetrievalTrainer,
    LanguageProcessor,
    last_checkpoint,
)
from peft_multimodal.training.trainer import AdapterTrainer

NAMES = [method for method in METHODS if "-" not in method]
PARTS = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> Iterator[None]:
    """Trainer collects garbage among all that was imported, which takes longer than the training."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def trained_on(method: str) -> Family:
    return FAMILIES[next(name for name in ("clip", "llava") if (name, method) in CASES)]


def dropout(method: str, p: float) -> dict[str, float]:
    """Changes of a config, where it has the field."""
    return {"dropout": p} if declared()[method].has("dropout") else {}


def arguments(folder: Path, **options: Any) -> hf.TrainingArguments:
    return hf.TrainingArguments(
        **{
            **{"output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 0.02},
            **{"save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 0},
            **{"logging_steps": 1, "remove_unused_columns": False, **options},
        }
    )


def stock(method: str, folder: Path, **options: Any) -> hf.Trainer:
    family = trained_on(method)
    model = wrap(family, method, stirred=False, **dropout(method, 0.2))
    rows = Rows(family, model)
    return hf.Trainer(model, arguments(folder, **options), rows.collate, train_dataset=rows)


def contrastive(folder: Path, **options: Any) -> hf.Trainer:
    model = wrap(FAMILIES["clip"], "hard_sample_domain_adapter", stirred=False, dropout=0.2)
    data = Pairs(24)
    bank = HardSampleBank.from_model(model, data, progress=False, momentum=0.5)
    return ContrastiveTrainer(model, arguments(folder, **options), train_dataset=data, hard_samples=bank, chunk_size=4)


def retrieval(folder: Path, **options: Any) -> hf.Trainer:
    family = FAMILIES["blip_retrieval"]
    model = wrap(family, "aurora_mode_approx", stirred=False, dropout=0.2)
    batch = family.inputs(model)
    rows = [{k: v[i] for k, v in batch.items()} for i in (0, 1, 2, 0, 2, 1)]
    return ImageTextRetrievalTrainer(
        model, arguments(folder, **options), data_collator=hf.default_data_collator, train_dataset=rows
    )


def cross_lingual(folder: Path, **options: Any) -> hf.Trainer:
    model = wrap(FAMILIES["clip"], "cross_lingual_adapter", stirred=False, dropout=0.2, adapter_name="zh")
    processor = LanguageProcessor(en=word_tokenizer(), zh=hf.AutoTokenizer.from_pretrained(language()))
    pairs = [{"source": f"w{4 + i} w5", "target": f"w{4 + i} w{6 + i}"} for i in range(12)]
    return CrossLingualTrainer(
        model, arguments(folder, **options), processing_class=processor, train_dataset=pairs, cache_dir=folder / "kept"
    )


TRAINERS = {**{name: lambda *a, _name=name, **k: stock(_name, *a, **k) for name in NAMES}}
TRAINERS |= {made.__name__: made for made in (contrastive, retrieval, cross_lingual)}


def learnt(trainer: hf.Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def assert_equal(actual: hf.Trainer, expected: hf.Trainer) -> None:
    """To the last bit: weights, optimizer, losses."""
    a, b = learnt(actual), learnt(expected)
    assert a.keys() == b.keys()
    assert [n for n in b if not torch.equal(a[n], b[n])] == []
    states = [trainer.optimizer.state_dict()["state"] for trainer in (actual, expected)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (actual, expected)]
    assert losses[0] == losses[1]
    assert len(losses[1]) == 8


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killed(hf.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            kill()


# ------------------------------------------------------------------------------------------------------------ restarts


@pytest.mark.parametrize("name", TRAINERS)
def test_killed_in_a_save_and_in_an_epoch(name: str, tmp_path: Path):
    """What comes out in the end is, to the last bit, what comes out of a run that nothing has interrupted."""
    make, options = TRAINERS[name], {"save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path / "whole", **options)
    whole.train()
    folder = tmp_path / "out"

    def killed_in_its_second_save() -> None:
        trainer = make(folder, **options)

        def half(output_dir: str) -> None:
            if trainer.state.global_step == 4:
                Path(output_dir, "optimizer.pt").write_bytes(b"PK\3\4 the beginning of a zip")
                kill()
            original(output_dir)

        original = trainer._save_optimizer_and_scheduler
        trainer._save_optimizer_and_scheduler = half
        trainer.train()

    def killed_after_the_next_save() -> None:
        trainer = make(folder, **options)
        trainer.add_callback(Killed(5))
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))

    assert last_checkpoint(folder) is None
    assert os.WTERMSIG(result(in_a_child(killed_in_its_second_save))) == signal.SIGKILL
    assert (folder / "checkpoint-4").is_dir()
    with pytest.warns(UserWarning, match="checkpoint-4 is passed over: it has no trainer_state.json"):
        assert last_checkpoint(folder) == str(folder / "checkpoint-2")
    assert os.WTERMSIG(result(in_a_child(killed_after_the_next_save))) == signal.SIGKILL
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")
    resumed = make(folder, **options)
    found = True if isinstance(resumed, AdapterTrainer) else last_checkpoint(folder)  # ours look for themselves
    resumed.train(resume_from_checkpoint=found)
    assert_equal(resumed, whole)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    stock("aurora_mode_approx", folder, max_steps=2, save_strategy="steps", save_steps=1).train()
    return folder


@pytest.mark.parametrize("file", PARTS)
@pytest.mark.parametrize("damage", ["gone", "empty", "half"])
def test_an_incomplete_checkpoint_is_passed_over(checkpoints: Path, file: str, damage: str, tmp_path: Path):
    folder = tmp_path / "out"
    shutil.copytree(checkpoints, folder)
    assert last_checkpoint(folder) == str(folder / "checkpoint-2")
    newest = folder / "checkpoint-2" / file
    content = newest.read_bytes()
    newest.unlink()
    if damage != "gone":
        newest.write_bytes(content[: len(content) // 2] if damage == "half" else b"")
    with pytest.warns(UserWarning, match=r"checkpoint-2 is passed over: (it has no|.*damaged)"):
        assert last_checkpoint(folder) == str(folder / "checkpoint-1")


def test_what_lies_in_an_output_folder(checkpoints: Path, tmp_path: Path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-7").write_text("a file")
    shutil.copytree(checkpoints / "checkpoint-2", tmp_path / "checkpoint-best")
    assert last_checkpoint(tmp_path) is None
    shutil.copytree(checkpoints / "checkpoint-1", tmp_path / "checkpoint-9")
    shutil.copytree(checkpoints / "checkpoint-2", tmp_path / "checkpoint-10")
    for step in (9, 10):
        state = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        state.write_text(state.read_text().replace(f'"global_step": {step - 8}', f'"global_step": {step}'))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10").rename(tmp_path / "checkpoint-11")
    with pytest.warns(UserWarning, match=r"its trainer_state.json is of step 10"):
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")


@pytest.mark.parametrize("state", ["[]", "3", '"x"', "null"])
def test_a_state_that_is_none(state: str, checkpoints: Path, tmp_path: Path):
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(checkpoints / name, tmp_path / name)
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(state)
    with pytest.warns(UserWarning, match=r"checkpoint-2 is passed over: trainer_state.json is cut off or damaged"):
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_every_rank_has_its_random_numbers(checkpoints: Path, tmp_path: Path):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoints / "checkpoint-2", folder)
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    with pytest.warns(UserWarning, match=r"of several processes only \[0\] saved their random numbers"):
        assert last_checkpoint(tmp_path) is None
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    assert last_checkpoint(tmp_path) == str(folder)


def test_a_new_run_s_killed_save_over_an_old_run_s(tmp_path: Path):
    contrastive(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")

    def anew() -> None:
        trainer = contrastive(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
        trainer._save_optimizer_and_scheduler = lambda folder: kill()
        trainer.train()

    assert os.WTERMSIG(result(in_a_child(anew))) == signal.SIGKILL
    with pytest.warns(UserWarning, match=r"it has no trainer_state.json"):
        assert last_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="has no complete checkpoint to resume from"):
        contrastive(tmp_path).train(resume_from_checkpoint=True)


def test_the_last_complete_checkpoint_is_never_deleted(tmp_path: Path):
    """`save_total_limit=1` deletes the older checkpoint when the newer one is whole, the sampler's state included."""

    def killed() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("transformers.trainer.rotate_checkpoints", lambda **options: kill())
            contrastive(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()

    assert os.WTERMSIG(result(in_a_child(killed))) == signal.SIGKILL
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    contrastive(tmp_path, max_steps=3).train(resume_from_checkpoint=last_checkpoint(tmp_path))


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("method", NAMES)
def test_gradient_accumulation_and_bf16(method: str, tmp_path: Path):
    """Two equal batches accumulated take the step of one; in bf16 nearly the same step."""
    changes = {}
    for name, options in {
        "once": {},
        "twice": {"gradient_accumulation_steps": 2},
        "bf16": {"bf16": True},
    }.items():
        family = trained_on(method)
        model = wrap(family, method, **dropout(method, 0.0))
        start = {n: p.detach().clone() for n, p in adapter(model).items()}
        rows = Rows(family, model, copies=1)
        rows.rows *= 2
        sgd = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        args = arguments(
            tmp_path,
            **{"max_steps": 1, "per_device_train_batch_size": 3, "train_sampling_strategy": "sequential"},
            **{**sgd, **options},
        )
        trainer = hf.Trainer(model, args, rows.collate, train_dataset=rows)
        trainer.train()
        assert {p.dtype for p in adapter(model).values()} == {torch.float32}
        changes[name] = {n: p.detach() - start[n] for n, p in adapter(model).items()}
    assert all(change.abs().max() > 0 for change in changes["once"].values())
    torch.testing.assert_close(changes["twice"], changes["once"], rtol=1e-4, atol=1e-6)
    one, half = (torch.cat([c.flatten() for c in changes[name].values()]) for name in ("once", "bf16"))
    assert torch.nn.functional.cosine_similarity(one, half, dim=0) > 0.99
    assert not torch.equal(one, half)


@pytest.mark.parametrize("method", NAMES)
def test_columns_that_the_model_does_not_read(method: str, tmp_path: Path):
    """`remove_unused_columns`, on by default, takes them out and leaves what the adapter reads."""
    family = trained_on(method)
    found = []
    for kind in ("rows", "dataset", "plain"):
        model = wrap(family, method, stirred=False, **dropout(method, 0.0))
        rows = Rows(family, model, copies=1)
        rest = rows.rest
        data: Any = rows
        if kind != "plain":
            data = [{**row, "note": f"row {i}"} for i, row in enumerate(rows.rows)]
        if kind == "dataset":
            data = datasets.Dataset.from_list(
                [{k: v.tolist() if k != "note" else v for k, v in r.items()} for r in data]
            )
            data = data.with_format("torch")

        def collate(batch: list[dict], rest: dict = rest) -> dict:
            return {**hf.default_data_collator(batch), **rest}

        args = arguments(tmp_path, max_steps=2, remove_unused_columns=kind != "plain")
        trainer = hf.Trainer(model, args, collate, train_dataset=data, eval_dataset=data)
        trainer.train()
        assert "eval_loss" in trainer.evaluate()
        found.append(learnt(trainer))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("method", NAMES)
def test_auto_find_batch_size(method: str, tmp_path: Path):
    trainer = stock(method, tmp_path, max_steps=2, per_device_train_batch_size=6, auto_find_batch_size=True)
    seen = []

    def full(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(len(kwargs["input_ids"]))
        if seen[-1] > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    trainer.model.register_forward_pre_hook(full, with_kwargs=True)
    before = learnt(trainer)
    trainer.train()
    assert trainer.state.global_step == 2
    assert seen[0] > max(seen[-2:])
    assert max(seen[-2:]) <= 3
    assert any(not torch.equal(p, before[n]) for n, p in learnt(trainer).items())


@pytest.mark.parametrize("method", NAMES)
def test_report_to_tensorboard(method: str, tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = stock(method, tmp_path, max_steps=2, report_to="tensorboard")
    trainer.train()
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)


@pytest.fixture(scope="module")
def trackio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))  # read when it is imported
        yield pytest.importorskip("trackio")


@pytest.mark.parametrize("method", NAMES)
def test_report_to_trackio(method: str, trackio: Any, tmp_path: Path):
    trainer = stock(method, tmp_path, max_steps=2, report_to="trackio", project=method)
    trainer.train()
    (run,) = trackio.Api().runs(method)
    (config,) = run.config["peft_config"].values()
    assert method in str(config).lower()
    metrics = trackio.sqlite_storage.SQLiteStorage.get_logs(method, run.name)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["train/loss"] for entry in metrics if "train/loss" in entry] == pytest.approx(logged)
