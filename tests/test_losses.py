"""training/losses.py and training/trainer.py against slow oracles, on a tiny BLIP."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_multimodal import training
from peft_multimodal.training import losses
from peft_multimodal.training.trainer import ImageTextRetrievalTrainer, call_inside


def slow_itc(cosines, scale, image_ids, text_ids):
    """The equation of losses.py, pair by pair, in Python floats."""
    per_pair = []
    for i in range(len(cosines)):
        e = lambda a, b: math.exp(scale * cosines[a, b].item())  # noqa: E731
        texts = sum(e(i, j) for j in range(len(cosines)) if j == i or image_ids[i] != text_ids[j])
        images = sum(e(j, i) for j in range(len(cosines)) if j == i or image_ids[j] != text_ids[i])
        per_pair.append(-(math.log(e(i, i) / texts) + math.log(e(i, i) / images)) / 2)
    return per_pair


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=7), st.integers(0, 99))
def test_contrastive_loss_is_the_equation(ids, seed):
    image_ids, text_ids = (torch.tensor(side) for side in zip(*ids, strict=True))
    images, texts = torch.randn(2, len(ids), 5, generator=torch.Generator().manual_seed(seed))
    cosines = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    expected = slow_itc(cosines, 10.0, image_ids.tolist(), text_ids.tolist())
    found = losses.contrastive_loss(images, texts, 10.0, image_ids, text_ids, reduction="none")
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    mean = losses.contrastive_loss(3 * images, texts, torch.tensor(10.0), image_ids, text_ids)
    assert float(mean) == pytest.approx(sum(expected) / len(ids), rel=1e-4, abs=1e-5)
    one_side = losses.contrastive_loss(images, texts, 10.0, text_ids=text_ids, reduction="none")
    assert one_side.tolist() == pytest.approx(slow_itc(cosines, 10.0, *[text_ids.tolist()] * 2), rel=1e-4, abs=1e-5)


def test_contrastive_loss_is_clips():
    model = FAMILIES["clip"].build()
    out = model(**FAMILIES["clip"].inputs(), return_loss=True)
    loss = losses.contrastive_loss(out.image_embeds, out.text_embeds, model.logit_scale.exp())
    torch.testing.assert_close(loss, out.loss)
    torch.testing.assert_close(losses.similarity_loss(out.logits_per_image), out.loss)


def test_contrastive_loss_is_fp32_under_autocast():
    images, texts = torch.randn(2, 6, 512)
    images.requires_grad_()
    exact = losses.contrastive_loss(images, texts, 100.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.contrastive_loss(images, texts, 100.0)
    assert loss.dtype == torch.float32
    assert loss == exact
    assert losses.contrastive_loss(images.bfloat16(), texts.bfloat16(), 100.0).dtype == torch.float32
    losses.contrastive_loss(images, texts, 100.0, image_ids=torch.zeros(6)).backward()  # nothing but matches
    assert torch.equal(images.grad, torch.zeros_like(images))


def test_matching_loss():
    logits, labels = torch.tensor([[0.0, 2.0], [1.0, -1.0]]), torch.tensor([True, False])
    by_hand = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-2))) / 2
    assert float(losses.matching_loss(logits, labels)) == pytest.approx(by_hand)
    assert losses.matching_loss(logits.bfloat16(), labels.int()).dtype == torch.float32


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=8).filter(lambda ids: len(set(ids)) > 1), st.integers(0, 99))
def test_hard_negatives_are_negatives(ids, seed):
    ids = torch.tensor(ids)
    similarity = 50 * torch.randn(len(ids), len(ids), generator=torch.Generator().manual_seed(seed))
    found = losses.hard_negative_indices(similarity, ids, torch.Generator().manual_seed(seed))
    for index in found:
        assert (ids[index] != ids).all()
    again = losses.hard_negative_indices(similarity, ids, torch.Generator().manual_seed(seed))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_hard_negatives_follow_the_softmax():
    similarity = torch.tensor([[5.0, 0.0, 1.0], [2.0, 5.0, 0.0], [0.0, 0.5, 5.0]])
    generator = torch.Generator().manual_seed(0)
    draws = [torch.stack(losses.hard_negative_indices(similarity, None, generator)) for _ in range(4000)]
    counts = F.one_hot(torch.stack(draws), 3).double().mean(0)  # (direction, row, drawn)
    for direction, rows in enumerate((similarity, similarity.T)):
        weight = rows.exp() * (1 - torch.eye(3))
        assert (counts[direction] - weight / weight.sum(1, keepdim=True)).abs().max() < 0.03


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.hard_negative_indices(torch.eye(2), torch.tensor([1, 1])), r"Rows \[0, 1\] have no negative"),
        (lambda: losses.hard_negative_indices(torch.eye(1)), "no negative"),
        (lambda: losses.similarity_loss(torch.zeros(2, 3)), r"\(2, 3\)"),
        (lambda: losses.similarity_loss(torch.zeros(2, 2), torch.zeros(3)), r"not \(2,\)"),
        (lambda: losses.similarity_loss(torch.zeros(2, 2), reduction="sum"), "sum"),
        (lambda: losses.contrastive_loss_func({"itm_score": torch.zeros(3, 2)}, None), "use_itm_head=False"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -------------------------------------------------------------------------------------------------- BLIP-style models


def blip(wrapped=False):
    model = FAMILIES["blip_retrieval"].build()
    if not wrapped:
        return model
    return lora(model, ["query", "value", "qkv"])


def lora(model, targets):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))


def blip_batch(ids=None):
    batch = FAMILIES["blip_retrieval"].inputs()
    return batch if ids is None else {**batch, "ids": torch.tensor(ids)}


@pytest.mark.parametrize("ids", [None, [7, 8, 7]])
@pytest.mark.parametrize("wrapped", [False, True])
def test_retrieval_loss_is_that_of_forwards(wrapped, ids):
    """The same from the model's own forwards: cosines of one call, logits of each pair by a call of its own."""
    model, batch = blip(wrapped).eval(), blip_batch(ids)
    found = losses.retrieval_loss(model, batch, 20.0, torch.Generator().manual_seed(3))

    plain = {k: v for k, v in batch.items() if k != "ids"}
    cosines = model(**plain, use_itm_head=False).itm_score
    own = ids or [0, 1, 2]
    itc = sum(slow_itc(cosines, 20.0, own, own)) / 3
    texts, images = losses.hard_negative_indices(20 * cosines, batch.get("ids"), torch.Generator().manual_seed(3))
    pairs = (
        [(i, i, 1) for i in range(3)]
        + [(i, t, 0) for i, t in enumerate(texts)]
        + [(i, t, 0) for t, i in enumerate(images)]
    )
    itm = 0.0
    for image, text, label in pairs:
        pair = {k: v[image if k == "pixel_values" else text][None] for k, v in plain.items()}
        itm -= model(**pair).itm_score.log_softmax(-1)[0, label].item() / len(pairs)
    assert float(found["itc_loss"]) == pytest.approx(itc, rel=1e-4)
    assert float(found["itm_loss"]) == pytest.approx(itm, rel=1e-4)
    assert float(found["loss"].detach()) == pytest.approx(itc + itm, rel=1e-4)


