"""Learning rates of their own for the towers, the parts of an adapter, and what is trained beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import PeftType
from torch import nn
from transformers import Trainer

from ..core.switching import adapter_towers, adapters_of
from ..core.towers import TowerMap, plain

_SAVED = ".modules_to_save."


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    saved_modules_lr: float | Mapping[str, float] | None = None,
    tower_lr: Mapping[str, float] | None = None,
    role_lr: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """The trained parameters of a `PeftModel` in groups, for any optimizer of torch.

    A projection that is trained as a whole (`modules_to_save`) wants a smaller learning rate than an adapter that starts
    from zero. Biases, norms, gates and scales get no weight decay.

    Args:
        model: A `PeftModel` with adapters of any method, of this package or of PEFT; also inside of DDP or
            `torch.compile`.
        lr: Learning rate of everything that no other argument names.
        weight_decay: Of matrices.
        saved_modules_lr: Learning rate of `modules_to_save`, or `{module: learning rate}` by the names given there.
        tower_lr: `{tower: learning rate}`; `describe(model)` shows the towers. "connector" is what connects them, such as
            LLaVA's projector and CLIP's projections.
        role_lr: `{role: learning rate}`. A role is the name that a method gives a tensor, such as "lora_A" and "lora_B"
            of LoRA; a name that isn't there is answered by those that are. It comes before `tower_lr`.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and a `name`.

    Raises:
        ValueError: nothing trains, or a tower or role is named that no trained parameter has; the message lists them.

    Examples:
        >>> import torch
        >>> groups = parameter_groups(model, lr=3e-3, tower_lr={"text": 1e-3}, role_lr={"P": 1e-2})
        >>> optimizer = torch.optim.AdamW(groups)
    """
    # Trainer's own rule, which asks nothing of a trainer.
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    places = Places(model)
    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    towers, roles = set(), set()
    wholes: set[str] = set()
    of_wholes = saved_modules_lr if isinstance(saved_modules_lr, Mapping) else {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tower, own = places.tower(name), [] if _SAVED in name else list(places.roles(name))
        towers.add(tower)
        roles.update(own)
        title, rate = tower or "shared", (tower_lr or {}).get(tower, lr)
        if role := next((r for r in own if r in (role_lr or {})), None):
            title, rate = role, (role_lr or {})[role]
        elif _SAVED in name:
            whole = plain(name.partition(_SAVED)[0])
            wholes.add(whole)
            if module := next((m for m in of_wholes if f".{whole}".endswith(f".{m}")), None):
                title, rate = module, of_wholes[module]
                wholes.add(module)
            elif isinstance(saved_modules_lr, (int, float)):
                title, rate = "modules_to_save", saved_modules_lr
        decay = weight_decay if name in decayed and not _is_scale(name, parameter) else 0.0
        key = (title, rate, decay)
        groups.setdefault(key, {"params": [], "lr": rate, "weight_decay": decay, "name": title})
        groups[key]["params"].append(parameter)
    if not groups:
        raise ValueError(
            "No parameter of the model trains. Make the adapter with inference_mode=False, or set_adapter(name)."
        )
    _check("saved_modules_lr", of_wholes, wholes)
    _check("tower_lr", tower_lr, towers - {""})
    _check("role_lr", role_lr, roles)
    return list(groups.values())


def _is_scale(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a number or a vector that scales or shifts; a LoRA of rank 1 is a linear module's weight."""
    is_vector = sum(size > 1 for size in parameter.shape) <= 1
    return is_vector and (parameter.ndim < 2 or not name.endswith(".weight"))


def _check(argument: str, rates: Mapping[str, float] | None, there_are: set[str]) -> None:
    if unknown := sorted(set(rates or ()) - there_are):
        raise ValueError(f"{argument} names {unknown}, which no trained parameter has. There are {sorted(there_are)}.")


class Places:
    """Where the parameters of a wrapped model stand: in which tower, and under which names of its methods."""

    def __init__(self, model: nn.Module) -> None:
        peft = ((path, m) for path, m in model.named_modules() if isinstance(m, (PeftModel, PeftMixedModel)))
        path: str
        path, model = next(peft, ("", model))  # inside of DDP's wrapper, of FSDP's or of torch.compile's
        self.model, self.above = model, f"{path}." if path else ""
        self.map = TowerMap(model)
        configs = dict(adapters_of(model))
        self.adapters = set(configs)
        self.prefixes = {str(PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(config.peft_type)]) for config in configs.values()}
        self.towers = adapter_towers(model)

    def tower(self, name: str) -> str:
        """Name of the tower that a parameter stands in; "" outside of all."""
        of_policy = next((self.towers[part] for part in name.split(".") if part in self.towers), None)
        return self.map.place(name.removeprefix(self.above)) if of_policy is None else of_policy

    def roles(self, name: str) -> Iterator[str]:
        """The names that a method has for a tensor, without the method's prefix and what keeps weight decay away."""
        parts = name.split(".")
        for prefix in self.prefixes:
            start = next((i for i, part in enumerate(parts) if part.startswith(prefix)), None)
            for part in parts[start:] if start is not None else ():
                if part not in self.adapters and not part.isdigit():
                    yield part.removeprefix(prefix if prefix != "lora_" else "").removesuffix("_norm")
