"""What the package uses of transformers beyond its public interface: that it is there, is called, and how."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import transformers
import transformers as hf
from families import text_tower, tiny
from torch import Tensor, nn

from peft_multimodal.core.parts import CallScope
from peft_multimodal.core.private import (
    CANDIDATES,
    CHECKPOINT,
    LOGITS_PROCESSORS,
    BeforeCandidates,
    FitLogitsProcessors,
    InsideCheckpoint,
)

RELEASE = f"transformers {transformers.__version__}"
IDS = torch.tensor([[1, 5, 6, 7]])
build = tiny(hf.LlamaForCausalLM, hf.LlamaConfig(**text_tower(32, num_key_value_heads=2)))


def checkpointing(model: Any, reentrant: bool = False) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


# ------------------------------------------------------------------------------------------------- what a release changes


def test_layers_call_their_checkpointing_function():
    model, calls = build().train(), []
    checkpointing(model)
    for layer in model.model.layers:
        assert callable(vars(layer).get(CHECKPOINT)), f"{RELEASE} keeps no {CHECKPOINT} on its layers: core/private.py"
        vars(layer)[CHECKPOINT] = lambda function, *args: calls.append(args) or function(*args)
    model(input_ids=IDS)
    assert len(calls) == len(model.model.layers), f"{RELEASE} doesn't call a layer's {CHECKPOINT}: core/private.py"
    message = f"{RELEASE} doesn't pass hidden states to {CHECKPOINT} by position: core/private.py"
    assert all(args and args[0].shape == (1, 4, 32) for args in calls), message


def test_generate_takes_its_logits_processors_from_one_function():
    class Only9(hf.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([9]), 0.0)

    model = build().eval()
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    expected = model.generate(input_ids=IDS, **options)
    processors: list[Any] = []

    def fit(found: Any) -> Any:
        processors.extend(found)
        return hf.LogitsProcessorList([Only9()])

    message = f"{RELEASE} makes its logits processors elsewhere than in {LOGITS_PROCESSORS}: core/private.py"
    assert hasattr(model, LOGITS_PROCESSORS), message
    stand_in = FitLogitsProcessors(model, fit)
    assert model.generate(input_ids=IDS, **options)[0, 4:].tolist() == [9, 9], message
    assert any(isinstance(p, hf.MinNewTokensLengthLogitsProcessor) for p in processors), message
    stand_in.give_back()
    assert torch.equal(model.generate(input_ids=IDS, **options), expected)


def test_assisted_decoding_asks_one_function():
    def refuse() -> None:
        raise ValueError("not here")

    model = build().eval()
    message = f"{RELEASE} proposes tokens elsewhere than in {CANDIDATES}: core/private.py"
    assert hasattr(model, CANDIDATES), message
    BeforeCandidates(model, refuse)
    raised = []
    try:
        model.generate(input_ids=IDS, max_new_tokens=2, prompt_lookup_num_tokens=2)
    except ValueError as error:
        raised.append(str(error))
    assert raised == ["not here"], message


@pytest.mark.parametrize("kind", [FitLogitsProcessors, BeforeCandidates])
def test_a_release_without_the_function_is_named(kind: type):
    class Other(nn.Module):
        def generate(self) -> None: ...

    with pytest.raises(RuntimeError, match=f"Other generates without _get_.*{RELEASE} may have renamed it"):
        kind(Other(), lambda *_: None)


# --------------------------------------------------------------------------------- a call's state inside what is recomputed


class Scaled(nn.Module):
    """A part that multiplies what each layer's MLP gives by a trained number, chosen by the call's state."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.tensor([0.5, 2.0]))
        self.scope = CallScope()
        self._model = (model,)
        self.hooks = self.scope.attach(model.model)
        self.hooks += [layer.mlp.register_forward_hook(self._scale) for layer in model.model.layers]
        self.inside = InsideCheckpoint(model.model, self.scope)

    def _scale(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        assert self.scope.is_open, "the call's state isn't known here"
        chosen = self.scope.values["chosen"]
        return output * self.scales[chosen][..., None]

    def loss(self, ids: Tensor) -> Tensor:
        (model,) = self._model
        handle = model.model.register_forward_pre_hook(lambda *_: self.scope.values.update(chosen=ids % 2))
        try:
            return model(input_ids=ids).logits.square().mean()
        finally:
            handle.remove()


def gradients(part: Scaled, ids: Tensor, model: Any, elsewhere: bool = False) -> list[Tensor]:
    for parameter in (trained := [part.scales, *model.model.layers[0].parameters()]):
        parameter.grad = None
    loss = part.loss(ids)
    if elsewhere:
        part.loss(ids + 1)  # another call between this one's forward and its backward
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    else:
        loss.backward()
    return [p.grad.clone() for p in trained]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_calls_state_is_known_where_layers_are_recomputed(reentrant: bool):
    model = build().train()
    part = Scaled(model)
    expected = gradients(part, IDS, model)
    checkpointing(model, reentrant)  # as Trainer does, after the part was made
    for elsewhere in (False, True):
        actual = gradients(part, IDS, model, elsewhere)
        assert all(map(torch.equal, actual, expected))
    checkpointing(model, not reentrant)  # sets new functions
    assert all(map(torch.equal, gradients(part, IDS, model), expected))
    assert not part.scope.is_open
    part.inside.remove()
    with pytest.raises(AssertionError, match="the call's state isn't known here"):
        gradients(part, IDS, model)


def test_several_leave_in_any_order_and_copies_are_their_own():
    model = build().train()
    checkpointing(model)
    layer, scopes = model.model.layers[0], [CallScope() for _ in range(3)]
    function = vars(layer)[CHECKPOINT]
    inside = [InsideCheckpoint(model.model, scope) for scope in scopes]
    for _ in range(2):  # once is enough
        model(input_ids=IDS)
    twin = copy.deepcopy(model)
    inside[1].remove()
    assert vars(layer)[CHECKPOINT].inside is inside[2]
    assert vars(layer)[CHECKPOINT].checkpoint.inside is inside[0]
    inside[2].remove()
    inside[0].remove()
    assert vars(layer)[CHECKPOINT] is function
    outermost = vars(twin.model.layers[0])[CHECKPOINT]
    assert outermost.layer is twin.model.layers[0]
    assert outermost.inside is not inside[2]
