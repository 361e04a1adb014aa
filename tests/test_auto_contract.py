"""The contract's core on every vision-language class that transformers' auto mappings name, whoever lists it or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from auto_families import VOCAB, AutoCase, Unsupported, auto_cases
from case import ANY_WIDTH, declared
from families import reads_media
from methods import adapter, distance, ready, stir, trace, word_tokenizer
from peft import PeftModel, get_peft_model
from torch import nn

from peft_multimodal import matched_modules
from peft_multimodal.core.anatomy import is_below

METHODS = {name: case for name, case in declared().items() if case.anywhere is not None}

# Of different build: grouped queries, experts, an encoder-decoder, a detector, one stream, two streams.
SAMPLE = (
    "LlavaOnevisionForConditionalGeneration",
    "InstructBlipForConditionalGeneration",
    "GroupViTModel",
    "OwlViTForObjectDetection",
    "Pix2StructForConditionalGeneration",
    "ViltForImageAndTextRetrieval",
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=str(c), marks=() if str(c) in SAMPLE else pytest.mark.full) for c in auto_cases()]
)
def test_core_of_the_contract(case: AutoCase, method: str, tmp_path: Path):
    try:
        base = case.build().requires_grad_(False)
        inputs = case.inputs(base)
    except Unsupported as reason:
        pytest.skip(f"{case}: {reason}")

    def media(model: nn.Module) -> dict[str, torch.Tensor]:
        """An image for each marker, where an adapter reads it."""
        rows = len(inputs["input_ids"]) if reads_media(model) else 0
        features = torch.randn(rows, 1, 1, 3, ANY_WIDTH, generator=torch.Generator().manual_seed(4))
        return {"vision_features": features} if rows else {}

    @torch.no_grad()
    def run(model: nn.Module) -> torch.Tensor:
        prepared(model)
        torch.manual_seed(0)  # ViLT shuffles the patches
        return case.output(model(**inputs, **media(model)))

    def prepared(model: nn.Module) -> nn.Module:
        """With a tokenizer whose [EOS] the text tower pools at, where captions are read with one."""
        eos = getattr(getattr(base.config, "text_config", None), "eos_token_id", None)
        return ready(model, word_tokenizer(None, eos if isinstance(eos, int) else VOCAB - 1, VOCAB))

    expected, before = run(base), trace(base)
    assert torch.equal(run(base), expected), "the base model isn't deterministic"
    tolerance = 1e-6 * max(1.0, float(expected.abs().max()))

    def loss(model: nn.Module) -> torch.Tensor:
        """A random functional: the square of an output that is normalised would be constant."""
        torch.manual_seed(0)
        output = case.output(model(**inputs, **media(model)))
        return (output * torch.randn(output.shape)).mean()

    # What this output depends on at all: experts that were not chosen and other heads don't matter.
    loss(base.requires_grad_(True)).backward()
    reached = {name.rpartition(".")[0] for name, p in base.named_parameters() if p.grad is not None and p.grad.any()}
    base.zero_grad()
    base.requires_grad_(False)

    # It starts as the base model, and matches what the dry run says.
    try:
        table = matched_modules(base, METHODS[method].anywhere())
    except ValueError as refusal:
        if not METHODS[method].refusal or METHODS[method].refusal not in str(refusal):
            raise
        assert trace(base) == before
        pytest.skip(f"{case}: {refusal}")
    assert trace(base) == before
    model = prepared(get_peft_model(base, METHODS[method].anywhere()))
    assert {m.module for m in table} <= {path for path, _ in model.get_base_model().named_modules()}
    assert distance(run(model), expected) <= tolerance or declared()[method].promises.starts_as == "images"

    # Training moves its parameters and no others.
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    start = {n: p.detach().clone() for n, p in adapter(model).items()}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(start)
    optimizer = torch.optim.AdamW(adapter(model).values(), lr=0.01, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    moved = {n.removeprefix("base_model.model.") for n, p in adapter(model).items() if not torch.equal(p, start[n])}
    adapted = {m.module for m in table if any(is_below(path, m.module) for path in reached)}
    assert adapted
    assert adapted <= {name.partition(f".{model.base_model.prefix}")[0] for name in moved}
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())

    # Saved and loaded, switched off, taken out.
    output = run(stir(model))
    assert distance(output, expected) > 1e-5
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.build(), tmp_path)
    assert distance(run(loaded), output) <= tolerance
    with model.disable_adapter():
        assert torch.equal(run(model), expected)
    base = model.unload()
    assert torch.equal(run(base), expected)
    assert trace(base) == before
