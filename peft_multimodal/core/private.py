"""What the package uses of transformers beyond its public interface, each name in this one place.

A release may change any of these names without a word. `tests/test_private.py` then fails and says which release did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .parts import Call, CallScope
from .stand_in import StandIn

CHECKPOINT = "_gradient_checkpointing_func"  # of a layer: runs a function whose insides are recomputed in backward
LOGITS_PROCESSORS = "_get_logits_processor"  # of a model: makes the list of logits processors that `generate` applies
CANDIDATES = "_get_candidate_generator"  # of a model: makes what proposes tokens in assisted decoding

# --- gradient checkpointing ------------------------------------------------------------------------------------------


def run_checkpointed(layer: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function(*tensors)`, recomputed in backward wherever the layer's own forward is."""
    if layer.training and torch.is_grad_enabled() and getattr(layer, "gradient_checkpointing", False):
        return getattr(layer, CHECKPOINT)(function, *tensors)
    return function(*tensors)


class InsideCheckpoint:
    """Keeps a call's scope open inside the layers that gradient checkpointing recomputes.

    transformers checkpoints a layer's `forward`: hooks of the layer run outside what is recomputed, hooks of modules inside
    the layer run within. `backward` recomputes after the call has ended, on a GPU in another thread, where the scope is
    closed. Each layer's checkpointing function therefore takes a copy of what the scope holds when the layer is called, and
    opens the scope with it around each run of the layer.

        self.inside = InsideCheckpoint(model, self.scope)   # works also where checkpointing is switched on later
        self.inside.remove()                                # gives the layers their functions back

    Reentrant checkpointing finds no gradient for tensors in the scope: keep those there that need none.

    Args:
        root: The module that is called; its layers are those below it and itself.
        scope: Open while `root` runs.
        finish: A forward hook of the layers, (layer, args, output) -> output, that runs inside what is recomputed.
    """

    def __init__(self, root: nn.Module, scope: CallScope, finish: Callable[..., Any] | None = None) -> None:
        self.scope, self.finish = scope, finish
        self.layers = [m for m in root.modules() if hasattr(m, "gradient_checkpointing")]
        # Trainer switches checkpointing on after the model was wrapped, and each time sets new functions.
        self.handle = root.register_forward_pre_hook(self.install)

    def install(self, *_: Any) -> None:
        for layer in self.layers:
            checkpoint = vars(layer).get(CHECKPOINT)
            if checkpoint is not None and all(r.inside is not self for r in _reopenings(checkpoint)):
                vars(layer)[CHECKPOINT] = Reopening(checkpoint, self, layer)

    def remove(self) -> None:
        self.handle.remove()
        for layer in self.layers:
            above: Reopening | None = None
            for reopening in list(_reopenings(vars(layer).get(CHECKPOINT))):
                if reopening.inside is not self:
                    above = reopening
                elif above is None:
                    vars(layer)[CHECKPOINT] = reopening.checkpoint
                else:
                    above.checkpoint = reopening.checkpoint


class Reopening:
    """A layer's checkpointing function that runs the layer inside a reopened scope."""

    def __init__(self, checkpoint: Callable[..., Any], inside: InsideCheckpoint, layer: nn.Module) -> None:
        self.checkpoint, self.inside, self.layer = checkpoint, inside, layer

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        scope = self.inside.scope
        return self.checkpoint(partial(self._run, function, scope.copy()) if scope.is_open else function, *args)

    def _run(self, function: Callable[..., Any], call: Call, *args: Any) -> Any:
        with self.inside.scope.reopened(call):
            output = function(*args)
            return output if self.inside.finish is None else self.inside.finish(self.layer, args, output)


def _reopenings(checkpoint: Any) -> Iterator[Reopening]:
    """From the outermost to the innermost."""
    while isinstance(checkpoint, Reopening):
        yield checkpoint
        checkpoint = checkpoint.checkpoint


# --- generation ------------------------------------------------------------------------------------------------------


class FitLogitsProcessors(StandIn):
    """Hands the list of logits processors, those that `generate` makes and those of its caller, through `fit`."""

    def __init__(self, model: nn.Module, fit: Callable[[Any], Any]) -> None:
        _check_has(model, LOGITS_PROCESSORS)
        self.fit = fit
        super().__init__(model, LOGITS_PROCESSORS, self._fitted)

    def _fitted(self, *args: Any, **kwargs: Any) -> Any:
        return self.fit(self.original(*args, **kwargs))


class BeforeCandidates(StandIn):
    """Calls `check` before assisted decoding, which may raise."""

    def __init__(self, model: nn.Module, check: Callable[[], None]) -> None:
        _check_has(model, CANDIDATES)
        self.check = check
        super().__init__(model, CANDIDATES, self._checked)

    def _checked(self, *args: Any, **kwargs: Any) -> Any:
        self.check()
        return self.original(*args, **kwargs)


def _check_has(model: nn.Module, name: str) -> None:
    if not hasattr(model, name):
        raise RuntimeError(
            f"{type(model).__name__} generates without {name}, which this package relies on. transformers "
            f"{transformers.__version__} may have renamed it: install an earlier release, or a newer one of this package."
        )
