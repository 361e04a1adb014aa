"""Frozen bases that aren't plain float32 on one device: quantised, offloaded; and training steps that are compiled."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import transformers as hf
from accelerate import dispatch_model
from case import declared
from families import FAMILIES, Family
from methods import CASES, adapter, distance, gradients, ready, run, silent, stir, wrap
from peft import PeftModel
from torch import Tensor, nn

from peft_multimodal.core.parts import CallScope


def cases(*families: str, unmarked: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    found = [
        pytest.param(FAMILIES[name], method, id=f"{name}-{method}", marks=() if name in unmarked else pytest.mark.full)
        for name, method in CASES
        if name in families
    ]
    return pytest.mark.parametrize(("family", "method"), found)


# ------------------------------------------------------------------------------------------------------------ float16


@pytest.mark.parametrize("mode", ["float16", "autocast"])
@cases("clip", "siglip", "blip_retrieval", "llava", unmarked=("clip", "llava"))
def test_float16(family: Family, method: str, mode: str):
    """What it changes in the output is of the size of what it changes in the base model's own."""
    exact, bare = wrap(family, method), family.build()
    expected, base = run(family, exact), run(family, bare)
    if mode == "float16":
        half, bare = wrap(family, method, base=family.build().half()), bare.half()
        output, lost = run(family, half), distance(run(family, bare), base)
    else:
        with torch.autocast("cpu", torch.float16):
            output, lost = run(family, exact), distance(run(family, bare), base)
    assert output.dtype == torch.float16 or mode == "autocast"
    assert distance(output, expected) <= 5 * lost + 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@cases("clip", "siglip", "blip_retrieval", "llava", unmarked=("clip", "llava"))
def test_gradients_under_autocast(family: Family, method: str, dtype: torch.dtype):
    model = ready(wrap(family, method))
    with torch.autocast("cpu", dtype):
        loss = family.loss(model)
    loss.backward()
    for name, parameter in adapter(model).items():
        if not silent(family, name):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


# --------------------------------------------------------------------------------------------------------- quantised


def quantised(family: Family, bits: int, folder: Path) -> nn.Module:
    if not folder.exists():
        family.build().save_pretrained(folder)
    config = hf.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_compute_dtype=torch.float32)
    base = type(family.build()).from_pretrained(folder, quantization_config=config, device_map="cpu")
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # its kernel takes 32 rows at a time
            module.support_avx512bf16_for_cpu = False
    return base.eval()


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("bits", [8, 4])
@cases("clip", "llava", unmarked=("clip", "llava"))
def test_a_quantised_base(family: Family, method: str, bits: int, tmp_path: Path):
    pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes isn't installed: pip install 'peft-multimodal[integrations]'"
    )
    base = quantised(family, bits, tmp_path / "base")
    linear = [m for m in base.modules() if f"{bits}bit" in type(m).__name__]
    expected, weights = run(family, base), [m.weight.detach().clone() for m in linear]
    assert linear
    assert distance(expected, run(family, family.build())) > 1e-4
    model = wrap(family, method, base=base, stirred=False)
    assert declared()[method].promises.starts_as == "images" or distance(run(family, model), expected) <= 1e-6
    for name, gradient in gradients(family, stir(model)).items():
        if not silent(family, name):
            assert gradient is not None, name
            assert gradient.isfinite().all(), name
    adapted = run(family, model)
    assert distance(adapted, expected) > 1e-3
    if model.base_model.not_mergeable is None:
        with pytest.raises(ValueError, match=r"holds quantised weights.*unmerged"):
            model.merge_and_unload()
        assert torch.equal(run(family, model), adapted)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(quantised(family, bits, tmp_path / "base"), tmp_path / "adapter")
    assert distance(run(family, loaded), adapted) <= 1e-6
    with model.disable_adapter():
        assert torch.equal(run(family, model), expected)
    assert torch.equal(run(family, model.unload()), expected)
    assert all(map(torch.equal, weights, (m.weight for m in linear)))


# --------------------------------------------------------------------------------------------------------- offloaded


def offloaded(family: Family, folder: Path, where: str) -> nn.Module:
    """With what reads text on disk or in CPU memory, to be brought to the device by accelerate's hooks."""
    base = family.build().requires_grad_(False)
    away, places = family.towers.get("text") or family.towers["decoder"], {}

    def place(prefix: str, module: nn.Module) -> None:
        places.update({f"{prefix}{name}": "cpu" for name, _ in module.named_parameters(recurse=False)})
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if away.startswith(f"{path}."):
                place(f"{path}.", child)
            else:
                places[path] = where if path == away else "cpu"

    place("", base)
    return dispatch_model(base, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("where", ["disk"])
@cases("clip", "siglip", "flava", "llava", "blip_retrieval", "blip_2", unmarked=("clip", "llava"))
def test_an_offloaded_base(family: Family, method: str, where: str, tmp_path: Path):
    plain = wrap(family, method)
    expected, adapted, trained = run(family, family.build()), run(family, plain), gradients(family, plain)
    base = offloaded(family, tmp_path / "first", where)
    assert any(parameter.is_meta for parameter in base.parameters())
    model = wrap(family, method, base=base)
    assert not any(parameter.is_meta for parameter in adapter(model).values())
    assert distance(run(family, model), adapted) <= 1e-6
    for name, gradient in gradients(family, model).items():
        torch.testing.assert_close(gradient, trained[name], atol=1e-6, rtol=1e-5, msg=name)
    model.save_pretrained(tmp_path / "adapter")
    for again in (family.build(), offloaded(family, tmp_path / "second", where)):
        assert distance(run(family, PeftModel.from_pretrained(again, tmp_path / "adapter")), adapted) <= 1e-6
    with model.disable_adapter():
        assert distance(run(family, model), expected) <= 1e-6
    assert distance(run(family, model.unload()), expected) <= 1e-6


# ---------------------------------------------------------------------------------------------------------- compiled


@cases("clip", "llava")
def test_a_training_step_compiles_without_graph_breaks(family: Family, method: str):
    """Forward and backward, as one graph each, with the gradients of the step that isn't compiled."""
    torch._dynamo.reset()
    model = wrap(family, method).train()
    expected = gradients(family, model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    compiled(**family.train_inputs(model)).loss.backward()
    for parameter_name, parameter in adapter(model).items():
        torch.testing.assert_close(parameter.grad, expected[parameter_name], atol=1e-5, rtol=1e-4, msg=parameter_name)


def test_what_one_compiled_part_writes_another_reads():
    """Where a model has a graph break of its own, its parts are compiled one by one; and threads still don't meet."""
    torch._dynamo.reset()
    scope = CallScope()

    @torch.compile(backend="eager")
    def write(x: Tensor) -> Tensor:
        scope.open()
        scope.seen = x
        scope.values["twice"] = 2 * x
        return x + 1

    @torch.compile(backend="eager")
    def read(x: Tensor) -> Tensor:
        return scope.values["twice"] + scope.seen + x if scope.is_open else 0 * x

    x = torch.ones(2)
    write(x)
    assert scope.is_open
    assert read(x).tolist() == [4.0, 4.0]
    found: list[list[float]] = []
    other = threading.Thread(target=lambda: found.append(read(x).tolist()))
    other.start()
    other.join()
    assert found == [[0.0, 0.0]]
    scope.close()
    assert read(x).tolist() == [0.0, 0.0]
