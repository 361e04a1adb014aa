"""What people do who train: they go on with other batches, want the best checkpoint, have few pairs or equal captions."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from case import declared
from docs_reader import blocks
from families import FAMILIES, Family, tiny
from methods import METHODS, language, word_tokenizer, wrap
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from test_contract import Rows
from test_docs import PAGES
from test_hard_samples import Pairs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft_multimodal
from peft_multimodal import (
    AdapterCallback,
    AuroraModeApproxConfig,
    ContrastiveTrainer,
    CrossLingualTrainer,
    DistillationLoss,
    HardSampleBank,
    ImageTextCollator,
    ImageTextRetrievalTrainer,
    LanguageProcessor,
)
from peft_multimodal.core import registry
from peft_multimodal.evaluation import retrieval_recall
from peft_multimodal.rows import hash_ids
from peft_multimodal.training import contrastive_loss, pair_losses, retrieval_loss, sigmoid_loss, sigmoid_pair_losses
from peft_multimodal.training.hard_samples import stack_rows
from peft_multimodal.training.losses import text_keys

DOMAIN = "hard_sample_domain_adapter"


def arguments(folder: Path, **options: Any) -> hf.TrainingArguments:
    return hf.TrainingArguments(
        **{
            **{"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
            **{"save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1},
            **options,
        }
    )


def contrastive(folder: Path, rows: int = 24, bank: bool = True, **options: Any) -> ContrastiveTrainer:
    own = {k: options.pop(k) for k in ("chunk_size", "loss", "callbacks") if k in options}
    model, data = wrap(FAMILIES["clip"], DOMAIN, stirred=False, dropout=0.1), Pairs(rows)
    hard = HardSampleBank.from_model(model, data, progress=False) if bank else None
    return ContrastiveTrainer(model, arguments(folder, **options), train_dataset=data, hard_samples=hard, **own)


def plain(folder: Path, **options: Any) -> ContrastiveTrainer:
    return contrastive(folder, bank=False, **options)


def retrieval(folder: Path, rows: int = 24, **options: Any) -> ImageTextRetrievalTrainer:
    model = wrap(FAMILIES["blip_retrieval"], "aurora_mode_approx", stirred=False)
    rows = [{k: v for k, v in row.items() if k != "id"} for row in Pairs(rows)]
    return ImageTextRetrievalTrainer(
        model, arguments(folder, **options), data_collator=hf.default_data_collator, train_dataset=rows
    )


def processor() -> LanguageProcessor:
    return LanguageProcessor(en=word_tokenizer(), zh=hf.AutoTokenizer.from_pretrained(language()))


def translations(count: int = 24) -> list[dict[str, str]]:
    return [{"source": f"w{4 + i} w5", "target": f"w{4 + i} w{6 + i}"} for i in range(count)]


def student(name: str = "zh") -> PeftModel:
    return wrap(FAMILIES["clip"], "cross_lingual_adapter", stirred=False, adapter_name=name)


def cross_lingual(folder: Path, rows: int = 24, **options: Any) -> CrossLingualTrainer:
    own = {k: options.pop(k) for k in ("loss", "cache", "eval_dataset", "compute_metrics") if k in options}
    data = options.pop("data", translations(rows))
    model = options.pop("model", None) or student()
    return CrossLingualTrainer(
        model,
        arguments(folder, **options),
        processing_class=processor(),
        train_dataset=data,
        cache_dir=folder / "kept",
        **own,
    )


TRAINERS: dict[str, Any] = {made.__name__: made for made in (contrastive, plain, retrieval, cross_lingual)}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------------------------------- going on with other batches

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
OTHER_BATCHES = {
    "smaller": {"per_device_train_batch_size": 2},
    "larger": {"per_device_train_batch_size": 8},
    "accumulated": {"gradient_accumulation_steps": 2},
    "as many rows a step": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("name", TRAINERS)
def test_other_batches_are_refused_before_the_first_step(name: str, tmp_path: Path):
    TRAINERS[name](tmp_path, **SAVING).train()
    for options in OTHER_BATCHES.values():
        trainer = TRAINERS[name](tmp_path, **{**SAVING, **options})
        before, bank = weights(trainer.model), getattr(trainer, "bank", None)
        with pytest.raises(
            ValueError, match=r"checkpoint-2 was saved with per_device_train|checkpoint-2 was saved with grad"
        ):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert trainer.state.global_step == 0
        assert all(torch.equal(p, before[n]) for n, p in weights(trainer.model).items())
        assert bank is None or bank.visits.sum() == 0
    trainer = TRAINERS[name](tmp_path, **SAVING)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4


def test_a_last_batch_that_is_dropped(tmp_path: Path):
    """Where every batch is full, `dataloader_drop_last` changes nothing, and training goes on to the same end."""
    whole = contrastive(tmp_path, **SAVING)
    whole.train()
    again = contrastive(tmp_path, **SAVING, dataloader_drop_last=True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(p, weights(whole.model)[n]) for n, p in weights(again.model).items())
    np.testing.assert_array_equal(again.bank.visits, whole.bank.visits)
    contrastive(tmp_path / "uneven", rows=22, **SAVING).train()
    with pytest.raises(ValueError, match=r"dataloader_drop_last=0 \(now 1\)"):
        contrastive(tmp_path / "uneven", rows=22, **SAVING, dataloader_drop_last=True).train(
            resume_from_checkpoint=True
        )


def test_a_checkpoint_of_an_older_version_tells_its_batch_size(tmp_path: Path):
    contrastive(tmp_path, **SAVING).train()
    (tmp_path / "checkpoint-4" / "batches.json").unlink()
    with pytest.raises(ValueError, match=r"per_device_train_batch_size=4 \(now 2\)"):
        contrastive(tmp_path, **SAVING, per_device_train_batch_size=2).train(resume_from_checkpoint=True)


def test_chunks_of_another_size_are_refused(tmp_path: Path):
    contrastive(tmp_path, **SAVING).train()
    for chunk_size in (None, 4):
        trainer = contrastive(tmp_path, rows=24, **SAVING, chunk_size=chunk_size)
        if trainer._sampler().batches == contrastive(tmp_path)._sampler().batches:
            continue
        with pytest.raises(ValueError, match="The sampler was saved with 4 rows a step"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert trainer.bank.visits.sum() == 0


@pytest.mark.parametrize("name", ["plain", "retrieval", "cross_lingual"])
def test_other_rows_or_another_order_of_them_are_refused(name: str, tmp_path: Path):
    TRAINERS[name](tmp_path, **SAVING).train()
    for options, message in (({"rows": 20}, r"rows=24 \(now 20\)"), ({"seed": 7}, r"data_seed=42 \(now 7\)")):
        trainer = TRAINERS[name](tmp_path, **SAVING, **options)
        before = weights(trainer.model)
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert all(torch.equal(p, before[n]) for n, p in weights(trainer.model).items())
    trainer = TRAINERS[name](tmp_path, **SAVING, seed=7, data_seed=42)  # another dropout, the same order
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4


def test_a_bank_keeps_its_order_under_another_seed(tmp_path: Path):
    contrastive(tmp_path, **SAVING).train()
    trainer = contrastive(tmp_path, **SAVING, seed=7)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.bank.visits.sum() == 4 * 4


def test_a_new_epoch_may_have_any_batches(tmp_path: Path):
    contrastive(tmp_path, **SAVING).train()
    trainer = contrastive(tmp_path, **SAVING, per_device_train_batch_size=2, ignore_data_skip=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.bank.visits.sum() == 2 * 4 + 2 * 2


def test_processes_may_share_a_batch_out_otherwise_where_the_loss_is_one_of_all(tmp_path: Path):
    then = {
        "processes": 2,
        "gradient_accumulation_steps": 1,
        "dataloader_drop_last": 0,
        "per_device_train_batch_size": 2,
    }
    now = {**then, "processes": 1, "per_device_train_batch_size": 4}
    for name, make in TRAINERS.items():
        assert make(tmp_path)._goes_on_exactly(then, now) == (name in ("contrastive", "plain")), name
    assert not contrastive(tmp_path, rows=22)._goes_on_exactly(then, now)  # two processes fill up the last batch
    dropped = {"dataloader_drop_last": 1}
    assert contrastive(tmp_path, rows=22)._goes_on_exactly({**then, **dropped}, {**now, **dropped})
    assert not contrastive(tmp_path)._goes_on_exactly(then, {**now, "per_device_train_batch_size": 2})


# ------------------------------------------------------------------------------------------------ the best checkpoint


def one_adapter(family: Family) -> PeftModel:
    return wrap(family, "aurora_mode_approx", stirred=False, adapter_name="mine")


def a_lora(family: Family) -> PeftModel:
    return get_peft_model(family.build(), LoraConfig(target_modules=["q_proj"]), adapter_name="mine")


def two_adapters(family: Family) -> PeftModel:
    """As docs/training.md puts them on one model."""
    model = get_peft_model(family.build(), AuroraModeApproxConfig(r=4), adapter_name="aurora")
    return get_peft_model(model, METHODS["gated_xattn"](family), adapter_name="images")


def best_of(model: PeftModel, folder: Path, callbacks: list[Any]) -> Path:
    """Train it so that the first of two checkpoints is the best."""
    rows = Rows(FAMILIES["llava"], model, copies=1)
    options = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    args = arguments(folder, **options, **best, remove_unused_columns=False, learning_rate=5e-3)
    trainer = hf.Trainer(
        model, args, rows.collate, train_dataset=rows, eval_dataset=rows, callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-1")
    return folder / "checkpoint-1"


@pytest.mark.parametrize("make", [one_adapter, a_lora, two_adapters])
def test_the_stock_trainer_loads_the_best_of_every_adapter(make: Any, tmp_path: Path):
    model = make(FAMILIES["llava"])
    best = best_of(model, tmp_path, [AdapterCallback()])
    model.save_pretrained(tmp_path / "end")
    files = sorted(best.rglob("adapter_model.safetensors"))
    assert len(files) == len(model.peft_config)
    for file in files:
        kept, last = load_file(file), load_file(tmp_path / "checkpoint-2" / file.relative_to(best))
        end = load_file(tmp_path / "end" / file.relative_to(best))
        assert any(not torch.equal(kept[name], last[name]) for name in kept), "both checkpoints are equal"
        assert all(torch.equal(kept[name], end[name]) for name in kept)


def test_a_default_adapter_under_another_is_refused_before_training(tmp_path: Path):
    """The stock Trainer would load its weights into the active one, at the end."""
    family = FAMILIES["llava"]
    model = get_peft_model(family.build(), AuroraModeApproxConfig(r=4))
    both = get_peft_model(model, METHODS["gated_xattn"](family), adapter_name="images")
    with pytest.raises(ValueError, match="would load the adapter 'default' into 'images'"):
        best_of(both, tmp_path, [AdapterCallback()])
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("names", [["mine"], ["default", "other"]])
def test_our_trainers_load_the_best_of_every_adapter(names: list[str], tmp_path: Path):
    model = wrap(FAMILIES["clip"], "aurora_mode_approx", stirred=False, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, METHODS["aurora_mode_approx"](FAMILIES["clip"]))
        model.set_adapter(name)
    args = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1, "eval_steps": 1, "learning_rate": 5e-3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    data = Pairs(8)
    trainer = ContrastiveTrainer(
        model, arguments(tmp_path, **args, **best), train_dataset=data, eval_dataset=data, callbacks=[AdapterCallback()]
    )
    trainer.train()
    best_folder = Path(trainer.state.best_model_checkpoint)
    assert best_folder.name == "checkpoint-1"
    model.save_pretrained(tmp_path / "end")
    for file in best_folder.rglob("adapter_model.safetensors"):
        end = load_file(tmp_path / "end" / file.relative_to(best_folder))
        assert all(torch.equal(weight, end[name]) for name, weight in load_file(file).items())


def test_without_the_callback_it_is_said_where_the_best_is_lost(tmp_path: Path):
    with pytest.warns(UserWarning, match=r"'mine' is saved in .*checkpoint-1.mine.*AdapterCallback"):
        best_of(one_adapter(FAMILIES["llava"]), tmp_path, [])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*AdapterCallback")
        best_of(one_adapter(FAMILIES["llava"]), tmp_path / "cared for", [AdapterCallback()])


# ------------------------------------------------------------------------------------------------ batches of one pair


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["contrastive", "plain", "retrieval"])
def test_batches_of_one_pair_are_refused(name: str, accumulation: int, tmp_path: Path):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation}
    with pytest.raises(ValueError, match="A batch has one pair, which has no negatives"):
        TRAINERS[name](tmp_path, **options)
    with pytest.raises(ValueError, match="The data set has one pair, which has no negatives"):
        TRAINERS[name](tmp_path, rows=1)
    trainer = TRAINERS[name](tmp_path)
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = 1  # later, as a search for the size does
    with pytest.raises(ValueError, match="A batch has one pair"):
        trainer.train()


@pytest.mark.parametrize("name", ["contrastive", "plain", "retrieval"])
def test_a_last_batch_of_one_pair_is_said(name: str, tmp_path: Path):
    with pytest.warns(UserWarning, match=r"last of an epoch's batches has one pair \(9 rows in batches of 4\)"):
        TRAINERS[name](tmp_path, rows=9, max_steps=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*one pair")
        TRAINERS[name](tmp_path, rows=9, max_steps=3, dataloader_drop_last=True)


def test_a_last_batch_of_one_pair_is_said_once_and_where_it_is_reached(tmp_path: Path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plain(tmp_path, rows=9, max_steps=3).train()
    assert sum("The last of an epoch's batches" in str(warning.message) for warning in said) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*one pair")
        plain(tmp_path, rows=9, max_steps=2).train()


def test_distillation_of_one_pair(tmp_path: Path):
    """Only its contrastive term needs others."""
    alone = DistillationLoss(mse=0, cosine=0, contrastive=1)
    with pytest.raises(ValueError, match="A batch has one pair"):
        cross_lingual(tmp_path, loss=alone, per_device_train_batch_size=1)
    with pytest.warns(UserWarning, match="the term contrastive= teaches nothing"):
        cross_lingual(tmp_path, per_device_train_batch_size=1)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "retrieval", "pairs"])
def test_every_loss_says_that_one_pair_has_no_negatives(loss: str):
    one, ids = F.normalize(torch.randn(1, 4), dim=-1), torch.zeros(1, dtype=torch.long)
    family = FAMILIES["blip_retrieval"]
    found = {
        "softmax": lambda: contrastive_loss(one, one, 1.0),
        "sigmoid": lambda: sigmoid_loss(one, one, 1.0, 0.0),
        "pairs": lambda: pair_losses(one, one, one, one, 1.0, ids, ids),
        "retrieval": lambda: retrieval_loss(family.build(), {k: v[:1] for k, v in family.inputs().items()}),
    }
    with pytest.warns(UserWarning, match="A batch of one pair has no negatives"):
        found[loss]()


def test_no_batch_is_left(tmp_path: Path):
    for make in TRAINERS.values():
        with pytest.raises(
            ValueError, match=r"An epoch has 3 rows, a batch of all processes 4: with dataloader_drop_last"
        ):
            make(tmp_path, rows=3, dataloader_drop_last=True).train()


# --------------------------------------------------------------------------- several captions, equal captions, no caption


class TinyProcessor:
    """Images of one size and the tests' words."""

    def __init__(self) -> None:
        self.tokenizer = word_tokenizer()

    def __call__(self, images: Any, text: Any, **options: Any) -> dict[str, Any]:
        pixels = [torch.tensor(np.array(image.resize((16, 16))) / 255.0).permute(2, 0, 1).float() for image in images]
        tokens = self.tokenizer(text, padding=True, return_tensors="pt")
        return {"pixel_values": torch.stack(pixels), **{k: tokens[k] for k in ("input_ids", "attention_mask")}}


