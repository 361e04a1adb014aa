"""Which of a model's matrices a config means, and how an adapter knows its base again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from peft import NoMatchingPeftModuleError, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from .anatomy import SCREEN, Anatomy, Matrix, Site, base_model, describe, layer_of, table, unread_layers
from .config import MultimodalConfig, TargetedConfig
from .registry import method_of


@dataclass
class MatchTable:
    """The result of `matched_modules`: iterate over its sites (matrices, layers, towers), or print it as a table."""

    sites: list[Site] = field(default_factory=list)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __str__(self) -> str:
        rows = [
            (
                s.module,
                s.kind,
                f"{s.d_out} x {s.d_in}",
                "{}:{}".format(*s.rows) if isinstance(s, Matrix) else "",
                s.tower,
                s.role,
            )
            for s in self.sites
        ]
        matrices = all(isinstance(s, Matrix) for s in self.sites)
        count = f"{len(rows)} {'matrices' if matrices else 'places'}"
        return f"{table(('module', 'kind', 'shape', 'rows', 'tower', 'role'), rows, SCREEN)}\n{count}"

    __repr__ = __str__


def matched_modules(model: nn.Module, config: MultimodalConfig) -> MatchTable:
    """What `get_peft_model(model, config)` would adapt. The model is not changed.

    Args:
        model: The base model, bare or in a `PeftModel`.
        config: A config of any method of this package.

    Returns:
        A `MatchTable`. Iterate over it for the places (`module`, `kind`, `tower`, `role`, `d_in`, `d_out`), or print
        it.

    Raises:
        TypeError: the config is none of this package's.
        ValueError: nothing matches; the message names what exists.

    Examples:
        >>> matched = matched_modules(clip, AuroraModeApproxConfig(towers=["text"]))
        >>> print(matched)
        >>> {site.kind for site in matched}
    """
    method = method_of(config) if isinstance(config, PeftConfig) else None
    if method is None:
        raise TypeError(f"matched_modules takes a config of this package, got {type(config).__name__}")
    base = base_model(model)
    while base is not (below := base_model(base)):  # an adapter on a model with an adapter
        base = below
    return MatchTable(method.model.sites(config, base, describe(base)))


# --- which sites a config means --------------------------------------------------------------------------------------


def choose(
    config: TargetedConfig,
    model: nn.Module,
    anatomy: Anatomy,
    candidates: list[Site],
    defaults: Callable[[Any, list[Any]], list[Any]],
    places: str,
) -> list[Site]:
    """The sites among `candidates` that a config means, in the model's order.

    Args:
        defaults: What `target_modules=None` means: (config, candidates) -> sites.
        places: Where the method puts its adapters at all, for the error.

    Raises:
        NoMatchingPeftModuleError: there are none; the message names what exists.
    """
    roles = (config.base_signature or {}).get("roles") if config.is_loaded else None
    if roles:
        return [s for s in candidates if is_among(s, roles)]  # names may have changed since, roles have not
    targets = config.target_modules
    if targets is None:
        unread = () if config.layers_to_transform is not None else unread_layers(model, anatomy)
        sites = defaults(config, [s for s in candidates if layer_of(s.module) not in unread])
    elif isinstance(targets, str) and targets.lower() == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        heads = {path for path, module in model.named_modules() if head is not None and module is head}
        sites = [s for s in candidates if s.module not in heads]
    else:
        sites = [s for s in candidates if check_target_module_exists(config, s.module)]
    sites = [s for s in sites if not config.towers or s.tower in config.towers]
    sites = [s for s in sites if not left_out(config, s.module) and in_layers(config, s.module)]
    if not sites:
        raise NoMatchingPeftModuleError(nothing_matched(config, anatomy, candidates, places))
    return sites


def in_layers(config: Any, path: str) -> bool:
    """`layers_to_transform` for every form of `target_modules`."""
    if config.layers_to_transform is None:
        return True
    patterns = config.layers_pattern or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)(?:\.|$)", path):
            wanted = config.layers_to_transform
            return int(match.group(1)) in (wanted if isinstance(wanted, (list, tuple)) else [wanted])
    return False


def left_out(config: Any, path: str) -> bool:
    saved_whole = any(re.match(rf"(.*\.)?{re.escape(name)}(\.|$)", path) for name in config.modules_to_save or ())
    return saved_whole or _named(getattr(config, "exclude_modules", None), path)


def _named(names: list[str] | str | None, path: str) -> bool:
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == n or path.endswith(f".{n}") for n in names)


def nothing_matched(config: Any, anatomy: Anatomy, candidates: list[Site], places: str) -> str:
    """The message; `places` says where a method puts its adapters at all."""
    if not candidates:
        towers = (
            ", ".join(f"{t.name} ({t.attentions} attentions)" for t in anatomy.towers)
            or "none that reads pixels or tokens"
        )
        return f"Nothing in {anatomy.model_class} can be adapted: {places}. Its towers: {towers}."
    counts: dict[str, dict[str, int]] = {}
    for matrix in candidates:
        parent, _, leaf = matrix.module.rpartition(".")
        leaf = f"{parent}.N" if leaf.isdigit() else leaf  # a numbered layer is called by its list
        counts.setdefault(matrix.tower, {}).setdefault(leaf, 0)
        counts[matrix.tower][leaf] += 1
    exists = "; ".join(
        f"{tower}: " + ", ".join(f"{n} ({k})" for n, k in leaves.items()) for tower, leaves in counts.items()
    )
    asked = "the default targets" if config.target_modules is None else f"target_modules={config.target_modules!r}"
    return (
        f"No module of {anatomy.model_class} matches {asked} in towers={config.towers or 'all'}. What can be adapted, by "
        f"tower: {exists or 'nothing'}. print(peft_multimodal.describe(model)) shows the towers."
    )


# --- an adapter's signature of its base ------------------------------------------------------------------------------


def check_same_base(config: MultimodalConfig, anatomy: Anatomy) -> None:
    """Refuse a base whose towers differ from those that the adapter was trained on."""
    trained = config.base_signature or {}
    theirs, ours = trained.get("towers") or {}, anatomy.signature()
    differing = {t: (theirs[t], ours.get(t)) for t in theirs if ours.get(t) != theirs[t]}
    if differing:
        details = "; ".join(
            f"{t} tower: {then[0]} attentions of width {then[1]} then, "
            + (f"{now[0]} of width {now[1]} now" if now else "none now")
            for t, (then, now) in differing.items()
        )
        raise ValueError(
            f"This adapter belongs to another base: it was trained on {trained.get('model_class')} "
            f"({config.base_model_name_or_path or 'unnamed'}), this is {anatomy.model_class}. {details}. Load the base "
            f"that the adapter's adapter_config.json names.{_one_tower(theirs, ours)}"
        )


def _one_tower(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The way out where a tower of the adapter's base stands alone."""
    alone = [tower for tower in ours if ours[tower] == theirs.get(tower)]
    if not alone or len(ours) != len(alone):
        return ""
    return (
        f" This is its {' and '.join(alone)} tower alone: an adapter that is made with towers={alone} fits it and the whole "
        "model."
    )


def fold(sites: list[Site]) -> dict[str, list[list[int]]]:
    """Roles in short: {"vision.q": [[0, 11]]} stands for vision.q.0 to vision.q.11."""
    folded: dict[str, list[list[int]]] = {}
    for stem, number in sorted((m.role.rpartition(".")[0], int(m.role.rpartition(".")[2])) for m in sites):
        spans = folded.setdefault(stem, [])
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return folded


def is_among(site: Site, folded: dict[str, list[list[int]]]) -> bool:
    """Roles that come from a file are not unfolded: it may name more than memory holds."""
    stem, _, number = site.role.rpartition(".")
    return any(first <= int(number) <= last for first, last in folded.get(stem, ()))
