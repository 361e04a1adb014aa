"""What a policy means on one model: found before anything is changed."""

from __future__ import annotations

import copy
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..core.config import TargetedConfig
from ..core.matching import left_out
from ..core.towers import CONNECTOR, TowerMap
from .config import Train


def aim(model: nn.Module, config: Any) -> None:
    """Let the configs of a policy's towers name what they mean on this model, and the policy name what trains whole.

    Raises:
        ValueError: the model lacks a tower, or what is asked of it isn't there.
    """
    towers = TowerMap(model)
    chosen = config.chosen()
    if missing := [place for place in chosen if place not in towers.names()]:
        raise ValueError(
            f"{towers.model_class} has no {missing[0]!r}. It has {', '.join(towers.names())}; "
            "print(peft_multimodal.describe(model)) shows its towers."
        )
    saved = list(config.modules_to_save or ())
    for place, choice in chosen.items():
        if isinstance(choice, Train):
            saved += _whole(towers, place)
            continue
        choice.inference_mode = config.inference_mode
        if getattr(choice, "modules_to_save", None):
            saved += choice.modules_to_save
        if isinstance(choice, TargetedConfig):
            _aim_ours(towers, place, choice)
        else:
            _aim(towers, place, choice, saved)
        if hasattr(choice, "modules_to_save"):
            choice.modules_to_save = None  # the policy has them all
    config.modules_to_save = list(dict.fromkeys(saved)) or None


def _whole(towers: TowerMap, place: str) -> list[str]:
    """The modules that train, if a whole tower does."""
    paths = towers.whole(place)
    names = [path for path, _ in towers.model.named_modules()]
    users: dict[int, list[str]] = {}
    for name, parameter in towers.model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for path in paths:
        if twice := [name for name in names if name != path and name.endswith(path)]:
            raise ValueError(
                f"{place} can't train as a whole: PEFT finds modules by the ends of their names, and {twice[0]} ends like {path}. "
                "Give it an adapter."
            )
        for parameter in towers.model.get_submodule(path).parameters():
            if outside := [name for name in users[id(parameter)] if not name.startswith(f"{path}.")]:
                raise ValueError(
                    f"{place} can't train as a whole: {path} shares its weight with {outside[0]} (they are tied), and a copy would "
                    "part them. Give it an adapter, or load the base with tie_word_embeddings=False."
                )
    if not paths:
        raise ValueError(
            f"{place} can't train as a whole: it is all of {towers.model_class}. Train the model without a policy."
        )
    return paths


def _aim_ours(towers: TowerMap, place: str, config: TargetedConfig) -> None:
    """Keep a method of this package to one tower."""
    if config.is_loaded:
        return
    if config.towers not in (None, [place]):
        raise ValueError(
            f"TowerPolicy.{place}: the config has towers={config.towers}. Leave towers out, the policy sets them."
        )
    if place == CONNECTOR:
        config.target_modules = _matching(towers, place, config, [])
        return
    config.towers = [place]
    nested = [path for path, tower in towers.nested.items() if tower == place]  # Qwen-VL's merger
    if nested and not isinstance(config.exclude_modules, str):
        config.exclude_modules = [*(config.exclude_modules or ()), *nested]


def _aim(towers: TowerMap, place: str, config: Any, saved: list[str]) -> None:
    """Let a config of PEFT's name its tower's modules one by one."""
    if not hasattr(config, "target_modules"):
        raise ValueError(f"TowerPolicy.{place}: {type(config).__name__} chooses no modules.")
    paths = _matching(towers, place, config, saved)
    if getattr(config, "feedforward_modules", None):  # IA3's, which must be among the targets
        matcher = copy.copy(config)
        matcher.target_modules = config.feedforward_modules
        config.feedforward_modules = {path for path in paths if check_target_module_exists(matcher, path)}
    ends = tuple(f".{path}" for path in paths)
    alike = [path for path, _ in towers.model.named_modules() if path.endswith(ends) and path not in paths]
    chosen = {"exclude_modules": alike or None, "layers_to_transform": None, "layers_pattern": None}
    for name, value in chosen.items():
        if hasattr(config, name):
            setattr(config, name, value)
    config.target_modules = set(paths)


def _matching(towers: TowerMap, place: str, config: Any, saved: list[str]) -> list[str]:
    """Paths of the modules of a place that a config means."""
    targets = config.target_modules
    if targets is None or targets == "all-linear":
        paths = towers.matrices(place)
    else:
        paths = [path for path in towers.modules(place) if check_target_module_exists(config, path)]
    paths = [path for path in paths if not left_out(config, path) and not any(path.endswith(name) for name in saved)]
    if not paths:
        leaves = sorted({path.rpartition(".")[2] for path in towers.matrices(place)})
        raise ValueError(
            f"TowerPolicy.{place}: target_modules={targets!r} matches nothing in {towers.model_class}'s {place}. Its linear "
            f"modules are {', '.join(leaves)}."
        )
    return paths
