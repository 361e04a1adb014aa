"""The language benchmark's own parts, on tiny models, and its report of made-up results."""

from __future__ import annotations

import pytest
import torch
from benchmark_cases import one_a_method
from datasets import Dataset
from test_benchmarks import tiny_clip
from transformers import BertConfig, BertModel, VisionTextDualEncoderModel

from benchmarks import experiment as experiments
from benchmarks import records, report
from benchmarks.tasks import language

CONCEPTS = 12


class Tokenizer:
    """Words of the form `w7` are token 7."""

    model_max_length = 16

    def get_vocab(self):
        return {f"w{i}": i for i in range(40)}

    def __call__(self, texts, **kwargs):
        rows = [[int(word[1:]) for word in text.split()] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows]),
        }

    def save_pretrained(self, folder):
        pass


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The task with a tiny CLIP, a tiny encoder and pairs of token ids for its assets."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=40, **sizes), add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    tiny_clip().save_pretrained(tmp_path / "clip")

    def pairs(name):
        rows = [
            {
                "source": f"w{i % 37 + 1} w{i % 5 + 1}",
                "target": f"w{(i * 7) % 37 + 1}",
                "kind": "label" if i % 2 else "word",
            }
            for i in range(60)
        ]
        return Dataset.from_list([row | {"split": "test" if i > 50 else "train"} for i, row in enumerate(rows)])

    images = torch.randn(CONCEPTS, 8)
    processor = language.LanguageProcessor(en=Tokenizer(), language=Tokenizer())
    monkeypatch.setattr(language, "load_model", lambda: VisionTextDualEncoderModel.from_pretrained(tmp_path / "clip"))
    monkeypatch.setattr(language, "e5_small", lambda: tmp_path / "encoder")
    monkeypatch.setattr(language, "english_clip", lambda: tmp_path / "clip")
    monkeypatch.setattr(language, "language_processor", lambda: processor)
    monkeypatch.setattr(language, "outputs_folder", lambda: tmp_path / "outputs")
    monkeypatch.setattr(language, "translation_pairs", pairs)
    monkeypatch.setattr(language, "labels", lambda name: {str(i): f"w{i + 1}" for i in range(CONCEPTS)})
    concepts = Dataset.from_dict({"concept": [str(i) for i in range(CONCEPTS)]})
    monkeypatch.setattr(language, "select_images", lambda split, style: concepts)
    monkeypatch.setattr(language, "embedded_images", lambda split, style: (images, torch.arange(CONCEPTS) % 8))
    monkeypatch.setattr(
        language, "GROUP_NAMES", {name: [f"w{i + 1}" for i in range(8)] for name in language.GROUP_NAMES}
    )


SMALL = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "warmup_steps": 0,
    "disable_tqdm": True,
    "learning_rate": 1e-2,
}


def small(name: str) -> experiments.Experiment:
    item = experiments.load("language", name)
    if item.peft and item.peft["peft_type"] == "CROSS_LINGUAL_ADAPTER":
        item.peft.update(bottleneck_dim=8, num_heads=2)
    item.training.update(SMALL)
    item.settings.update(pairs=item.settings["pairs"] and 6, ridge=item.settings["ridge"] or 0.1)
    if item.settings["hidden"]:
        item.settings["hidden"] = 5
    return item


@pytest.mark.parametrize("name", one_a_method("language"))
def test_every_experiment_trains_and_is_measured(name, tiny):
    item = small(name)
    found = language.run(item, 0, "validation")
    for code in item.settings["languages"]:
        assert 0 <= found["metrics"][f"{code}_zero_shot"] <= 100
        assert len(found["items"][code]["right"]["google"]) == CONCEPTS
        assert len(found["items"][code]["ranks"]["twitter"]["t2i"]) == CONCEPTS
    assert 0 <= language.score(found["metrics"]) <= 100
    assert (found["cost"]["trainable_parameters"] > 0) == item.trains
    if item.trains:
        assert found["cost"]["pairs"] > 0
        assert found["cost"]["whole_processor_seconds"] >= found["cost"]["train_processor_seconds"] > 0


