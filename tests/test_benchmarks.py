"""The benchmark framework: experiments, results on disk, reports. No real weights or images."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark_cases import one_a_method
from datasets import Dataset
from methods import METHODS
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from benchmarks import experiment as experiments
from benchmarks import measure, records, report, run, tasks
from benchmarks.tasks import retrieval

ALL = [(task, name) for task in tasks.names() for name in experiments.names(task)]


# ------------------------------------------------------------------------------------------------------- experiments


@pytest.mark.parametrize(("task", "name"), ALL, ids=lambda value: value)
def test_every_experiment_file_makes_a_real_config(task, name):
    item = experiments.load(task, name)
    config = config_of(item)
    assert (config is None) == (item.peft is None)
    assert not (item.peft and item.trainable), "PEFT decides itself what trains"
    tried = [item.choose(index) for index in range(len(item.choices))]
    for index, one in enumerate(tried):
        config_of(one)
        assert one.as_dict() not in [other.as_dict() for other in tried[:index]]
    if item.trains:
        from transformers import TrainingArguments

        TrainingArguments(output_dir="unused", use_cpu=True, **item.training)


def config_of(item: experiments.Experiment):
    """The config, with what its task knows once the language model is loaded."""
    if item.peft and item.peft["peft_type"] == "GATED_XATTN":
        item = replace(item, peft=item.peft | {"media_token_id": 0, "vision_hidden_size": 8})
    return item.peft_config()


def test_peers_have_no_fewer_choices_than_our_methods():
    for task in tasks.names():
        found = [experiments.load(task, name) for name in experiments.names(task)]
        for rates in (False, True):  # rows with learning rates of their own are compared with each other
            sizes: dict[bool, set[int]] = {True: set(), False: set()}
            for item in found:
                # What has no adapter has no scale to choose.
                if item.peft and item.choices and rates == ("rates" in item.choices[0]):
                    sizes[item.name.partition("/")[0] in METHODS].add(len(item.choices))
            ours, theirs = max(sizes[True], default=0), min(sizes[False], default=99)
            assert ours <= theirs, f"{task}: (ours, peers') grids have {sizes}"


@pytest.fixture
def folder(tmp_path):
    write = {
        "toy/defaults.json": {"peft": {"target_modules": ["q"]}, "training": {"max_steps": 5}, "task": {"size": 1}},
        "toy/lora/r2.json": {
            "label": "LoRA",
            "peft": {"peft_type": "LORA", "r": 2},
            "choices": [{"training": {"learning_rate": 0.1}}, {"training": {"learning_rate": 0.2}}],
            "chosen": None,
        },
        "toy/lora/r4.json": {"label": "LoRA 4", "peft": {"peft_type": "LORA", "r": 4}, "choice_of": "lora/r2"},
        "toy/base/frozen.json": {"label": "base"},
    }
    for name, content in write.items():
        path = tmp_path / "experiments" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), "utf-8")
    return tmp_path / "experiments"


def test_defaults_experiment_and_choice_are_laid_over_each_other(folder):
    item = experiments.load("toy", "lora/r2", folder)
    assert item.open
    assert item.peft == {"target_modules": ["q"], "peft_type": "LORA", "r": 2}
    assert item.choose(1).training == {"max_steps": 5, "learning_rate": 0.2}
    assert item.limited(2).training["max_steps"] == 2
    assert experiments.load("toy", "lora/r4", folder).open

    item.decide(1)
    for name in ("lora/r2", "lora/r4"):
        decided = experiments.load("toy", name, folder)
        assert not decided.open
        assert decided.training["learning_rate"] == 0.2
    base = experiments.load("toy", "base/frozen", folder)
    assert base.peft_config() is None
    assert not base.trains


def test_an_unknown_experiment_or_key_is_one_clear_error(folder):
    with pytest.raises(ValueError, match=r"no experiment 'lora/r3'.*lora/r2"):
        experiments.load("toy", "lora/r3", folder)
    (folder / "toy/lora/r2.json").write_text('{"label": "LoRA", "pfet": {}}', "utf-8")
    with pytest.raises(ValueError, match=r"unknown keys \['pfet'\]"):
        experiments.load("toy", "lora/r2", folder)


# ----------------------------------------------------------------------------------------------------------- results


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    records.write_atomically(path, "old")

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(KeyboardInterrupt):
        records.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_compact_json_is_json():
    value = {"a": {"b": [1, 2.5, "x"], "c": {}}, "d": None}
    assert json.loads(records.compact(value)) == value
    assert '"b": [1,2.5,"x"]' in records.compact(value)


def test_environment_names_versions_and_no_host():
    found = records.environment()
    assert {"python", "torch", "transformers", "peft", "peft_multimodal", "cpu", "cores", "threads"} == set(found)
    assert os.uname().nodename not in json.dumps(found)


@pytest.fixture
def toy_task(folder, monkeypatch):
    """A task whose score is the learning rate, with the names of the calls it got."""
    calls: list[tuple] = []

    def run_toy(item, seed, split):
        calls.append((item.name, seed, split, item.training.get("learning_rate")))
        if item.training.get("learning_rate") == 0.1:
            raise FloatingPointError("The training loss is nan.")
        return {"metrics": {"score": item.training.get("learning_rate", 0.0)}, "items": {}, "cost": {}}

    module = SimpleNamespace(run=run_toy, score=lambda metrics: metrics["score"], calls=calls)
    monkeypatch.setattr(tasks, "load", lambda name: module)
    return module


def test_select_keeps_what_it_tried_and_writes_the_best(folder, toy_task, tmp_path):
    item = experiments.load("toy", "lora/r2", folder)
    run.select(item, [0], None, tmp_path)
    assert experiments.load("toy", "lora/r2", folder).chosen == 1, "a setting that diverges loses"
    assert {call[2] for call in toy_task.calls} == {"validation"}
    run.select(item, [0], None, tmp_path)
    assert len(toy_task.calls) == 2


def test_a_run_with_a_result_is_skipped(folder, toy_task, tmp_path):
    item = experiments.load("toy", "lora/r2", folder)
    run.run(item, 0, None, tmp_path)
    assert not toy_task.calls, "its choice is open"
    item.decide(1)
    item = experiments.load("toy", "lora/r2", folder)
    for _ in range(2):
        run.run(item, 3, None, tmp_path)
    assert [call[1:3] for call in toy_task.calls] == [(3, "test")]
    (record,) = records.read_records("toy", tmp_path)
    assert (record.experiment, record.seed, record.metrics) == ("lora/r2", 3, {"score": 0.2})
    assert record.config["training"]["max_steps"] == 5


# ----------------------------------------------------------------------------------------------------------- reports


def test_insert_replaces_between_markers_and_nothing_else():
    text = report.insert("# Title\n", "a", r"one \1")
    text = report.insert(text, "b", "two") + "\nafter\n"
    again = report.insert(text, "a", "three")
    assert r"one \1" not in again
    assert "three" in again
    assert "two" in again
    assert again.endswith("after\n")
    assert report.insert(again, "a", "three") == again


def synthetic(name: str, seed: int, concepts: int = 12) -> records.Record:
    generator = torch.Generator().manual_seed(seed + 100 * len(name))
    ranks = {
        style: {d: torch.randint(1, 15, (concepts,), generator=generator) for d in retrieval.DIRECTIONS}
        for style in ("new", "old")
    }
    trains = not name.startswith("base")
    cost = {"trainable_parameters": 1000 * trains, "tower_parameters": 900 * trains, "adapter_bytes": 4000 * trains}
    return records.Record(
        task="retrieval",
        experiment=name,
        label=name,
        seed=seed,
        config={"task": {"new_style": "new", "old_styles": ["old"]}, "training": {"learning_rate": 1e-3}},
        environment=records.environment(),
        metrics=retrieval.metrics(ranks, "new", ["old"]),
        items={
            "concepts": [str(i) for i in range(concepts)],
            "ranks": {style: retrieval.as_lists(found) for style, found in ranks.items()},
        },
        cost=cost | ({"step_processor_seconds": 1.0, "peak_extra_bytes": 10**7} if trains else {}),
    )


@pytest.mark.parametrize(
    "names", [["lora/r64"], ["base/frozen", "lora/r64", "projections/alone", "aurora_mode_approx/r64"]]
)
def test_the_retrieval_report_works_with_what_results_there_are(names, tmp_path):
    for name in names:
        for seed in range(1 if name.startswith("base") else 2):
            synthetic(name, seed).write(tmp_path)
    readme = tmp_path / "README.md"
    written = report.write_reports(tmp_path, readme)
    assert tmp_path / "retrieval_parameters.png" in written
    text = readme.read_text("utf-8")
    for name in names:
        assert text.count(f"| {name} |") == 3, "quality, cost and paired differences"
    report.write_reports(tmp_path, readme)
    assert readme.read_text("utf-8") == text


def test_concept_recalls_average_to_the_mean_recall():
    record = synthetic("lora/r64", 0)
    values, concepts = retrieval.concept_recalls(record, ["new"])
    assert len(values) == len(concepts)
    assert sum(values) / len(values) == pytest.approx(record.metrics["new_mean_recall"])


def test_paired_difference_takes_common_seeds_and_one_frozen_base():
    def values(record):
        return retrieval.concept_recalls(record, ["new"])

    lora = [synthetic("lora/r64", seed) for seed in (0, 1, 2)]
    ours = [synthetic("aurora_mode_approx/r64", seed) for seed in (1, 2, 3)]
    base = [synthetic("base/frozen", 0)]

    def mean(runs):
        return sum(r.metrics["new_mean_recall"] for r in runs) / len(runs)

    assert report.paired(ours, lora, values).difference == pytest.approx(mean(ours[:2]) - mean(lora[1:]))
    assert report.paired(ours, base, values).difference == pytest.approx(mean(ours) - mean(base))
    assert report.paired(ours[2:], lora[:2], values) is None


# ---------------------------------------------------------------------------------------------- retrieval, tiny model


def tiny_clip() -> VisionTextDualEncoderModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "initializer_range": 0.2}
    vision = Dinov2Model(Dinov2Config(num_hidden_layers=4, image_size=28, patch_size=14, **sizes))
    text = BertModel(BertConfig(num_hidden_layers=2, vocab_size=40, intermediate_size=32, **sizes))
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision.config, text.config, projection_dim=8)
    return VisionTextDualEncoderModel(config, vision, text).eval()


def tiny_inputs(n: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(n, 3, 28, 28, generator=generator),
        "input_ids": torch.randint(0, 40, (n, 5), generator=generator),
    }


def test_kept_lower_layers_are_exact():
    model, inputs = tiny_clip(), tiny_inputs()
    with torch.no_grad():
        whole = model(**inputs)
        states: list[torch.Tensor] = []
        hook = model.vision_model.encoder.layer[2].register_forward_pre_hook(lambda _, args: states.append(args[0]))
        model.vision_model(inputs["pixel_values"])
        hook.remove()
        names = [name for name, _ in model.named_modules()]
        retrieval.skip_lower_layers(model, 2)
        kept = model(**inputs | {"pixel_values": states[0]})
        retrieval.run_lower_layers(model, 2)
        again = model(**inputs)
    assert torch.equal(whole.logits_per_image, kept.logits_per_image)
    assert torch.equal(whole.logits_per_image, again.logits_per_image)
    assert names == [name for name, _ in model.named_modules()], "an adapter must find its modules"


@pytest.mark.parametrize("name", one_a_method("retrieval"))
def test_every_retrieval_experiment_prepares_and_trains_a_model(name, tmp_path):
    item = experiments.load("retrieval", name)
    if item.peft:  # as many layers and ranks as the tiny model has
        targets = r"vision_model\.encoder\.layer\.[23]\.attention\.[qkvo]_proj|text_model.*\.(query|key|value)"
        layers = r"vision_model\.encoder\.layer\.[23]|text_model\.encoder\.layer\.\d"
        matrices = {"target_modules": targets, "r": 2}
        item.peft.update(matrices if "r" in item.peft else {"target_modules": layers, "bottleneck_dim": 2})
    elif item.trainable:
        object.__setattr__(item, "trainable", item.trainable.replace("[6-9]", "[2-3]"))
    model = measure.prepare(tiny_clip(), item)
    cost = measure.footprint(model)
    if not item.trains:
        assert cost == {"trainable_parameters": 0, "adapter_bytes": 0}
        return
    rows = Dataset.from_dict({name: value.tolist() for name, value in tiny_inputs().items()}).with_format("torch")

    def collate(batch):
        return {key: torch.stack([row[key] for row in batch]) for key in batch[0]} | {"return_loss": True}

    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    training = item.training | {"max_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 1e-2}
    cost = measure.fit(model, rows, collate, training | {"warmup_steps": 0, "disable_tqdm": True}, seed=0)
    assert cost["trainable_parameters"] == sum(p.numel() for p in before.values())
    assert cost["adapter_bytes"] >= 4 * cost["trainable_parameters"]
    assert cost["step_seconds"] > 0
    assert cost["step_processor_seconds"] > 0
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)


def test_a_diverged_training_is_an_error(tmp_path):
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, return_loss=True):
            return {"loss": (self.weight * float("nan")).sum()}

    with pytest.raises(FloatingPointError, match="nan"):
        measure.fit(
            Broken(),
            [{"x": 0.0}] * 4,
            lambda rows: {"x": torch.zeros(len(rows)), "return_loss": True},
            {"max_steps": 2, "disable_tqdm": True, "logging_nan_inf_filter": False},
            seed=0,
        )


def test_the_command_lists_and_smokes(folder, toy_task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "EXPERIMENTS", folder)
    monkeypatch.setattr(run, "SMOKE", tmp_path / "smoke")
    item = experiments.load("toy", "lora/r2", folder).choose(1)
    run.run(item, 0, 1, tmp_path)
    assert Path(records.record_path("toy", "lora/r2", 0, tmp_path / "smoke")).is_file()
    assert not records.read_records("toy", tmp_path)
    run.main([])
    assert "retrieval" in capsys.readouterr().out


def test_the_domain_s_score_is_of_recalls_alone():
    from benchmarks.tasks import domain

    metrics = {"photos_domain": 40.0, "photos_general": 20.0}
    found = {"photos_base_difficulty_domain": 0.9, "photos_base_difficulty_general": 0.3}
    assert domain.score(metrics) == domain.score(metrics | found) == 30
