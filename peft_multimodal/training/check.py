"""One step that tells whether everything that should train does, before hours are spent on it.

A tensor whose gradient is exactly zero, or isn't there, may lie behind another one that starts at zero (LoRA's A behind B):
that is as it should be. Nothing tells the two apart but trying: the tensors that have a gradient are moved a little, and
what gets one now was behind them. What still gets none is asked why.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..core.anatomy import base_model, describe, device_of, is_below, pixel_readers, unread_layers
from ..core.modes import eval_mode
from ..core.parts import is_checkpointing
from ..core.switching import adapters_of
from ..core.towers import plain
from .check_report import BEHIND_ZERO, Row, TrainingReport, tell
from .learning_rates import Places

_SAVED = ".modules_to_save."
_ROUNDS = 3  # some tensors lie behind two others

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def check_training(
    model: nn.Module, batch: Mapping[str, Any], strict: bool = False, loss: Loss | None = None
) -> TrainingReport:
    """Run a batch forward and backward, and say what trains, what doesn't, why, and what to do.

    Everything is put back afterwards: gradients, parameters, buffers, random states, `requires_grad`, train and eval mode.
    It takes two passes, and some more where something is found.

    Args:
        model: A `PeftModel` of any method, or a model that is fine-tuned.
        batch: As the model's forward takes it, with what makes it compute a loss.
        strict: Raise where there is a problem.
        loss: `(model, batch) -> loss` for models whose forward computes none; `Trainer`'s `compute_loss` serves.

    Raises:
        ValueError: the model computes no loss from the batch; with `strict` also where there is a problem.

    Examples:
        >>> batch = collator([dataset[0], dataset[1]])
        >>> print(check_training(model, batch))
    """
    report = TrainingReport()
    look = Look(model)
    look.check_placement(report)
    if report.healthy:
        with torch.inference_mode(False), torch.enable_grad(), restored(model):
            _run(model, _on_device(batch, model), loss, look, report)
    look.check_frozen(report)
    if strict and not report.healthy:
        raise ValueError(f"Something doesn't train.\n\n{report}")
    return report


# --- what is looked at -----------------------------------------------------------------------------------------------


class Look:
    """The trained parameters of a model, and what stands around them."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.base = model, base_model(model)
        self.places = Places(model)
        self.configs = dict(adapters_of(self.places.model))
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.layers = {path: m for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
        self.readers = [self.base.get_submodule(path) for path in pixel_readers(self.base)]
        self.saw_images = not self.readers
        self.unread = unread_layers(self.base, describe(self.base))

    def row(self, name: str) -> tuple[str, str]:
        """(tower, adapter) of a parameter."""
        tower = self.places.tower(name) or "shared"
        if _SAVED in name:
            return tower, "modules_to_save"
        return tower, next((part for part in name.split(".") if part in self.configs), "the base's own")

    def layer(self, name: str) -> tuple[str, Any]:
        """(path, layer) of the adapter's layer that a parameter lies in; ("", None) without one."""
        around = [path for path in self.layers if is_below(name, path)]
        return (max(around, key=len), self.layers[max(around, key=len)]) if around else ("", None)

    def rows(self, without: Mapping[str, str]) -> list[Row]:
        """A row for each tower and adapter, from the gradients that are there.

        Args:
            without: {parameter: why it has no gradient}.
        """
        rows: dict[tuple[str, str], Row] = {}
        gradients: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        for name, parameter in self.trained.items():
            key = self.row(name)
            row = rows.setdefault(key, Row(*key))
            row.tensors, row.parameters = row.tensors + 1, row.parameters + parameter.numel()
            row.dtypes.add(str(parameter.dtype).removeprefix("torch."))
            row.devices.add(str(parameter.device))
            if parameter.grad is not None:
                gradients[key].append(parameter.grad)
            if name in without:
                row.why[without[name]] += 1
        for key, found in gradients.items():
            rows[key].norm = float(norm_of(found))
        return list(rows.values())

    # --- before a step ---

    def check_placement(self, report: TrainingReport) -> None:
        """Nothing trains, parameters without values, on another device than their module, or in a dtype that doesn't train."""
        report.rows = self.rows({})
        if not self.trained:
            names = ", ".join(self.configs)
            way_out = f"To train an adapter: model.set_adapter(name), of {names}; is_trainable=True when it is loaded."
            return report.problem(
                "No parameter of the model trains.", way_out if names else "Set requires_grad_(True)."
            )
        if empty := [name for name, p in self.trained.items() if p.is_meta]:
            report.problem(
                f"{plain(empty[0])} has no values: it is on the meta device.",
                "Load the weights before training starts.",
            )
        apart = {str(p.device) for name, p in self.trained.items() if self._is_apart(name, p)}
        if apart:
            report.problem(
                f"An adapter is on {', '.join(sorted(apart))}, the module that it acts on isn't.",
                "Move the whole model: model.to(device).",
            )
        for row in report.rows:
            floats = row.dtypes - {"float32", "float64"}
            where = f"{row.adapter!r} in the {row.tower}"
            if "float16" in floats:
                report.problem(
                    f"{where} is stored in float16: its updates underflow, and a GradScaler refuses its gradients.",
                    "Keep trained weights in float32: load with autocast_adapter_dtype=True, and train with fp16=True.",
                )
            elif floats and len(row.dtypes) > 1:
                report.warning(
                    f"{where} is stored in {' and '.join(sorted(row.dtypes))}.",
                    "If that is an accident: model.float() for what trains, and bf16=True for the passes.",
                )
        return None

    def _is_apart(self, name: str, parameter: nn.Parameter) -> bool:
        _, layer = self.layer(name)
        if parameter.is_meta or not hasattr(layer, "base_layer"):
            return False
        there = device_of(layer.get_base_layer())
        return there.type != "meta" and there != parameter.device

    def check_frozen(self, report: TrainingReport) -> None:
        """Towers in which an active adapter doesn't train though elsewhere it does, and parameters that no file holds."""
        held: dict[str, dict[str, bool]] = defaultdict(dict)
        for name, parameter in self.model.named_parameters():
            tower, adapter = self.row(name)
            if adapter in self.configs:
                held[adapter][tower] = held[adapter].get(tower, False) or parameter.requires_grad
        for adapter, towers in held.items():
            frozen = [tower for tower, trains in towers.items() if not trains]
            if frozen and any(towers.values()):
                report.problem(
                    f"In the {' and '.join(frozen)} tower no parameter of adapter {adapter!r} trains, elsewhere they do.",
                    "If that is an accident, set requires_grad on them again, or wrap the model anew.",
                )
        own = [name for name in self.trained if self.row(name)[1] == "the base's own"]
        if own and self.configs:
            report.warning(
                f"{len(own)} of the base's own parameters train, such as {plain(own[0])}; no adapter file holds them.",
                "Name their module in modules_to_save, or freeze them.",
            )

    # --- why a tensor has no gradient ---

    def why(self, name: str) -> str | None:
        """The reason that can be seen without another pass."""
        path, layer = self.layer(name)
        tower, adapter = self.row(name)
        if layer is not None:
            if layer.disable_adapters:
                return "adapters are switched off"
            if layer.merged:
                return "merged into the weights"
            if adapter not in layer.active_adapters:
                return "not active"
            if getattr(layer, "scaling", {}).get(adapter, 1) == 0:
                return "scaled by 0"
        if tower == "vision" and not self.saw_images:
            return "no image in the batch"
        if any(is_below(plain(path or name), layer_path) for layer_path in self.unread):
            return "vision_feature_layer reads an earlier layer"
        return None


# --- the step --------------------------------------------------------------------------------------------------------


def _run(model: nn.Module, batch: Mapping[str, Any], loss: Loss | None, look: Look, report: TrainingReport) -> None:
    before = _outputs(model, batch, loss)
    model.train()
    saw = [reader.register_forward_hook(lambda *_: setattr(look, "saw_images", True)) for reader in look.readers]
    look.saw_images = not look.readers
    value = _loss(model, batch, loss)
    for handle in saw:
        handle.remove()
    report.loss = float(value.detach())
    if not torch.isfinite(value):
        labels = batch.get("labels")
        masked = isinstance(labels, Tensor) and not labels.is_floating_point() and bool((labels == -100).all())
        what = "every label is -100, which the loss leaves out" if masked else "the loss isn't finite"
        report.problem(f"The loss is {report.loss}: {what}.", "Check the collator's labels, and the precision.")
        return
    dead = _backward(value, look)
    why = {name: reason for name in dead if (reason := look.why(name))}
    if broken := [name for name, p in look.trained.items() if p.grad is not None and not torch.isfinite(p.grad).all()]:
        report.problem(f"{plain(broken[0])} has a gradient with NaN or infinite values.", "Train in bf16 or float32.")
    gradients = {name: p.grad for name, p in look.trained.items()}
    with _moved(look, dead) as step:
        for _ in range(_ROUNDS if dead.keys() - why.keys() else 0):
            still = _backward(_loss(model, batch, loss), look)
            alive = [name for name in dead if name not in still and name not in why]
            why |= dict.fromkeys(alive, BEHIND_ZERO)
            if not alive or not dead.keys() - why.keys():
                break
            step()
        after = _outputs(model, batch, loss)
        report.moves = max((float((a - b).abs().max()) for a, b in zip(before, after, strict=True)), default=0.0)
        if dead.keys() - why.keys():
            with eval_mode(model):  # without checkpointing
                still = _backward(_loss(model, batch, loss), look)
            reason = "frozen by gradient checkpointing" if is_checkpointing(look.base) else "trains in eval mode alone"
            why |= {name: reason for name in dead if name not in why and name not in still}
    for name, parameter in look.trained.items():
        parameter.grad = gradients[name]
    why = {name: why.get(name, "the loss doesn't reach it") for name in dead}
    report.rows = look.rows(why)
    if report.moves == 0 and len(dead) < len(look.trained):
        report.problem("A step of training doesn't move the output.", "Check the scale of the adapter, and its gates.")
    tell(report)


def _loss(model: nn.Module, batch: Mapping[str, Any], loss: Loss | None) -> Tensor:
    if loss is not None:
        return loss(model, batch)
    outputs = model(**batch)
    value = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if value is None:
        raise ValueError(
            f"{type(base_model(model)).__name__} computes no loss from this batch ({', '.join(batch)}). Add labels, or "
            "return_loss=True where its forward has it; else pass loss=, such as your trainer's compute_loss."
        )
    return value.mean()


@torch.no_grad()
def _outputs(model: nn.Module, batch: Mapping[str, Any], loss: Loss | None) -> list[Tensor]:
    """What the model gives in eval mode, float32; with a loss of its own that is looked at."""
    with eval_mode(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if loss is not None:
            return [loss(model, batch).float()]
        outputs = model(**batch)
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [value.float() for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _backward(value: Tensor, look: Look) -> dict[str, None]:
    """The trained parameters that get no gradient, or one that is exactly zero."""
    for parameter in look.trained.values():
        parameter.grad = None
    if value.requires_grad:
        value.backward()
    return {name: None for name, p in look.trained.items() if p.grad is None or not bool(p.grad.any())}


@contextmanager
def _moved(look: Look, dead: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
    """Within it the parameters that have a gradient are moved a little, and again at each call of what it gives."""
    values = {parameter: parameter.detach().clone() for parameter in look.trained.values()}

    @torch.no_grad()
    def step() -> None:
        for parameter in values:
            if parameter.grad is not None and bool(parameter.grad.any()):
                parameter.sub_(0.05 * parameter.grad / parameter.grad.abs().max())

    step()
    try:
        yield step
    finally:
        with torch.no_grad():
            for parameter, value in values.items():
                parameter.copy_(value)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Afterwards gradients, buffers, random states, modes and `requires_grad` are what they were."""
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    buffers = [(m, n, b, b.detach().clone()) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    modes = [(module, module.training) for module in model.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for parameter, grad, flag in parameters:
            parameter.requires_grad_(flag)
            parameter.grad = grad
        for module, name, buffer, value in buffers:
            with torch.no_grad(), nullcontext() if buffer.is_meta else torch.inference_mode(False):
                buffer.copy_(value)
            module._buffers[name] = buffer
        for module, training in modes:
            module.training = training


def norm_of(gradients: list[Tensor]) -> Tensor:
    """The norm of several gradients together, on their device."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.detach().float()) for g in gradients]))


def _on_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    device = device_of(model)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
