"""ContrastiveTrainer: the joint loss of several processes, parts of a batch, the bank in training, exact restarts."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from families import FAMILIES
from methods import adapter, distance, run, stir, wrap
from peft import LoraConfig, PeftModel, get_peft_model
from test_hard_samples import Pairs, Stream
from torch import Tensor, nn

from peft_multimodal import ContrastiveTrainer, HardSampleBank, HardSampleDomainAdapterConfig
from peft_multimodal.evaluation import Forgetting, forgetting, retrieval_recall
from peft_multimodal.training import contrastive_loss, pair_losses, retrieval_embeddings
from peft_multimodal.training.hard_samples import hash_ids, stack_rows

METHOD = "hard_sample_domain_adapter"


def arguments(folder: Path | str, **options: Any) -> hf.TrainingArguments:
    return hf.TrainingArguments(
        **{
            **{"output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 6, "learning_rate": 0.01},
            **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 0, "save_strategy": "no"},
            **{"logging_steps": 1, "lr_scheduler_type": "constant", **options},
        }
    )


def bank_for(model: nn.Module, data: Any, **settings: Any) -> HardSampleBank:
    return HardSampleBank.from_model(model, data, progress=False, **settings)


def trainer_for(folder: Path, size: int = 30, settings: dict | None = None, model: Any = None, **options: Any) -> Any:
    own = {k: options.pop(k) for k in list(options) if k in ("keep_close", "rows_at_once", "chunk_size", "callbacks")}
    model = wrap(FAMILIES["clip"], METHOD, stirred=False) if model is None else model
    data = Pairs(size)
    bank = bank_for(model, data, **(settings or {})) if settings is not None else None
    return ContrastiveTrainer(model, arguments(folder, **options), train_dataset=data, hard_samples=bank, **own)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ----------------------------------------------------------------------------------------------------------- the loss


def units(rows: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_pair_losses_against_a_slow_version():
    image, text = units(6, 0), units(6, 1)
    image_ids, text_ids = torch.tensor([0, 1, 1, 2, 3, 4]), torch.tensor([0, 1, 2, 3, 0, 5])
    expected = []
    for i in range(6):
        rows = [j for j in range(6) if j == i or (image_ids[i] != image_ids[j] and text_ids[i] != text_ids[j])]
        own = rows.index(i)
        sides = [torch.stack([one @ other[j] * 7 for j in rows]) for one, other in ((image[i], text), (text[i], image))]
        expected.append(-sum(side.log_softmax(0)[own] for side in sides) / 2)
    found = pair_losses(image, text, image, text, 7.0, image_ids, text_ids)
    torch.testing.assert_close(found, torch.stack(expected))
    for part in (slice(0, 2), slice(2, 6)):  # of several processes
        some = pair_losses(image[part], text[part], image, text, 7.0, image_ids, text_ids, part.start)
        torch.testing.assert_close(some, found[part])
    plain = pair_losses(image, text, image, text, 7.0, torch.arange(6), torch.arange(6))
    torch.testing.assert_close(plain.mean(), contrastive_loss(image, text, 7.0))


def test_without_a_bank_it_is_the_contrastive_loss(tmp_path: Path):
    trainer = trainer_for(tmp_path)
    batch = stack_rows(Pairs(6).rows)
    model = trainer.model.train()
    loss = trainer.compute_loss(model, batch)
    out = model(**batch)
    expected = contrastive_loss(out.image_embeds, out.text_embeds, model.get_base_model().logit_scale.exp())
    torch.testing.assert_close(loss, expected)


def test_the_bank_weighs_each_pair_without_a_gradient(tmp_path: Path):
    """L = mean of w_i l_i, with the weights that the bank has after it has seen the batch."""
    trainer = trainer_for(tmp_path, settings={"gamma": 2.0, "emphasis": "power", "momentum": 0.5})
    data = Pairs(30)
    ids = torch.from_numpy(hash_ids(row["id"] for row in data.rows[:6]))
    batch = stack_rows(data.rows[:6])
    model = stir(trainer.model).train()
    before = trainer.bank.difficulty.copy()
    loss = trainer.compute_loss(model, {**batch, "sample_ids": ids})
    grads = torch.autograd.grad(loss, list(trained(model).values()))
    rows = trainer.bank.rows(ids.numpy())
    assert (trainer.bank.visits[rows] == 1).all()
    assert trainer.bank.visits.sum() == 6
    assert (trainer.bank.difficulty[rows] != before[rows]).all()

    weights = torch.from_numpy(trainer.bank.loss_weights(ids.numpy()))
    assert weights.std() > 0.05
    assert float(weights.mean()) == pytest.approx(1)
    out = model(**batch)
    scale = model.get_base_model().logit_scale.exp()
    losses = contrastive_loss(out.image_embeds, out.text_embeds, scale, reduction="none")
    expected = (weights * losses).mean()
    torch.testing.assert_close(loss, expected)
    for found, right in zip(grads, torch.autograd.grad(expected, list(trained(model).values())), strict=True):
        torch.testing.assert_close(found, right, atol=1e-6, rtol=1e-4)


def test_evaluation_does_not_touch_the_bank(tmp_path: Path):
    trainer = trainer_for(tmp_path, settings={}, model=None)
    trainer.eval_dataset = Pairs(10)
    seen: list[Any] = []
    trainer.compute_metrics = lambda p: (
        seen.append(p) or retrieval_recall(torch.from_numpy(p.predictions), torch.from_numpy(p.label_ids))
    )
    before = {name: array.copy() for name, array in trainer.bank.state().items()}
    metrics = trainer.evaluate()
    assert "eval_loss" in metrics
    assert "eval_mean_recall" in metrics
    assert seen[0].predictions.shape == seen[0].label_ids.shape == (10, 24)
    for name, array in trainer.bank.state().items():
        np.testing.assert_array_equal(array, before[name])


def test_the_term_that_keeps_close(tmp_path: Path):
    trainer = trainer_for(tmp_path, keep_close=0.5)
    model = stir(trainer.model).train()
    batch = stack_rows(Pairs(6).rows)
    loss = trainer.compute_loss(model, batch)
    assert model.training
    out, base = model(**batch), FAMILIES["clip"].build()(**batch)
    apart = sum((getattr(out, k) - getattr(base, k)).square().sum(-1) for k in ("image_embeds", "text_embeds")) / 2
    plain = contrastive_loss(out.image_embeds, out.text_embeds, model.get_base_model().logit_scale.exp())
    torch.testing.assert_close(loss, plain + 0.5 * apart.mean())
    fresh = trainer_for(tmp_path, keep_close=0.5)
    torch.testing.assert_close(
        fresh.compute_loss(fresh.model, batch), trainer_for(tmp_path).compute_loss(fresh.model, batch)
    )
    with pytest.raises(ValueError, match="needs a PeftModel"):
        ContrastiveTrainer(FAMILIES["clip"].build(), arguments(tmp_path), train_dataset=Pairs(6), keep_close=1.0)


def test_it_forgets_less(tmp_path: Path):
    """A strong pull to the open model leaves the embeddings nearer to it after the same steps."""
    apart = []
    batch = stack_rows(Pairs(6).rows)
    for keep_close in (0.0, 100.0):
        trainer = trainer_for(tmp_path, keep_close=keep_close, max_steps=15)
        trainer.train()
        with torch.no_grad():
            out, base = trainer.model.eval()(**batch), FAMILIES["clip"].build()(**batch)
        apart.append(float((out.text_embeds - base.text_embeds).norm()))
    assert apart[1] < 0.5 * apart[0]


@pytest.mark.parametrize("rows_at_once", [1, 2, 4, 6, 9])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(rows_at_once: int, tmp_path: Path):
    gradients, losses = [], []
    for parts in (None, rows_at_once):
        trainer = trainer_for(tmp_path, settings={"gamma": 1.0}, rows_at_once=parts, keep_close=0.1)
        trainer.current_gradient_accumulation_steps = 2
        trainer.create_optimizer()
        model = stir(trainer.model)
        model.get_base_model().logit_scale.requires_grad_(True)
        ids = torch.from_numpy(hash_ids(row["id"] for row in Pairs(6).rows))
        losses.append(trainer.training_step(model, {**stack_rows(Pairs(6).rows), "sample_ids": ids}))
        gradients.append({name: p.grad for name, p in trained(model).items()})
        assert trainer.bank.visits.sum() == 6
    torch.testing.assert_close(*losses)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_parts_have_the_same_dropout_twice(tmp_path: Path):
    """With dropout the second pass must draw what the first drew: the gradient of the loss that was computed."""
    model = wrap(FAMILIES["clip"], METHOD, dropout=0.5)
    trainer = trainer_for(tmp_path, rows_at_once=3, model=model)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    batch = stack_rows(Pairs(6).rows)
    torch.manual_seed(5)
    trainer.training_step(model, batch)
    parts = {name: p.grad.clone() for name, p in trained(model).items()}
    model.zero_grad()
    torch.manual_seed(5)
    outs = [model(**{k: v[rows] for k, v in batch.items()}) for rows in (slice(0, 3), slice(3, 6))]
    embeds = [torch.cat([getattr(o, f"{side}_embeds") for o in outs]) for side in ("image", "text")]
    contrastive_loss(*embeds, model.get_base_model().logit_scale.exp()).backward()
    for name, p in trained(model).items():
        torch.testing.assert_close(parts[name], p.grad, atol=1e-6, rtol=1e-4, msg=name)


# ----------------------------------------------------------------------------------------------------------- training


class Seen(hf.TrainerCallback):
    """Copies of the bank's visits after each step."""

    def __init__(self) -> None:
        self.visits: list[np.ndarray] = []
        self.trainer: Any = None

    def on_step_end(self, args, state, control, **kwargs):
        self.visits.append(self.trainer.bank.visits.copy())


