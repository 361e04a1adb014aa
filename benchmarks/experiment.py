"""Experiments: JSON files `experiments/<task>/<method>/<variant>.json` over the task's `defaults.json`.

| key | content |
| --- | --- |
| `label` | the row's name in the tables |
| `peft` | keyword arguments of the PEFT config, `peft_type` among them; null without PEFT |
| `scale` | alpha / r, the factor of a LoRA's or an Aurora's update; it sets `lora_alpha` or `alpha` of `peft` |
| `trainable` | without PEFT: a regular expression of the base model's parameters that train; null for none |
| `training` | `transformers.TrainingArguments` |
| `rates` | learning rates of their own, arguments of `peft_multimodal.parameter_groups` |
| `task` | what else the task reads |
| `choices` | overrides of the other keys, one of which is taken, by its score on the validation split |
| `chosen` | the index of that choice, written by `benchmarks.run select`; null until then |
| `choice_of` | instead of those two: another experiment of the task, whose choice is taken |

`peft`, `training`, `rates` and `task` of an experiment are laid over those of the defaults key by key, `scale` as a whole, its
choice over both; what an experiment says itself goes over another one's choice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import get_peft_config

import peft_multimodal  # noqa: F401  registers its methods in PEFT

from .records import write_atomically

EXPERIMENTS = Path(__file__).parent / "experiments"
KEYS = {"label", "peft", "scale", "trainable", "training", "rates", "task", "choices", "chosen", "choice_of"}
LAYERED = ("peft", "training", "rates", "task")
ALPHA = {"LORA": "lora_alpha", "AURORA_MODE_APPROX": "alpha"}


@dataclass(frozen=True)
class Experiment:
    """One experiment with the defaults and the choice already laid over each other."""

    task: str
    name: str
    """`<method>/<variant>`."""
    label: str
    peft: dict[str, Any] | None
    trainable: str | None
    training: dict[str, Any]
    settings: dict[str, Any]
    """What stands under `task`."""
    rates: dict[str, Any] = field(default_factory=dict)
    choices: list[dict[str, Any]] = field(default_factory=list)
    chosen: int | None = None
    open: bool = False
    """A choice is still to be made, here or in the experiment whose choice is taken."""
    path: Path | None = None

    @property
    def method(self) -> str:
        return self.name.partition("/")[0]

    @property
    def variant(self) -> str:
        return self.name.partition("/")[2]

    @property
    def trains(self) -> bool:
        return self.peft is not None or self.trainable is not None

    def peft_config(self) -> Any:
        """A new `peft.PeftConfig`, or None without PEFT."""
        return None if self.peft is None else get_peft_config(dict(self.peft))

    def limited(self, steps: int) -> Experiment:
        """The same with at most that many steps, to see that it works."""
        return replace(self, training=self.training | {"max_steps": steps})

    def choose(self, index: int) -> Experiment:
        """The same with another of its choices."""
        if self.path is None:
            raise ValueError(f"{self.name} was not read from a file.")
        return _read(self.path, self.path.parents[2], index)

    def decide(self, index: int) -> None:
        """Write `index` as the chosen one into the experiment's file."""
        if self.path is None:
            raise ValueError(f"{self.name} was not read from a file.")
        written = json.loads(self.path.read_text("utf-8")) | {"chosen": index}
        write_atomically(self.path, dump(written))

    def as_dict(self) -> dict[str, Any]:
        """What the results keep of it."""
        training = {"training": self.training, **({"rates": self.rates} if self.rates else {})}
        return {"peft": self.peft, "trainable": self.trainable, **training, "task": self.settings}


def names(task: str, folder: Path = EXPERIMENTS) -> list[str]:
    """`<method>/<variant>` of the task's experiments."""
    return sorted(str(path.relative_to(folder / task).with_suffix("")) for path in (folder / task).glob("*/*.json"))


def load(task: str, name: str, folder: Path = EXPERIMENTS) -> Experiment:
    """Read one experiment; an error names those that exist."""
    path = folder / task / f"{name}.json"
    if name not in names(task, folder):
        raise ValueError(
            f"There is no experiment {name!r} of task {task!r}; there are {', '.join(names(task, folder))}."
        )
    return _read(path, folder, None)


def dump(value: Mapping[str, Any]) -> str:
    """JSON as the experiment files are written."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _read(path: Path, folder: Path, choice: int | None) -> Experiment:
    task, method = path.parent.parent.name, path.parent.name
    own = _checked(path)
    shared = folder / task / "defaults.json"
    layers = [_checked(shared) if shared.is_file() else {}, own]
    source = _checked(folder / task / f"{own['choice_of']}.json") if "choice_of" in own else own
    choices, chosen = source.get("choices", []), source.get("chosen") if choice is None else choice
    if chosen is not None:
        if not 0 <= chosen < len(choices):
            raise ValueError(f"{path}: choice {chosen} of {len(choices)}.")
        layers.insert(1 if "choice_of" in own else 2, choices[chosen])
    merged: dict[str, Any] = {key: _overlay(layer.get(key) for layer in layers) for key in LAYERED}
    scale = next((layer["scale"] for layer in reversed(layers) if "scale" in layer), None)
    if own.get("peft") and scale is not None:
        merged["peft"][ALPHA[own["peft"]["peft_type"]]] = scale * own["peft"]["r"]
    return Experiment(
        task=task,
        name=f"{method}/{path.stem}",
        label=own["label"],
        peft=merged["peft"] if own.get("peft") else None,
        trainable=own.get("trainable"),
        training=merged["training"],
        settings=merged["task"],
        rates=merged["rates"],
        choices=own.get("choices", []),
        chosen=chosen,
        open=bool(choices) and chosen is None,
        path=path,
    )


def _checked(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text("utf-8"))
    unknown = {key for part in (content, *content.get("choices", [])) for key in part} - KEYS
    if unknown:
        raise ValueError(f"{path}: unknown keys {sorted(unknown)}; known are {sorted(KEYS)}.")
    return content


def _overlay(layers: Iterable[Mapping[str, Any] | None]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer or {}
    return merged