def captioned(count: int = 8) -> list[dict[str, Any]]:
    captions = [[f"w{4 + i}", f"w{20 + i} w5", f"w{30 + i} w6 w7"] for i in range(count)]
    return [{"id": i, "image": Image.new("RGB", (16, 16), (20 * i, 9, 99)), "text": c} for i, c in enumerate(captions)]


@pytest.mark.parametrize("name", ["contrastive", "retrieval"])
def test_evaluation_is_the_same_each_time_and_training_draws(name: str, tmp_path: Path):
    family, method = {"contrastive": ("clip", DOMAIN), "retrieval": ("blip_retrieval", "aurora_mode_approx")}[name]
    make = {"contrastive": ContrastiveTrainer, "retrieval": ImageTextRetrievalTrainer}[name]
    rows = captioned()
    trainer = make(
        wrap(FAMILIES[family], method), arguments(tmp_path), ImageTextCollator(TinyProcessor()),
        train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip
    losses = [trainer.evaluate()["eval_loss"] for _ in range(4)]
    assert len(set(losses)) == 1
    found = [trainer.predict(rows).label_ids for _ in range(2)]
    np.testing.assert_array_equal(*found)
    trained = {
        tuple(map(tuple, batch["input_ids"].tolist())) for _ in range(4) for batch in trainer.get_train_dataloader()
    }
    assert max(len(row) for batch in trained for row in batch) > 3  # longer ones than each row's first


def repeated(batch: dict[str, torch.Tensor], rows: list[int]) -> dict[str, torch.Tensor]:
    """The texts of these rows, each with an image of its own."""
    pixels = torch.randn(len(rows), *batch["pixel_values"].shape[1:], generator=torch.Generator().manual_seed(4))
    return {"pixel_values": pixels, **{k: batch[k][rows] for k in ("input_ids", "attention_mask")}}


def test_equal_captions_are_no_negatives_of_each_other():
    """Without ids as with ids that say so, whatever the padding."""
    family = FAMILIES["blip_retrieval"]
    batch = repeated(family.inputs(), [0, 1, 0, 2])
    model, ids = family.build(), torch.tensor([0, 1, 0, 2])
    said = retrieval_loss(model, {**batch, "ids": ids}, generator=torch.Generator().manual_seed(0))
    found = retrieval_loss(model, batch, generator=torch.Generator().manual_seed(0))
    for name in ("itc_loss", "itm_loss"):
        torch.testing.assert_close(found[name], said[name], rtol=0, atol=0)
    assert torch.isfinite(found["loss"])


def test_a_row_without_a_negative_leaves_the_others_theirs():
    """Row 0 shares its caption with 1 and its id with 2; those two are negatives of each other."""
    family = FAMILIES["blip_retrieval"]
    batch = {**repeated(family.inputs(), [0, 0, 1]), "ids": torch.tensor([5, 6, 5])}
    seen: list[int] = []
    model = family.build()
    model.itm_head.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    assert torch.isfinite(retrieval_loss(model, batch)["loss"])
    assert seen == [3 + 2 + 2]
    alike = repeated(family.inputs(), [0, 0, 0])
    assert retrieval_loss(model, alike)["itc_loss"] == 0
    assert seen[-1] == 3


class Lazy:
    """A stream that is no data set of torch's."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_pairs_with_an_empty_side_are_left_out_and_counted(workers: int, tmp_path: Path):
    pairs = translations(12)
    gaps = [{"source": "", "target": "w4"}, {"source": "w4", "target": "  "}, {"source": "w5", "target": None}]
    data = Lazy([*pairs[:5], gaps[0], *pairs[5:], *gaps[1:]])
    run = cross_lingual(
        tmp_path, data=data, cache=False, eval_dataset={"a": Lazy([*gaps, *pairs])}, dataloader_num_workers=workers,
        max_steps=3 * max(1, workers),
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"Row 5 has an empty side.*trainer\.skipped"):
        run.train()
    batches = list(run.get_train_dataloader())
    run.evaluate()
    assert {len(batch["target_input_ids"]) for batch in batches} == {4}
    assert run.skipped == {"train": 3 * max(1, workers), "eval_a": 3 * max(1, workers)}  # each worker reads the stream
    with pytest.raises(ValueError, match="needs the columns 'source' and 'target'; row 0 has"):
        cross_lingual(tmp_path, data=Lazy([{"english": "w4"}]), cache=False).train()


# ---------------------------------------------------------------------------------------------------------- model_init


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", [None, "x"])
def test_pairs_of_another_evaluation_set_with_an_empty_side_are_left_out(name: str | None, cache: bool, tmp_path: Path):
    trainer = cross_lingual(tmp_path, cache=cache, eval_dataset=translations(8))
    other = [*translations(8), {"source": "", "target": "w5"}]
    for data in (other, datasets.Dataset.from_list(other).to_iterable_dataset()):
        with pytest.warns(UserWarning, match=r"empty side"):
            found = trainer.evaluate(data if name is None else {name: data})
        assert trainer.skipped["eval"] == 1
        key = "eval_loss" if name is None else f"eval_{name}_loss"
        assert found[key] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


def test_every_trainer_takes_model_init(tmp_path: Path):
    """The model that train() makes anew is the one that learns, and starts as a given one does."""
    made: list[nn.Module] = []
    factories = {
        "contrastive": lambda: wrap(FAMILIES["clip"], DOMAIN, stirred=False),
        "retrieval": lambda: wrap(FAMILIES["blip_retrieval"], "aurora_mode_approx", stirred=False),
        "cross_lingual": student,
    }

    def maker(name: str) -> Any:
        def make() -> nn.Module:
            made.append(factories[name]())
            return made[-1]

        return make

    data, args = Pairs(8), arguments(tmp_path, max_steps=3)
    bank = HardSampleBank.from_model(factories["contrastive"](), data, progress=False)
    first = ContrastiveTrainer(
        args=args, model_init=maker("contrastive"), train_dataset=data, hard_samples=bank, keep_close=0.1
    )
    second = ImageTextRetrievalTrainer(
        args=args, model_init=maker("retrieval"), train_dataset=[stack_rows([r]) | {} for r in data][:0] or
        [{k: v for k, v in row.items() if k != "id"} for row in data], data_collator=hf.default_data_collator,
    )  # fmt: skip
    third = CrossLingualTrainer(
        args=args, model_init=maker("cross_lingual"), processing_class=processor(), train_dataset=translations(),
        cache_dir=tmp_path,
    )  # fmt: skip
    given = CrossLingualTrainer(
        student(), args, processing_class=processor(), train_dataset=translations(), cache_dir=tmp_path
    )
    for trainer in (first, second, third, given):
        trainer.train()
        assert trainer.state.global_step == 3
    assert first.model is made[-3]
    assert made[-3].base_model.banks["default"] is bank
    assert third.model is made[-1]
    for name, weight in weights(given.model).items():
        torch.testing.assert_close(weights(third.model)[name], weight, msg=name)
    before = bank.visits.copy()
    first.train()  # a search's next trial starts from the first bank
    np.testing.assert_array_equal(bank.visits.sum(), before.sum())


def test_a_model_init_that_does_not_fit_is_refused_by_its_own_reason(tmp_path: Path):
    data, args = Pairs(8), arguments(tmp_path)
    with pytest.raises(ValueError, match="keep_close compares with the model without its adapters"):
        ContrastiveTrainer(args=args, model_init=FAMILIES["clip"].build, train_dataset=data, keep_close=0.1)
    with pytest.raises(ValueError, match="The model has no language"):
        CrossLingualTrainer(args=args, model_init=FAMILIES["clip"].build, processing_class=processor())
    with pytest.raises(RuntimeError, match="requires either a `model` or `model_init`"):
        ContrastiveTrainer(args=args, train_dataset=data)


# ------------------------------------------------------------------------------------------------------ the logit scale


def stretched(family: Family, start: float) -> nn.Module:
    """Fully tuned, with a scale near its bound and a loss that wants it larger."""
    model = family.build()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(start))
    return model


def far_steps(trainer: Any) -> None:
    """Steps that pull up the scale alone."""
    trainer.compute_loss = lambda model, inputs, **kwargs: (
        -sum(p.sum() for n, p in model.named_parameters() if n.endswith("logit_scale"))
    )
    trainer.train()


@pytest.mark.parametrize("stock", [False, True])
def test_a_clip_s_scale_stays_at_a_hundred(stock: bool, tmp_path: Path):
    model = stretched(FAMILIES["clip"], 90.0)
    args = arguments(tmp_path, learning_rate=0.5, max_steps=3)
    options = {"train_dataset": [{k: v for k, v in row.items() if k != "id"} for row in Pairs(8)]}
    if stock:
        trainer: Any = hf.Trainer(model, args, **options, callbacks=[AdapterCallback()])
    else:
        trainer = ContrastiveTrainer(model, args, **options)
    far_steps(trainer)
    assert float(model.logit_scale.exp()) == pytest.approx(100)


def test_the_bound_is_the_family_s(tmp_path: Path):
    rows = Pairs(8)
    larger = stretched(FAMILIES["clip"], 150.0)  # what was trained past the bound isn't pulled down
    far_steps(ContrastiveTrainer(larger, arguments(tmp_path, learning_rate=0.5), train_dataset=rows))
    assert float(larger.logit_scale.exp()) == pytest.approx(150)
    siglip = stretched(FAMILIES["siglip"], 110.0)  # the sigmoid loss has no bound
    far_steps(ContrastiveTrainer(siglip, arguments(tmp_path, learning_rate=0.5), train_dataset=rows))
    assert float(siglip.logit_scale.detach().squeeze().exp()) > 111


def test_a_model_is_asked_for_its_bound(tmp_path: Path):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = hf.Aimv2TextConfig(**tower, vocab_size=64, max_position_embeddings=16, eos_token_id=2)
    vision = hf.Aimv2VisionConfig(**tower, image_size=16, patch_size=8)
    config = hf.Aimv2Config(text_config=text, vision_config=vision, projection_dim=16, max_logit_scale=30.0)
    model = tiny(hf.Aimv2Model, config)()
    far_steps(ContrastiveTrainer(model, arguments(tmp_path, learning_rate=2.0), train_dataset=Pairs(8)))
    assert float(model.logit_scale.exp()) == pytest.approx(30)


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
        self.head.logit_scale = nn.Parameter(torch.tensor(math.log(99.0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)) * self.head.logit_scale.exp()


def test_a_scale_in_modules_to_save_is_bounded_too():
    from peft_multimodal.training.temperature import ScaleBounds

    model = get_peft_model(WithHead(), LoraConfig(target_modules=["body"], modules_to_save=["head"]))
    bounds = ScaleBounds(model)
    (copy,) = (p for n, p in model.named_parameters() if n.endswith("logit_scale") and p.requires_grad)
    with torch.no_grad():
        copy.add_(1.0)
    bounds()
    assert float(copy.exp()) == pytest.approx(100)


# ---------------------------------------------------------------------------------------------------- metrics, arguments


@pytest.mark.parametrize("name", ["contrastive", "retrieval", "cross_lingual"])
def test_metrics_and_predictions_of_every_trainer(name: str, tmp_path: Path):
    """compute_metrics gets the two sides; with include_for_metrics=["inputs"] also what the model read."""
    trainer = TRAINERS[name](tmp_path, rows=12, include_for_metrics=["inputs", "loss"])
    seen: list[Any] = []
    trainer.compute_metrics = lambda found: seen.append(found) or {"rows": len(found.predictions)}
    data = trainer.train_dataset
    metrics = trainer.evaluate(data)
    assert metrics["eval_rows"] == 12
    assert len(seen[0].inputs) == len(seen[0].label_ids) == 12
    found = trainer.predict(data)
    assert found.predictions.shape == found.label_ids.shape
    assert len(found.predictions) == 12
    np.testing.assert_allclose(found.predictions, seen[0].predictions)


def test_what_the_kept_outputs_and_the_stream_say_was_read(tmp_path: Path):
    seen: list[Any] = []
    for cache in (True, False):
        run = cross_lingual(
            tmp_path, cache=cache, eval_dataset=translations(6), include_for_metrics=["inputs"],
            compute_metrics=lambda found: seen.append(found.inputs) or {},
        )  # fmt: skip
        run.evaluate()
    np.testing.assert_array_equal(np.sort(seen[0], axis=0), np.sort(seen[1], axis=0))


def test_retrieval_metrics_are_those_of_the_embeddings(tmp_path: Path):
    trainer = retrieval(tmp_path, rows=12)
    trainer.compute_metrics = lambda found: retrieval_recall(
        torch.from_numpy(found.predictions), torch.from_numpy(found.label_ids), ks=(1, 5)
    )
    metrics = trainer.evaluate(trainer.train_dataset)
    assert 0 < metrics["eval_mean_recall"] < 100
    assert np.isfinite(metrics["eval_loss"])


def test_arguments_stay_the_user_s_own(tmp_path: Path):
    """The trainers keep the object, so later changes and what hangs on it arrive; its columns setting stays."""
    for make in TRAINERS.values():
        trainer = make(tmp_path)
        args = trainer.args
        assert args.remove_unused_columns is True
        args.note, args.max_steps = "hung on it", 1
        trainer.train()
        assert trainer.state.global_step == 1
    mine = arguments(tmp_path)
    assert ContrastiveTrainer(wrap(FAMILIES["clip"], DOMAIN), mine, train_dataset=Pairs(8)).args is mine


def test_evaluation_data_by_name_alone(tmp_path: Path):
    model = wrap(FAMILIES["clip"], DOMAIN)
    trainer = ContrastiveTrainer(model, arguments(tmp_path), eval_dataset={"a": Pairs(6), "b": Pairs(8)})
    assert {"eval_a_loss", "eval_b_loss"} <= trainer.evaluate().keys()


# ------------------------------------------------------------------------------------------------------- learning rates


@pytest.mark.parametrize("name", TRAINERS)
def test_a_learning_rate_that_teaches_little_is_said_once(name: str, tmp_path: Path):
    rate = hf.TrainingArguments("x", use_cpu=True).learning_rate
    trainer = TRAINERS[name](tmp_path, learning_rate=rate, warmup_steps=2)
    with pytest.warns(UserWarning, match="learning rate") as said:
        trainer.train()
    found = [
        str(w.message) for w in said if "trains at a learning rate of 5e-05: it will hardly learn" in str(w.message)
    ]
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*learning rate")
        TRAINERS[name](tmp_path).train()


@pytest.mark.parametrize("method", sorted(registry.METHODS))
def test_the_callback_says_it_under_the_stock_trainer(method: str, tmp_path: Path):
    family = FAMILIES["clip" if "clip" in declared()[method].families() else "llava"]
    model = wrap(family, method, stirred=False, adapter_name="mine")
    low, high = model.base_model.learning_rates
    rows = Rows(family, model, copies=1)
    for rate, text in ((low / 2, "hardly learn"), (high * 2, "unstable"), ((low * high) ** 0.5, None)):
        args = arguments(tmp_path, learning_rate=rate, max_steps=1, remove_unused_columns=False)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            hf.Trainer(model, args, rows.collate, train_dataset=rows, callbacks=[AdapterCallback()]).train()
        found = [str(w.message) for w in said if "learning rate" in str(w.message)]
        assert len(found) == (text is not None)
        assert text is None or text in found[0]


CLASSES = rf"({'|'.join(m.title for m in registry.METHODS.values())})Config\("


@pytest.mark.parametrize("page", PAGES)
def test_every_block_that_makes_arguments_names_a_sane_rate(page: str):
    for block in blocks(page):
        for call in re.findall(r"TrainingArguments\(.*?\)\n", block.text, re.DOTALL):
            rate = re.search(r"learning_rate=([\d.e-]+)", call)
            assert rate, f"{page}, line {block.line}: {call}"
            for name in re.findall(CLASSES, block.text):
                low, high = getattr(peft_multimodal, f"{name}Model").learning_rates
                assert low <= float(rate[1]) <= high, f"{page}, line {block.line}: {name} at {rate[1]}"


@pytest.mark.parametrize("method", sorted(registry.METHODS))
def test_each_model_page_states_the_range(method: str):
    registered = registry.METHODS[method]
    low, high = registered.model.learning_rates
    text = (Path(__file__).parents[1] / registered.docs).read_text()
    stated = re.search(r"[Ll]earning rates? from ([\d.e-]+\d) to ([\d.e-]+\d)", " ".join(text.split()))
    assert stated, f"{method}: Learning rates from {low:g} to {high:g}"
    assert (float(stated[1]), float(stated[2])) == (low, high)


# ---------------------------------------------------------------------------------------------------------------- messages


def test_an_adapter_that_is_not_called_as_its_language(tmp_path: Path):
    with pytest.raises(ValueError, match=r"The adapter is called 'default'.*adapter_name='zh'.*language='zh'"):
        cross_lingual(tmp_path, model=student("default"))


def test_recall_among_fewer_items_than_k():
    few = torch.randn(6, 4)
    with pytest.warns(UserWarning, match="Recall@10 among 6 items is 100 % for any model"):
        retrieval_recall(few, few.flip(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        retrieval_recall(few, few, ks=(1, 5))


# ------------------------------------------------------------------------------------------------------ the sigmoid loss


def siglip(tuned: bool = False) -> nn.Module:
    base = FAMILIES["siglip"].build()
    with torch.no_grad():
        base.logit_scale.fill_(math.log(10.0))
        base.logit_bias.fill_(-10.0)
    return base if tuned else wrap(FAMILIES["siglip"], DOMAIN, base=base)


def test_the_sigmoid_loss_against_a_slow_version():
    image, text = (F.normalize(torch.randn(7, 5), dim=-1) for _ in range(2))
    images, texts = torch.tensor([0, 1, 1, 2, 3, 4, 5]), torch.tensor([0, 1, 2, 3, 0, 5, 6])
    expected = []
    for i in range(7):
        total = 0.0
        for j in range(7):
            if i == j or (images[i] != images[j] and texts[i] != texts[j]):
                y = 1 if i == j else -1
                total -= (
                    sum(F.logsigmoid(y * (8 * a @ b - 3)) for a, b in ((image[i], text[j]), (image[j], text[i]))) / 2
                )
        expected.append(total)
    found = sigmoid_loss(image, text, 8.0, -3.0, images, texts, reduction="none")
    torch.testing.assert_close(found, torch.stack(expected))
    for part in (slice(0, 3), slice(3, 7)):  # of two processes, in chunks of two
        some = sigmoid_pair_losses(image[part], text[part], image, text, 8.0, -3.0, images, texts, part.start, 2)
        torch.testing.assert_close(some, found[part])


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that anything makes."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))]
        )
        return out


def test_the_sigmoid_loss_refuses_what_the_other_one_refuses():
    image, text = torch.randn(2, 5, 8)
    for loss, temper in ((sigmoid_loss, (10.0, -10.0)), (contrastive_loss, (10.0,))):
        with pytest.raises(ValueError, match="Rows must be pairs"):
            loss(image, text[:3], *temper)
        with pytest.raises(ValueError, match="Ids have shape"):
            loss(image, text, *temper, image_ids=torch.arange(3))
        with pytest.raises(ValueError, match="reduction='sum' is neither"):
            loss(image, text, *temper, reduction="sum")


def test_the_sigmoid_loss_never_holds_the_whole_matrix():
    rows = 1024
    image, text = (F.normalize(torch.randn(rows, 8), dim=-1).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    with Largest() as seen:
        loss = sigmoid_loss(image, text, scale, bias)
        found = torch.autograd.grad(loss, (image, text, scale, bias))
    assert seen.numel <= rows * 128
    logits = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T * scale + bias
    whole = -F.logsigmoid((2 * torch.eye(rows) - 1) * logits).sum(1).mean()
    torch.testing.assert_close(loss, whole)
    for a, b in zip(found, torch.autograd.grad(whole, (image, text, scale, bias)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_siglip_trains_by_its_own_loss(tmp_path: Path):
    """To the number that transformers computes; softmax on request, and for a model without a bias only softmax."""
    data, batch = Pairs(6), stack_rows(Pairs(6).rows)
    for model in (siglip(), siglip(tuned=True)):
        trainer = ContrastiveTrainer(model, arguments(tmp_path), train_dataset=data)
        with torch.no_grad():
            own = model.train()(**batch, return_loss=True)
            torch.testing.assert_close(trainer.compute_loss(model, batch), own.loss)
            by_softmax = ContrastiveTrainer(model, arguments(tmp_path), train_dataset=data, loss="softmax")
            expected = contrastive_loss(own.image_embeds, own.text_embeds, 10.0)
            torch.testing.assert_close(by_softmax.compute_loss(model, batch), expected)
    with pytest.raises(ValueError, match="CLIPModel has no logit_bias"):
        contrastive(tmp_path, loss="sigmoid")
    with pytest.raises(ValueError, match="loss must be 'infonce', 'sigmoid' or None, got 'hinge'"):
        contrastive(tmp_path, loss="hinge")


def test_a_siglip_learns_under_the_sigmoid_loss(tmp_path: Path):
    trainer = ContrastiveTrainer(
        siglip(), arguments(tmp_path, max_steps=30, learning_rate=5e-3), train_dataset=Pairs(8)
    )
    before = trainer.evaluate(Pairs(8))["eval_loss"]
    trainer.train()
    assert trainer.evaluate(Pairs(8))["eval_loss"] < before - 0.3


def test_the_bank_s_weights_and_cached_large_batches_under_the_sigmoid_loss(tmp_path: Path):
    data = Pairs(8)
    batch = {**stack_rows(data.rows), "sample_ids": torch.from_numpy(hash_ids(row["id"] for row in data.rows))}
    gradients, losses = [], []
    for parts in (None, 3):
        model = siglip()
        base = model.get_base_model()
        base.logit_scale.requires_grad_(True)
        base.logit_bias.requires_grad_(True)
        bank = HardSampleBank.from_model(model, data, progress=False, gamma=2.0, emphasis="power")
        trainer = ContrastiveTrainer(
            model, arguments(tmp_path), train_dataset=data, hard_samples=bank, rows_at_once=parts, keep_close=0.1
        )
        trainer.current_gradient_accumulation_steps = 1
        trainer.create_optimizer()
        losses.append(trainer.training_step(model, dict(batch)))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*losses)
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, atol=1e-6, rtol=1e-4, msg=name)
        assert grad.abs().max() > 0, name

    model = siglip().train()
    trainer = ContrastiveTrainer(
        model, arguments(tmp_path), train_dataset=data,
        hard_samples=HardSampleBank.from_model(model, data, progress=False, gamma=2.0, emphasis="power"),
    )  # fmt: skip
    loss = trainer.compute_loss(model, batch)
    weight = torch.from_numpy(trainer.bank.loss_weights(batch["sample_ids"].numpy()))
    assert weight.std() > 0.05
    out = model(**stack_rows(data.rows))
    keys = text_keys(batch["input_ids"], batch["attention_mask"])
    own = sigmoid_loss(out.image_embeds, out.text_embeds, 10.0, -10.0, text_ids=keys, reduction="none")
    torch.testing.assert_close(loss, (weight * own).mean())


def two_process_run(folder: Path, processes: int, **options: Any) -> ContrastiveTrainer:
    """Plain gradient descent on the same pairs, however many processes share a batch."""
    torch.manual_seed(0)
    model, data = siglip(), Pairs(16)
    bank = HardSampleBank.from_model(model, data, progress=False, momentum=0.5)
    options = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, **options}
    args = arguments(folder, per_device_train_batch_size=8 // processes, save_strategy="steps", save_steps=2, **options)
    return ContrastiveTrainer(model, args, train_dataset=data, hard_samples=bank)


def test_two_processes_are_one_under_the_sigmoid_loss_and_one_goes_on_for_two(tmp_path: Path):
    one = two_process_run(tmp_path / "one", 1)
    one.train()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, __file__, str(tmp_path / "two")], env=env, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two/checkpoint-2/batches.json").read_text())["processes"] == 2
    more = two_process_run(tmp_path / "more", 1)
    more.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-2"))
    start = {n: p.detach() for n, p in siglip().named_parameters()}
    end = load_file(tmp_path / "two/checkpoint-4/adapter_model.safetensors")
    for trainer in (one, more):
        trainer.model.save_pretrained(tmp_path / "saved")
        for name, weight in load_file(tmp_path / "saved/adapter_model.safetensors").items():
            torch.testing.assert_close(end[name], weight, atol=1e-5, rtol=0, msg=name)
        np.testing.assert_array_equal(HardSampleBank.load(tmp_path / "two/checkpoint-4").visits, trainer.bank.visits)
    assert max(float((p - start[n]).detach().abs().max()) for n, p in weights(one.model).items()) > 1e-3


if __name__ == "__main__":
    torch.set_num_threads(1)
    two_process_run(Path(sys.argv[1]), 2).train()
