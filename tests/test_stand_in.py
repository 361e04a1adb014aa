"""Standing in for a module's method: several at once, in any order, copied, pickled, compiled, under accelerate's hooks."""

from __future__ import annotations

import copy
import inspect
import pickle
from itertools import permutations
from typing import ForwardRef, Optional

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from peft_multimodal.core.stand_in import StandIn, Taken


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Tensor) -> Tensor:
        return self.scale * x

    def features(self, x: Tensor) -> Tensor:
        return self(x)


class Adds(nn.Module):
    """A part that hangs below its host and adds a number to what it gives."""

    def __init__(self, host: nn.Module, number: float, **options) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.tensor(number))
        self.stand_in = StandIn(host, "forward", self.forward, **options)

    def forward(self, *args, **kwargs) -> Tensor:
        return self.stand_in.original(*args, **kwargs) + self.number


def tower(*numbers: float) -> tuple[Tower, list[Adds]]:
    host = Tower()
    parts = [Adds(host, number) for number in numbers]
    for i, part in enumerate(parts):
        host.add_module(f"part_{i}", part)
    return host, parts


def value(host: nn.Module) -> float:
    return host(torch.tensor(1.0)).item()


@pytest.mark.parametrize("order", permutations(range(3)))
def test_they_leave_in_any_order(order: tuple[int, ...]):
    host, parts = tower(10.0, 100.0, 1000.0)
    left = {10.0, 100.0, 1000.0}
    assert value(host) == 1112
    for i in order:
        parts[i].stand_in.give_back()
        parts[i].stand_in.give_back()  # is no error
        left -= {float(parts[i].number)}
        assert value(host) == 2 + sum(left)
    assert "forward" not in vars(host)


@pytest.mark.parametrize("innermost_first", [False, True])
def test_the_innermost_answers_below_all_others_whenever_it_came(innermost_first: bool):
    host = Tower()

    def doubled() -> StandIn:
        double = StandIn(host, "forward", lambda x: 2 * double.original(x))
        return double

    def plus_ten() -> StandIn:
        plus = StandIn(host, "forward", lambda x: plus.original(x) + 10, innermost=True)
        return plus

    steps = [plus_ten, doubled] if innermost_first else [doubled, plus_ten]
    kept = [step() for step in steps]
    assert value(host) == 2 * (2 + 10)
    for stand_in in kept:
        stand_in.give_back()
    assert value(host) == 2


def test_what_the_instance_had_comes_back():
    host = Tower()
    host.forward = own = lambda x: 5 * x
    part = Adds(host, 1.0)
    assert value(host) == 6
    part.stand_in.give_back()
    assert vars(host)["forward"] is own


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_answers_by_its_own_parts(duplicate):
    host, parts = tower(10.0, 100.0)
    other = duplicate(host)
    with torch.no_grad():
        parts[0].number.fill_(0.0)
        other.scale.fill_(3.0)
    assert (value(host), value(other)) == (102, 113)
    other.part_0.stand_in.give_back()
    other.part_1.stand_in.give_back()
    assert value(other) == 3
    assert "forward" not in vars(other)
    assert isinstance(vars(host)["forward"], Taken)
    assert value(host) == 102


def test_the_signature_names_what_is_taken():
    host = Tower()
    plain = inspect.signature(host.forward)
    images = StandIn(host, "forward", takes=["pixel_values", "mask"])  # calls are passed on
    assert list(inspect.signature(host.forward).parameters) == ["x", "mask", "pixel_values", "kwargs"]
    labels = StandIn(host, "forward", lambda x, labels=None: labels, signature=inspect.signature(lambda labels: 0))
    assert list(inspect.signature(host.forward).parameters) == ["labels"]
    labels.give_back()
    assert value(host) == 2
    images.give_back()
    assert inspect.signature(host.forward) == plain


def test_methods_beside_forward():
    host = Tower()
    features = StandIn(host, "features", lambda x: features.original(x) + 1)
    assert float(host.features(torch.tensor(1.0))) == 3
    features.give_back()
    assert "features" not in vars(host)


def test_a_signature_with_a_forward_reference_is_pickled():
    """Such as generate's `Optional["PreTrainedModel"]`, which holds a code object."""
    host = Tower()
    annotation = ForwardRef("Tower")
    host.features.__func__.__annotations__["x"] = Optional[annotation]  # noqa: UP045
    StandIn(host, "features", takes=["mask"])
    other = pickle.loads(pickle.dumps(host))
    assert list(inspect.signature(other.features).parameters) == ["x", "mask"]
    assert float(other.features(torch.tensor(1.0))) == 2


def test_under_a_hook_of_accelerate():
    host, parts = tower(10.0)
    add_hook_to_module(host, ModelHook())
    assert value(host) == 12
    parts[0].stand_in.give_back()  # the hook still calls what it has found
    assert value(host) == 2
    remove_hook_from_module(host)
    assert value(host) == 2


def test_compiled_in_one_graph():
    host, parts = tower(10.0, 100.0)
    compiled = torch.compile(host, backend="eager", fullgraph=True)
    assert value(compiled) == 112
    compiled(torch.tensor(1.0)).backward()
    assert float(parts[0].number.grad) == 1
