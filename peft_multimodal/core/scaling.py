"""How much of an adapter acts: between the base (0) and the adapted model (1), or beyond."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from .anatomy import unwrapped
from .parts import MultimodalLayer
from .registry import method_of
from .switching import adapters_of


class adapter_scale:
    """Let the active adapters act a times as much as they were trained to (WiSE-FT, Wortsman et al. 2022, along an adapter).

    Called, it lasts, and is saved with the adapter. In a `with` statement it is exactly undone behind the block.

    0 is the base model and 1 the adapter as it is. Between them lies what keeps more of the base's general knowledge. An update
    dW becomes a dW, what a branch adds is multiplied by a, and a module that was trained as a whole (`modules_to_save`) becomes
    (1 - a) W_0 + a W. Merged adapters are taken out and merged again.

    Args:
        model: A `PeftModel` of a method that says how (`linear_tensors`), of LoRA or another method of PEFT whose updates are
            linear in one of their tensors, or of a policy of them.
        a: Relative to what acts now; a finite number >= 0.

    Raises:
        ValueError: the method can't be scaled; nothing was changed.

    Examples:
        >>> batch = collator([dataset[0], dataset[1]])
        >>> with adapter_scale(model, 0.5):
        ...     half = model(**batch).logits_per_image
        >>> lasting = adapter_scale(model, 0.75)
    """

    def __init__(self, model: nn.Module, a: float) -> None:
        if type(a) not in (int, float) or not 0 <= a < math.inf:
            raise ValueError(f"a must be a finite number >= 0, got {a!r}")
        self.model: Any = unwrapped(model)
        found = {id(p): (p, base) for p, base in _scaled(self.model)}  # what several layers share is scaled once
        if not found:
            raise ValueError("No adapter of the model is active. Call model.set_adapter(name), or load one.")
        self._before = [(parameter, parameter.detach().clone()) for parameter, _ in found.values()]
        self._write([(p, p * a if base is None else base + a * (p - base)) for p, base in found.values()])

    @torch.no_grad()
    def _write(self, values: list[tuple[Any, Tensor]]) -> None:
        merged = sorted({n for m in self.model.modules() if isinstance(m, BaseTunerLayer) for n in m.merged_adapters})
        if merged:
            self.model.unmerge_adapter()
        for parameter, value in values:
            parameter.copy_(value)
        if merged:
            self.model.merge_adapter()

    def __enter__(self) -> adapter_scale:
        return self

    def __exit__(self, *_: Any) -> None:
        self._write(self._before)


def _scaled(model: Any) -> Iterator[tuple[nn.Parameter, Tensor | None]]:
    """(tensor, None) where the effect is linear in it, and (tensor, the base's) where it stands in the base's place."""
    for name, config in adapters_of(model):
        layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and name in m._get_available_adapters()]
        active = [layer for layer in layers if name in layer.active_adapters]
        if active:
            method = method_of(config)
            yield from (
                (p, None) for p in (_stock(active, name) if method is None else _ours(active, name, method, config))
            )
    for wrapper in (m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)):
        for name in set(wrapper.active_adapters) & set(wrapper.modules_to_save):
            base = dict(wrapper.original_module.named_parameters())
            yield from ((p, base[key]) for key, p in wrapper.modules_to_save[name].named_parameters())


def _ours(layers: list[Any], name: str, method: Any, config: Any) -> Iterator[nn.Parameter]:
    pattern = method.model.linear_tensors(config)
    if pattern is None:
        raise ValueError(
            f"What {method.title} does isn't linear in any of its tensors{' with use_gqt' if getattr(config, 'use_gqt', False) else ''}, "
            "so it can't be scaled. Choose among checkpoints of a shorter training instead."
        )
    for layer in layers:
        for path, parameter in tensors_of(layer, name):
            if re.search(pattern, path):
                yield parameter


def tensors_of(layer: Any, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """(container.name, parameter) of one adapter in one layer."""
    for container in layer.adapter_layer_names:
        held: Any = getattr(layer, container, None)
        if not isinstance(held, (nn.ModuleDict, nn.ParameterDict)) or name not in held:
            continue
        item: Any = held[name]
        inside = item.named_parameters() if isinstance(item, nn.Module) else [("", item)]
        yield from ((f"{container}.{path}", parameter) for path, parameter in inside)


def _stock(layers: list[Any], name: str) -> Iterator[nn.Parameter]:
    """The tensor of each of PEFT's layers in which its update is linear, if it is an update of a weight."""
    linear: dict[type, str | None] = {}
    for layer in layers:
        if isinstance(layer, MultimodalLayer):
            continue
        tensors = dict(tensors_of(layer, name))
        if type(layer) not in linear:
            linear[type(layer)] = next((path for path, p in tensors.items() if _is_linear_in(layer, name, p)), None)
        path = linear[type(layer)]
        if path is None or _is_variant(layer, name):
            raise ValueError(
                f"{type(layer).__module__}.{type(layer).__name__} isn't a weight update that is linear in one of its tensors, so "
                f"the adapter {name!r} can't be scaled. LoRA, LoHa and LoKr can; DoRA, IA3 and OFT can't."
            )
        yield tensors[path]


def _is_variant(layer: Any, name: str) -> bool:
    """Whether a LoRA does more than B A x: DoRA and its like, or a bias."""
    return name in getattr(layer, "lora_variant", {}) or bool(getattr(layer, "lora_bias", {}).get(name))


@torch.no_grad()
def _is_linear_in(layer: Any, name: str, parameter: nn.Parameter) -> bool:
    """Whether twice the tensor is twice the update, tried out."""
    value = parameter.detach().clone()
    updates = []
    try:
        for factor in (1.0, 2.0):
            parameter.copy_(torch.full_like(value, factor))  # a start at zero would be linear in whatever it meets
            updates.append(layer.get_delta_weight(name))
    except (AttributeError, TypeError):  # it has no update of a weight alone
        return False
    finally:
        parameter.copy_(value)
    return all(isinstance(u, Tensor) for u in updates) and torch.allclose(updates[1], 2 * updates[0])
