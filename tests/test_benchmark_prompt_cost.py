"""The prompt_cost benchmark on a text tower of one layer."""

from __future__ import annotations

import pytest
import torch

from benchmarks import experiment as experiments
from benchmarks import records
from benchmarks.tasks import prompt_cost


@pytest.fixture(autouse=True)
def one_layer(monkeypatch):
    whole = prompt_cost.clip_with_given_patches
    monkeypatch.setattr(prompt_cost, "clip_with_given_patches", lambda layers=1: whole(1))


def tokens_read(method: str, classes: int) -> int:
    """By one forward pass that knows nothing of the class list."""
    read = 0

    def count(_module, _inputs, output):
        nonlocal read
        read += output.shape[0] * output.shape[1]

    model = prompt_cost.classifier(method, classes).eval()
    base = model.model if method == prompt_cost.NAIVE else model.get_base_model()
    base.text_model.encoder.layers[0].mlp.register_forward_hook(count)
    prompt_cost.forward(model)
    return read


def test_rows_read_what_their_names_say():
    images, classes = prompt_cost.IMAGES, 5
    found = {name: tokens_read(name, classes) for name in prompt_cost.METHODS}
    assert found[prompt_cost.COOP] == classes * 11  # [BOS], 4 + 2 of context, 3 of the name, [EOS]
    assert found[prompt_cost.NAIVE] == images * classes * 77
    assert found[prompt_cost.WHOLE] == images * classes * 15
    # What is common fills rows of the others' width: 7 tokens rows of 3, 5 tokens rows of 4.
    assert found[prompt_cost.GDI] == 9 + classes * 3 + images * classes * 5
    assert found[prompt_cost.GID] == 8 + images * 4 + images * classes * 6


def test_it_runs_and_reports(monkeypatch, tmp_path):
    monkeypatch.setattr(prompt_cost, "peak", lambda classes, chunk_size: 10**6 * chunk_size)
    item = experiments.load("prompt_cost", "all/shapes").limited(1)
    outcome = prompt_cost.run(item, 0, "test")
    held = outcome["items"]["held"]["8"]
    assert held[prompt_cost.GDI] < held[prompt_cost.WHOLE] < held[prompt_cost.NAIVE]
    record = records.Record("prompt_cost", item.name, "all", 0, item.as_dict(), records.environment(), **outcome)
    text = prompt_cost.report([record], tmp_path)
    assert all(f"| {name} |" in text for name in (*prompt_cost.METHODS, prompt_cost.KNOWN))


def test_class_names_are_distinct_and_of_one_length():
    names = prompt_cost.names(1200)
    assert len(set(names)) == 1200
    assert {len(row) for row in prompt_cost.words()(names).input_ids} == {prompt_cost.NAME_TOKENS + 2}
    assert torch.tensor(prompt_cost.words()(names[:1]).input_ids).tolist()[0][::4] == [49406, 49407]