def test_retrieval_loss_trains_all_adapters_and_can_be_disabled():
    model, batch = blip(wrapped=True), blip_batch()
    losses.retrieval_loss(model, batch)["loss"].backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    seed = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    with model.disable_adapter(), torch.no_grad():
        without = losses.retrieval_loss(model, batch, generator=seed())["loss"]
    assert without == losses.retrieval_loss(blip(), batch, generator=seed())["loss"]
    assert without != losses.retrieval_loss(model, batch, generator=seed())["loss"]


@pytest.mark.parametrize("batch", [blip_batch([5, 5, 5]), {k: v[:1] for k, v in blip_batch().items()}])
def test_without_any_negative_only_matches_count(batch):
    found = losses.retrieval_loss(blip(), batch)
    assert found["itc_loss"] == 0
    logits = blip()(**{k: v for k, v in batch.items() if k != "ids"}).itm_score
    torch.testing.assert_close(found["itm_loss"], F.cross_entropy(logits, torch.ones(len(logits), dtype=torch.long)))


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="CLIPModel is not made like"):
        losses.retrieval_loss(FAMILIES["clip"].build(), blip_batch())


# ------------------------------------------------------------------------------------------------------------ Trainer


def rows(ids=(0, 1, 2, 3, 4, 5, 6, 7)):
    batch = blip_batch()
    noise = torch.randn(len(ids), 3, 16, 16, generator=torch.Generator().manual_seed(4))
    return [
        {**{k: v[i % 3] for k, v in batch.items()}, "pixel_values": noise[i], "id": id_} for i, id_ in enumerate(ids)
    ]