def test_tuning_reaches_the_encoder(tiny):
    item = small("lora/r8")
    model, part = language.with_language(item)
    language.put_head(part, None)
    language.tune_encoder(part, item)
    tuned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in tuned.items()}
    language.distil(model, item, 0, cache=False, folder=language.outputs_folder())
    assert any("lora_B" in name for name in tuned)
    assert any(not torch.equal(before[name], p) for name, p in tuned.items() if "lora_B" in name)


def test_ridge_is_least_squares_when_the_penalty_vanishes():
    torch.manual_seed(0)
    layer, exact = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    x = torch.randn(50, 5)
    language.solve_ridge(layer, x.double(), exact(x).detach().double(), 1e-12)
    torch.testing.assert_close(layer.weight, exact.weight)
    torch.testing.assert_close(layer.bias, exact.bias)


def test_training_pairs_leave_the_test_concepts_out(tiny):
    settings = experiments.load("language", "cross_lingual_adapter/n1").settings
    plain = language.training_pairs(settings | {"label_weight": 1}, 0)
    assert len(plain) == 51
    weighted = language.training_pairs(settings, 0)
    assert len(weighted) == 51 + 3 * list(plain["kind"]).count("label")
    assert len(language.training_pairs(settings | {"label_weight": 1, "with_test": True}, 0)) == 60
    assert len(language.training_pairs(settings | {"label_weight": 1, "pairs": 7}, 0)) == 7
    english = language.training_pairs(settings | {"train_languages": ["en"]}, 0)
    assert all(row["source"] == row["target"] for row in english)


def synthetic(name: str, seed: int) -> records.Record:
    item = experiments.load("language", name)
    generator = torch.Generator().manual_seed(seed + 100 * len(name))
    metrics, items = {}, {"concepts": [str(i) for i in range(CONCEPTS)]}
    for code in item.settings["languages"]:
        ranks = {
            s: {d: torch.randint(1, 15, (CONCEPTS,), generator=generator) for d in language.DIRECTIONS}
            for s in language.STYLES
        }
        right = {s: torch.randint(0, 2, (CONCEPTS,), generator=generator) for s in language.STYLES}
        by_style = [language.recalls(found) for found in ranks.values()]
        metrics |= {f"{code}_{key}": sum(f[key] for f in by_style) / 2 for key in by_style[0]}
        metrics[f"{code}_zero_shot"] = 100 * sum(found.double().mean().item() for found in right.values()) / 2
        items[code] = {
            "ranks": {s: language.as_lists(found) for s, found in ranks.items()},
            "right": {s: found.tolist() for s, found in right.items()},
        }
    cost = {"trainable_parameters": 1000 * item.trains, "pairs": item.settings["pairs"] or 5000, "adapter_bytes": 4000}
    seconds = ("train", "whole", "epoch", "step")
    cost |= {f"{key}_processor_seconds": 1.0 for key in seconds} | {"peak_extra_bytes": 10**6} if item.trains else {}
    if name == language.SPEED:
        cost["both_towers"] = cost | {"whole_processor_seconds": 3.5}
    return records.Record(
        task="language", experiment=name, label=item.label, seed=seed, config=item.as_dict(),
        environment=records.environment(), metrics=metrics, items=items, cost=cost,
    )  # fmt: skip


@pytest.mark.parametrize("few", [True, False])
def test_the_report_works_with_what_results_there_are(few, tmp_path):
    names = [language.ENGLISH, "ridge/zh", "cross_lingual_adapter/n1"] if few else experiments.names("language")
    for name in names:
        for seed in range(2 if experiments.load("language", name).trains else 1):
            synthetic(name, seed).write(tmp_path)
    readme = tmp_path / "README.md"
    assert tmp_path / "language_pairs.png" in report.write_reports(tmp_path, readme)
    text = readme.read_text("utf-8")
    for name in names:
        assert experiments.load("language", name).label in text or name == language.SPEED
    assert "Chinese: adapter, 1 layer − " in text
    assert ("Persian: adapter, 1 layer − " in text) == (not few)
    assert ("3.5 times as long" in text) == (not few)


def test_a_concepts_shares_average_to_the_metrics():
    record = synthetic("cross_lingual_adapter/n1", 0)
    for values, metric in ((language.concept_recalls, "mean_recall"), (language.concept_accuracies, "zero_shot")):
        found, concepts = values("zh", record)
        assert len(concepts) == CONCEPTS
        assert sum(found) / CONCEPTS == pytest.approx(record.metrics[f"zh_{metric}"])
