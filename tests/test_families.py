"""The tiny models are healthy: every tower matters, everything is deterministic, losses and generation work."""

import pytest
import torch
from auto_families import AutoCase, Unsupported, auto_cases
from families import FAMILIES, Family


def families(*, having: str = "name") -> pytest.MarkDecorator:
    return pytest.mark.parametrize("family", [pytest.param(f, id=n) for n, f in FAMILIES.items() if getattr(f, having)])


@torch.no_grad()
def output(family: Family, model: torch.nn.Module, **changes: torch.Tensor) -> torch.Tensor:
    return family.output(model(**{**family.inputs(model), **changes}))


@families()
def test_small_and_deterministic(family: Family):
    seed = torch.get_rng_state()
    first, second = family.build(), family.build()
    assert torch.equal(seed, torch.get_rng_state())
    assert sum(p.numel() for p in first.parameters()) < 1e6
    assert not first.training
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(output(family, first), output(family, second))
    assert torch.equal(output(family, first), output(family, first.train())), "training mode adds noise"


@families()
def test_every_row_and_every_modality_matters(family: Family):
    model = family.build()
    inputs, before = family.inputs(model), output(family, model)
    assert before.isfinite().all()
    assert before.ndim == 0 or not torch.allclose(before[0], before[1], atol=1e-2)

    for name in {"pixel_values", "input_ids"} & inputs.keys():
        value = inputs[name]
        if name == "pixel_values":
            changed = value + torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
        else:  # the second word of the longest text
            changed = value.clone()
            changed[0, -6] = changed[0, -6] % 40 + 5
        assert (output(family, model, **{name: changed}) - before).abs().max() > 1e-3, name


@families()
def test_loss_reaches_every_tower(family: Family):
    model = family.build()
    batch = family.train_inputs(model)
    if batch is not None:
        assert model(**batch).loss is not None
    loss = family.loss(model)
    assert loss.ndim == 0
    assert loss.isfinite()
    loss.backward()
    # A bias of keys shifts all scores of a query alike: the softmax doesn't see it. Only matrices are looked at.
    weights = {name: weight for name, weight in model.named_parameters() if weight.ndim == 2}
    reached = {name for name, weight in weights.items() if weight.grad is not None and weight.grad.abs().max() > 1e-7}
    assert weights.keys() - reached == {name for name in weights if name.startswith(family.silent or " ")}
    for path in family.towers.values():
        assert any(name.startswith(path + ".") for name in reached), path


@families(having="generates")
def test_generates(family: Family):
    model = family.build()
    first, second = (
        model.generate(**family.generate_inputs(model), max_new_tokens=3, do_sample=False) for _ in range(2)
    )
    assert len(first) == len(family.inputs(model)["input_ids"])
    assert torch.equal(first, second)


@families(having="text_only")
@torch.no_grad()
def test_text_only(family: Family):
    model = family.build()
    assert family.output(model(**family.text_inputs(model))).isfinite().all()


@families()
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(family: Family, reentrant: bool):
    model = family.build()
    if not model.supports_gradient_checkpointing:
        pytest.skip(f"{type(model).__name__} does not support it")
    family.loss(model).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    family.loss(model).backward()
    for name, grad in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, atol=1e-5, rtol=1e-4, msg=name)


@families()
def test_saves_and_loads(family: Family, tmp_path):
    model = family.build()
    model.save_pretrained(tmp_path)
    assert torch.equal(output(family, type(model).from_pretrained(tmp_path)), output(family, model))


@pytest.mark.parametrize("case", auto_cases(), ids=str)
def test_auto_case(case: AutoCase):
    """A class that is shrunk and called generically: what can't be is skipped with its reason."""
    try:
        model = case.build()
        inputs = case.inputs(model)
    except Unsupported as reason:
        assert case.model_class_name not in {type(family.build()).__name__ for family in FAMILIES.values()}
        pytest.skip(str(reason))
    with torch.no_grad():
        first, second = (case.output(m(**inputs)) for m in (model, case.build()))
    torch.testing.assert_close(first, second)
