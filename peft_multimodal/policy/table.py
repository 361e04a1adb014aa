"""What a policy does with a model, as a table."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from ..core.anatomy import base_model, table
from ..core.switching import adapter_towers
from ..core.towers import PLACES, TowerMap, plain

_SAVED = ".modules_to_save."


@dataclass(frozen=True)
class Row:
    """A tower, or a module that trains whole beside the towers' adapters.

    Args:
        name: Of the tower or module.
        method: "frozen", "trained whole", or the adapter's.
        parameters, trained: How many the base has there, and how many train; an adapter's are not the base's.
        lr: None takes that of `TrainingArguments`.
    """

    name: str
    method: str
    parameters: int
    trained: int
    lr: float | None


@dataclass(frozen=True)
class PolicyTable:
    """The rows of all towers; `print` it."""

    rows: list[Row]

    @classmethod
    def of(cls, policy: Any, model: nn.Module) -> PolicyTable:
        wrapped: Any = model if getattr(model, "peft_config", None) else get_peft_model(empty_copy(model), policy)
        towers, owners, rates = TowerMap(wrapped), adapter_towers(wrapped), policy.rates()
        wholes = policy.wholes()
        parameters, trained = Counter[str](), Counter[str]()
        for name, parameter in wrapped.named_parameters():
            place = next((owners[part] for part in name.split(".") if part in owners), towers.place(name))
            module = plain(name.partition(_SAVED)[0])
            whole = next((w for w in wholes if _SAVED in name and f".{module}".endswith(f".{w}")), place)
            trained[whole] += parameter.numel() * parameter.requires_grad
            is_base = _SAVED not in name and not owners.keys() & set(name.split("."))
            parameters[place] += parameter.numel() * is_base
        lrs = {**(rates["tower_lr"] or {}), **(rates["saved_modules_lr"] or {})}
        rows = [
            Row(name, _method(getattr(policy, name)), parameters[name], trained[name], lrs.get(name))
            for name in PLACES
            if name in towers.names()
        ]
        rows += [Row(w, "trained whole", trained[w], trained[w], lrs.get(w)) for w in dict.fromkeys(wholes)]
        return cls(rows)

    def __str__(self) -> str:
        cells = [
            (r.name, r.method, f"{r.parameters:,}", f"{r.trained:,}", _rate(r.lr) if r.trained else "-")
            for r in self.rows
        ]
        total = sum(row.trained for row in self.rows)
        header = ("tower", "method", "parameters", "trained", "learning rate")
        return f"{table(header, cells)}\ntrained in all: {total:,}"

    __repr__ = __str__


def empty_copy(model: nn.Module) -> Any:
    """A model like this one without its weights: what is tried out on it, this one doesn't see."""
    base = base_model(model)
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in base.parameters()}
    return copy.deepcopy(base, {**memo, **{id(b): torch.empty_like(b, device="meta") for b in base.buffers()}})


def _method(choice: Any) -> str:
    if not isinstance(choice, PeftConfig):
        return choice if isinstance(choice, str) else "trained whole"
    rank = getattr(choice, "r", None)
    return type(choice).__name__.removesuffix("Config") + (f" r={rank}" if rank else "")


def _rate(lr: float | None) -> str:
    return "the trainer's" if lr is None else f"{lr:g}"