def collate(name, **extra):
    def collator(rows):
        batch = {k: torch.stack([row[k] for row in rows]) for k in rows[0] if k != "id"}
        return {**batch, name: torch.tensor([row["id"] for row in rows]), **extra}

    return collator


def arguments(folder, **kwargs):
    return TrainingArguments(
        str(folder),
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.0,
        **{
            "save_strategy": "no",
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 3,
            "learning_rate": 1e-2,
            **kwargs,
        },
    )


def test_retrieval_trainer(tmp_path):
    args = arguments(
        tmp_path,
        num_train_epochs=6,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer = ImageTextRetrievalTrainer(
        blip(wrapped=True), args, data_collator=collate("ids"), train_dataset=rows(), eval_dataset=rows()
    )
    before = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == before  # the same negatives
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before
    model = PeftModel.from_pretrained(FAMILIES["blip_retrieval"].build(), trainer.state.best_model_checkpoint)
    again = ImageTextRetrievalTrainer(model, args, data_collator=collate("ids"), eval_dataset=rows())
    best = min(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert again.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)
    loss, outputs = again.compute_loss(model, collate("ids")(rows()), return_outputs=True)
    torch.testing.assert_close(loss.detach(), outputs["itc_loss"] + outputs["itm_loss"])


def step(trainer_class, folder, model, collator, data, **kwargs):
    """Parameters' changes in one SGD step."""
    torch.manual_seed(0)
    options = {k: kwargs.pop(k) for k in ("compute_loss_func",) if k in kwargs}
    args = arguments(folder, max_steps=1, optim="sgd", lr_scheduler_type="constant", learning_rate=1.0, **kwargs)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer_class(model, args, data_collator=collator, train_dataset=data, **options).train()
    return {n: p.detach() - start[n] for n, p in model.named_parameters() if p.requires_grad}


def test_gradient_accumulation_averages(tmp_path):
    """Two equal batches accumulated take the step of one."""
    one = rows([3, 3])  # of one id, thus no drawn negatives
    once = step(ImageTextRetrievalTrainer, tmp_path, blip(True), collate("ids"), one, per_device_train_batch_size=2)
    twice = step(
        ImageTextRetrievalTrainer,
        tmp_path,
        blip(True),
        collate("ids"),
        one * 2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
    )
    torch.testing.assert_close(once, twice)


def test_answers_accumulate_as_their_collator_says(tmp_path):
    def model():
        model = lora(FAMILIES["blip_vqa"].build(), ["query", "value"])
        model.get_base_model().accepts_loss_kwargs = False
        return model

    batch = FAMILIES["blip_vqa"].train_inputs()
    data = [{k: v[i] for k, v in batch.items()} for i in range(3)]
    options = {"per_device_train_batch_size": 3, "train_sampling_strategy": "sequential"}
    once = step(Trainer, tmp_path, model(), None, data, **options)
    twice = step(Trainer, tmp_path, model(), None, data * 2, gradient_accumulation_steps=2, **options)
    torch.testing.assert_close(once, twice)


def test_mixed_precision_reaches_the_parts(tmp_path):
    model, dtypes = blip(True), []
    model.get_base_model().vision_proj.register_forward_hook(lambda m, i, out: dtypes.append(out.dtype))
    step(ImageTextRetrievalTrainer, tmp_path, model, collate("ids"), rows(), bf16=True)
    assert set(dtypes) == {torch.bfloat16}
    assert model(**blip_batch()).itm_score.shape == (3, 2)  # the forward is its own again


@pytest.mark.parametrize(
    ("family", "extra"), [("blip_retrieval", {"use_itm_head": False}), ("clip", {})], ids=["blip", "clip"]
)
def test_contrastive_loss_func_in_the_stock_trainer(tmp_path, family, extra):
    def model():
        return lora(FAMILIES[family].build(), "all-linear" if family == "clip" else ["query", "value", "qkv"])

    collator, data = collate("labels", **extra), rows([0, 1, 0, 2])
    trainer = Trainer(
        model(),
        arguments(tmp_path, label_names=["labels"]),
        data_collator=collator,
        eval_dataset=data[:3],
        compute_loss_func=losses.contrastive_loss_func,
    )
    batch = collator(data[:3])
    labels = batch.pop("labels")
    with torch.no_grad():
        out = model().eval()(**batch)
    logits = out.get("logits_per_image") if family == "clip" else out.itm_score / 0.07
    expected = losses.similarity_loss(logits, labels)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)

    options = {"train_sampling_strategy": "sequential", "compute_loss_func": losses.contrastive_loss_func}
    once = step(Trainer, tmp_path, model(), collator, data, **options)
    twice = step(Trainer, tmp_path, model(), collator, data * 2, gradient_accumulation_steps=2, **options)
    assert any(change.abs().max() > 0 for change in once.values())
    torch.testing.assert_close(once, twice)


