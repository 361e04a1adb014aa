"""What adapters on a model change: updates of weights as factors, and what is no update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..core.anatomy import is_linear, unwrap
from ..core.parts import MultimodalLayer
from ..core.towers import TowerMap
from .servers import LANGUAGE_MODEL

WHOLE = "modules_to_save"


@dataclass
class Factors:
    """The update of one module: A (R x d_in), B (d_out x R), of all adapters that are written, their ranks side by side."""

    path: str
    tower: str
    base: Any
    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return len(self.A)

    @property
    def is_read(self) -> bool:
        """Whether the module's weights are read and never called on their own."""
        return isinstance(self.base, nn.MultiheadAttention)

    def join(self, A: Tensor, B: Tensor) -> None:
        self.A, self.B = torch.cat([self.A, A]), torch.cat([self.B, B], dim=1)

    def padded(self, rank: int) -> tuple[Tensor, Tensor]:
        """A and B with rows and columns of zeros up to a rank."""
        more = rank - self.rank
        return nn.functional.pad(self.A, (0, 0, 0, more)), nn.functional.pad(self.B, (0, more))


@dataclass
class Contents:
    """What adapters hold: updates of weights, and what is none.

    Args:
        modules: {path: its update}.
        beside: {what `drop` calls it: what it is}, of what has no place in a LoRA at all.
        whole: {key in the file: tensor} of modules that are trained and saved whole.
    """

    modules: dict[str, Factors] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)


def contents_of(base: nn.Module, names: list[str]) -> Contents:
    found = Contents()
    tower_of = towers_of(base)
    whole: list[str] = []
    for path, module in base.named_modules():
        path = plain_path(path)
        for name in names if isinstance(module, BaseTunerLayer) else ():
            for A, B in _factors(found, module, name, path):
                if outer := next((w for w in whole if path.startswith(f"{w}.")), None):
                    raise ValueError(
                        f"{outer} is trained whole (modules_to_save), and the adapter {name!r} acts inside of it, which a LoRA's files have "
                        "no place for. Merge instead: model.merge_and_unload().save_pretrained(folder)."
                    )
                if path in found.modules:
                    found.modules[path].join(A, B)
                else:
                    found.modules[path] = Factors(path, tower_of(path), _innermost(module), A, B)
        if isinstance(module, ModulesToSaveWrapper):
            whole.append(path)
            copies = [module.modules_to_save[n] for n in names if n in module.modules_to_save]
            if len(copies) > 1:
                raise ValueError(
                    f"{path} is trained whole beside several of the adapters {names} (modules_to_save), and one LoRA holds one copy "
                    f"of it. Export the adapters one by one, or leave these modules out: drop=[{WHOLE!r}]."
                )
            found.whole |= {f"{path}.{key}": value for copy in copies for key, value in copy.state_dict().items()}
    return found


def towers_of(base: nn.Module) -> Callable[[str], str]:
    """The tower of a module, by its path; the head that predicts tokens is the language model's."""
    towers = TowerMap(base)
    elsewhere = LANGUAGE_MODEL if LANGUAGE_MODEL in towers.names() else "other"
    return lambda path: towers.place(path) or elsewhere


def _factors(found: Contents, layer: Any, name: str, path: str) -> Iterator[tuple[Tensor, Tensor]]:
    """An adapter's factors in one layer, if it has any; what else it has there is noted."""
    if isinstance(layer, MultimodalLayer):
        if layer.has_adapter(name):
            if (factors := layer.lora_factors(name)) is not None:
                dtype = _dtype(layer)
                yield factors[0].to(dtype), factors[1].to(dtype)
            elif layer.no_lora is not None:
                found.beside[layer.no_lora] = type(layer).__name__
    elif isinstance(layer, LoraLayer) and name in layer._get_available_adapters():
        if name not in layer.lora_A or not is_linear(unwrap(layer)) or name in layer.lora_variant:
            raise ValueError(
                f"The LoRA {name!r} acts on {path} ({type(layer).__name__}) in a way that isn't written here."
            )
        weights: list[Any] = [layer.lora_A[name].weight, layer.lora_B[name].weight]
        yield weights[0], layer.scaling[name] * weights[1]


def _dtype(layer: MultimodalLayer) -> torch.dtype:
    """Of an adapter's parameters in a layer."""
    containers = [getattr(layer, name) for name in layer.adapter_layer_names]
    return next(p.dtype for c in containers for p in c.parameters())


def plain_path(path: str) -> str:
    """A module's path as it is without adapters."""
    return ".".join(name for name in path.split(".") if name != "base_layer")


def _innermost(module: Any) -> Any:
    while isinstance(module, BaseTunerLayer):
        module = unwrap(module)
    return module