def test_hard_pairs_of_epoch_1_come_more_often_in_epoch_2(tmp_path: Path):
    """Also after a restart: the memory lasts."""
    settings = {"eta": 0.9, "alpha": 3.0, "emphasis": "rank", "momentum": 0.0, "guard_share": 0.0}
    seen = Seen()
    trainer = trainer_for(
        tmp_path, 120, settings, num_train_epochs=12, max_steps=-1, learning_rate=0.0, callbacks=[seen],
        save_strategy="epoch", per_device_train_batch_size=5,
    )  # fmt: skip
    seen.trainer = trainer
    trainer.train()
    visits = seen.visits[23::24]
    hard = np.argsort(trainer.bank.difficulty)[-30:]  # nothing is learnt: as hard as after epoch 1
    easy = np.argsort(trainer.bank.difficulty)[:30]
    later = visits[-1] - visits[0]
    assert later[hard].sum() > 2 * later[easy].sum()

    restarted = trainer_for(
        tmp_path, 120, settings, num_train_epochs=12, max_steps=-1, learning_rate=0.0, per_device_train_batch_size=5
    )
    restarted.bank.difficulty[:] = 0.5  # a restart that forgot would draw uniformly
    restarted.train(resume_from_checkpoint=str(tmp_path / "checkpoint-24"))
    np.testing.assert_array_equal(restarted.bank.visits, trainer.bank.visits)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_restart_goes_on_to_the_last_bit(workers: int, accumulation: int, tmp_path: Path):
    """In the middle of an epoch and of a chunk: bank, sampler, random numbers, weights."""
    options: dict[str, Any] = {
        **{"settings": {"momentum": 0.5, "eta": 0.8, "alpha": 2.0}, "size": 100, "chunk_size": 12},
        **{"max_steps": 14, "save_steps": 5, "save_strategy": "steps", "dataloader_num_workers": workers},
        **{"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 6},
    }

    def model() -> PeftModel:
        return wrap(FAMILIES["clip"], METHOD, stirred=False, dropout=0.2)

    whole = trainer_for(tmp_path / "whole", model=model(), **options)
    whole.train()
    for step in (5, 10):
        again = trainer_for(tmp_path / f"again-{step}", model=model(), **options)
        again.bank.difficulty[:] = 0.1  # what it has is replaced
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for name, array in whole.bank.state().items():
            np.testing.assert_array_equal(again.bank.state()[name], array, err_msg=f"{name} from step {step}")
        for name, parameter in adapter(whole.model).items():
            assert torch.equal(adapter(again.model)[name], parameter), f"{name} from step {step}"
        for name, array in whole.sampler.state().items():
            np.testing.assert_array_equal(again.sampler.state()[name], array, err_msg=name)


def test_checkpoints_hold_the_bank_and_any_adapter_trains(tmp_path: Path):
    for kind in ("lora", "full", METHOD):
        base = FAMILIES["siglip"].build()
        model = base
        if kind == "lora":
            model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
        elif kind == METHOD:
            model = wrap(FAMILIES["siglip"], METHOD, stirred=False)
        before = {name: p.detach().clone() for name, p in trained(model).items()}
        folder = tmp_path / kind
        trainer = trainer_for(folder, settings={}, model=model, save_strategy="steps", save_steps=2)
        trainer.train()
        assert any(not torch.equal(p, before[name]) for name, p in trained(model).items())
        files = {p.name for p in (folder / "checkpoint-2").iterdir()}
        assert {"hard_sample_bank.safetensors", "hard_sample_sampler.safetensors"} <= files
        bank = HardSampleBank.load(folder / "checkpoint-4")
        np.testing.assert_array_equal(bank.visits, trainer.bank.visits)
        assert bank.visits.sum() == 24
    trainer.model.save_pretrained(tmp_path / "adapter")
    assert HardSampleBank.load(tmp_path / "adapter").visits.sum() == 24
    loaded = PeftModel.from_pretrained(FAMILIES["siglip"].build(), tmp_path / "adapter")
    assert distance(run(FAMILIES["siglip"], loaded), run(FAMILIES["siglip"], model)) <= 1e-6


def test_a_model_that_needs_its_own_embeddings(tmp_path: Path):
    family = FAMILIES["blip_retrieval"]
    model, data = wrap(family, METHOD, stirred=False), Pairs(12)
    with pytest.raises(TypeError, match="pass encode="):
        bank_for(model, data)
    bank = HardSampleBank.from_model(model, data, progress=False, encode=retrieval_embeddings)
    trainer = ContrastiveTrainer(
        model, arguments(tmp_path), train_dataset=data, hard_samples=bank, encode=retrieval_embeddings, rows_at_once=4
    )
    trainer.train()
    assert bank.visits.sum() == 24


def test_a_data_set_that_streams(tmp_path: Path):
    """The bank learns and weighs; the order is the data set's own."""
    data = Pairs(12)
    model = wrap(FAMILIES["clip"], METHOD, stirred=False)
    bank = HardSampleBank.from_model(model, Stream(data.rows), progress=False)
    trainer = ContrastiveTrainer(model, arguments(tmp_path), train_dataset=Stream(data.rows), hard_samples=bank)
    trainer.train()
    assert trainer.sampler is None
    assert bank.visits.tolist() == [2] * 12
    # Ranked anew after each time through the data, so that weights follow and the guard looks.
    assert [step for step, _ in bank.history] == [-1, 1, 3]
    assert bank.table[0] == pytest.approx(bank.difficulty.min(), abs=0.02)


def test_a_restart_that_skips_no_data(tmp_path: Path):
    """`ignore_data_skip` begins the epoch anew: nothing stands in for the draws before the restart."""
    options: dict[str, Any] = {"settings": {}, "size": 60, "max_steps": 6, "save_steps": 3, "save_strategy": "steps"}
    trainer_for(tmp_path / "whole", **options).train()
    again = trainer_for(tmp_path / "again", ignore_data_skip=True, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert again.bank.visits.sum() == 36


def test_mismatches_are_found(tmp_path: Path):
    """The bank ranks pairs with another's text above the others once the true ones have been learnt (AUC > 0.9)."""
    data = Pairs(60)
    model = FAMILIES["clip"].build()
    trainer = ContrastiveTrainer(
        model, arguments(tmp_path, max_steps=150, learning_rate=0.003), train_dataset=data,
        hard_samples=bank_for(model, data),
    )  # fmt: skip
    trainer.train()
    wrong = [3, 17, 31, 45]
    texts = [copy.deepcopy(data.rows[i]["input_ids"]) for i in wrong]
    for i, text in zip(wrong, texts[1:] + texts[:1], strict=True):
        data.rows[i]["input_ids"] = text
    bank = bank_for(trainer.model, data)
    mismatched = np.isin(bank.keys, hash_ids(data.rows[i]["id"] for i in wrong))
    auc = (bank.difficulty[mismatched][:, None] > bank.difficulty[~mismatched]).mean()
    assert auc > 0.9


def test_bad_input(tmp_path: Path):
    model, data = wrap(FAMILIES["clip"], METHOD), Pairs(12)
    args = arguments(tmp_path)
    bank = bank_for(model, data)
    with pytest.raises(ValueError, match="12 pairs, the data set 6"):
        ContrastiveTrainer(model, args, train_dataset=Pairs(6), hard_samples=bank)
    with pytest.raises(ValueError, match="1 of 13 pairs are not in the bank"):
        ContrastiveTrainer(model, args, train_dataset=Pairs(13), hard_samples=bank)
    with pytest.raises(TypeError, match="takes a HardSampleBank, got str"):
        ContrastiveTrainer(model, args, train_dataset=data, hard_samples="bank")
    for name, value in (("keep_close", -1), ("keep_close", "0"), ("rows_at_once", 0), ("chunk_size", 2.0)):
        with pytest.raises(ValueError, match=f"{name} must be .*got"):
            ContrastiveTrainer(model, args, train_dataset=data, **{name: value})
    trainer = ContrastiveTrainer(model, args, train_dataset=data, hard_samples=bank)
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(FileNotFoundError, match="a checkpoint of a training without a bank"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_forgetting():
    family = FAMILIES["clip"]

    def score(model: nn.Module) -> float:
        assert not model.training
        return float(run(family, model).sum())

    before = score(family.build())
    model = wrap(family, METHOD).train()
    result = forgetting(model, score, before)
    assert model.training
    assert isinstance(result, Forgetting)
    assert result.exact_off is True
    assert result.on == score(model.eval())
    assert result.forgotten == before - result.on != 0
    with torch.no_grad():
        model.get_base_model().logit_scale.add_(0.1)  # a base that has changed is noticed
    assert forgetting(model, score, before).exact_off is False
    tuned = forgetting(stir_all(family.build()), score, before)
    assert tuned.off is None
    assert tuned.exact_off is None


@torch.no_grad()
def stir_all(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.add_(0.05 * torch.randn(p.shape))
    return model


# --------------------------------------------------------------------------------------------------- two processes


def one_step(folder: Path, rows: int, processes: int) -> None:
    """A step of plain gradient descent on the same pairs; what came out goes into `folder`."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)

    torch.manual_seed(0)
    model = stir(wrap(FAMILIES["clip"], METHOD, stirred=False))
    model.get_base_model().logit_scale.requires_grad_(True)
    data = Pairs(24)
    # Two pairs of one image, on different processes.
    for i, row in enumerate(data.rows):
        row["image_id"] = 0 if i in (2, 9) else i + 1
    rows_of: Any = Stream(data.rows) if folder.name.endswith("stream") else data
    bank = bank_for(model, rows_of, image_id_column="image_id", momentum=0.5, eta=0.6)
    options = {"per_device_train_batch_size": rows // processes, "optim": "sgd", "learning_rate": 0.1, "max_steps": 3}
    args = arguments(folder, **options, max_grad_norm=0.0)
    part = {"rows_at_once": 2} if folder.name.endswith("parts") else {}
    trainer = ContrastiveTrainer(model, args, train_dataset=rows_of, hard_samples=bank, keep_close=0.1, **part)
    trainer.train()
    rank = args.process_index
    save_file({n: p.detach().clone() for n, p in trained(model).items()}, folder / f"weights-{rank}.safetensors")
    bank.save(folder / f"bank-{rank}")
    (folder / f"log-{rank}.json").write_text(json.dumps(trainer.state.log_history))


WAYS = ("whole", "parts", "stream")


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one_step` each way, by one process and by two."""
    folder = tmp_path_factory.mktemp("stepped")
    for processes in (1, 2):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        command = [*launch, f"--master-port={port}", __file__, str(folder), "8", str(processes)]
        paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_equal_one_on_the_joint_batch(way: str, stepped: Path):
    from safetensors.torch import load_file

    folders = {n: stepped / f"{n}-{way}" for n in (1, 2)}
    one, *two = (
        load_file(f / f"weights-{r}.safetensors") for f, r in ((folders[1], 0), (folders[2], 0), (folders[2], 1))
    )
    start = stir(wrap(FAMILIES["clip"], METHOD, stirred=False))
    for name, weight in one.items():
        moved = (weight - dict(start.named_parameters())[name]).abs().max()
        assert moved > 1e-6, name
        for other in two:
            torch.testing.assert_close(other[name], weight, atol=1e-5, rtol=0, msg=name)
    banks = [HardSampleBank.load(folders[n] / f"bank-{r}") for n, r in ((1, 0), (2, 0), (2, 1))]
    assert banks[0].visits.sum() == 24
    for name, array in banks[1].state().items():  # every process ends with the same bank, to the bit
        np.testing.assert_array_equal(banks[2].state()[name], array, err_msg=name)
    np.testing.assert_array_equal(banks[1].visits, banks[0].visits)
    np.testing.assert_allclose(banks[1].difficulty, banks[0].difficulty, atol=1e-4)


def test_towers_may_be_a_tuple():
    config = HardSampleDomainAdapterConfig(bottleneck_dim=64, num_layers=1, towers=("vision", "text"))
    assert (config.last_layers, config.placement) == (4, "layer")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for way in WAYS:
        one_step(Path(sys.argv[1]) / f"{sys.argv[3]}-{way}", int(sys.argv[2]), int(sys.argv[3]))