def testcall_inside_restores_forward():
    module = torch.nn.Linear(2, 2)
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append("hook"))
    assert call_inside(module, module, lambda batch: batch["x"] + 1, {"x": 1}) == 2
    assert calls == ["hook"]
    assert "forward" not in vars(module)
    with pytest.raises(ZeroDivisionError):
        call_inside(module, module, lambda batch: 1 / 0, {})
    assert module(torch.zeros(1, 2)).shape == (1, 2)


DDP = """
import os, sys, torch
sys.path.insert(0, {tests!r})
import torch.distributed as dist
from test_losses import blip, blip_batch
from peft_multimodal.training.losses import retrieval_loss
from peft_multimodal.training.trainer import call_inside
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
model, batch = blip(True), blip_batch([1, 1, 1])
halves = [{{k: v[:2] for k, v in batch.items()}}, {{k: v[1:] for k, v in batch.items()}}]
own = []
for half in halves:
    model.zero_grad()
    retrieval_loss(model, half)["loss"].backward()
    own.append({{n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}})
model.zero_grad()
wrapper = torch.nn.parallel.DistributedDataParallel(model)
call_inside(wrapper, model, lambda batch: retrieval_loss(model, batch), halves[rank])["loss"].backward()
for n, p in model.named_parameters():
    if p.requires_grad:
        torch.testing.assert_close(p.grad, (own[0][n] + own[1][n]) / 2)
dist.destroy_process_group()
"""


def test_ddp_averages_the_gradients_of_two_processes(tmp_path):
    tests = os.path.dirname(__file__)
    path = os.pathsep.join([os.path.dirname(tests), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", DDP.format(tests=tests)]
    runs = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "rendezvous")], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for run in runs:
        _, error = run.communicate(timeout=240)
        assert run.returncode == 0, error.decode()[-3000:]


def test_names_are_exported():
    for name in training.__all__:
        assert getattr(training, name).__name__ == name
        assert name in dir(training)
    with pytest.raises(AttributeError, match="nothing"):
        training.nothing  # noqa: B018
