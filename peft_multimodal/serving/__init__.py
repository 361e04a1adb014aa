"""Whether a server would load a LoRA: `python -m peft_multimodal doctor MODEL ADAPTER --serve vllm`.

Servers ignore what they don't know, and the base model answers. So every key of the file is held against the modules of the
base, which is built from its config on the meta device, and the adapter's config against the server's rules
(`files/servers.py`). Any LoRA folder can be looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import nn

from .. import doctor
from ..core.registry import method_of
from ..files.export import PREFIX
from ..files.saving import AdapterError, check_files, find_adapter
from ..files.servers import SERVERS, Server, changes_base, odd_fields
from .config import faults_of, shown
from .modules import check_modules
from .report import OR_MERGE, Module, ServingReport

_KEY = re.compile(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")


def check_serving(model: nn.Module | str | Path, adapter: str | Path, server: str, **kwargs: Any) -> ServingReport:
    """Look at what a server would do with an adapter.

    Args:
        model: The base, or a folder or Hub id, of which the config alone is read.
        adapter: A folder or Hub id.
        server: "vllm", "sglang" or "llama.cpp".
        kwargs: Of the adapter: revision, subfolder, token.

    Raises:
        ValueError: there are no rules for such a server.

    Examples:
        >>> print(check_serving("llava-hf/llava-1.5-7b-hf", "my-lora", "vllm"))
    """
    if server not in SERVERS:
        raise ValueError(f"server must be one of {', '.join(map(repr, SERVERS))}, got {server!r}.")
    rules = SERVERS[server]
    report = ServingReport(server, rules.source)
    try:
        folder = find_adapter(adapter, **kwargs)
        config = check_files(folder)
    except AdapterError as error:
        report.problem(error.what, error.way_out)
        return report
    if not _is_lora(report, config):
        return report
    if faults := list(faults_of(config)):
        for fault in faults:
            report.problem(fault, "Correct it, or restore adapter_config.json from where the adapter was saved.")
        return report
    modules, others = _read(folder)
    report.modules = list(modules.values())
    _check_config(report, rules, config)
    _check_others(report, rules, config, others)
    _check_ranks(report, rules, config)
    built = doctor.Report()
    base = doctor._model(built, model)
    report.findings += built.findings
    if base is not None:
        report.base = type(base).__name__
        check_modules(report, rules, base)
    _sum_up(report)
    return report


def _is_lora(report: ServingReport, config: Mapping[str, Any]) -> bool:
    kind = config["peft_type"]
    if kind == "LORA":
        return True
    method = method_of(kind)
    what = f"The adapter is of {kind}, and {SERVERS[report.server].title} reads LoRA alone."
    if method is None:
        report.problem(what, f"peft.convert_to_lora approximates some of PEFT's methods by LoRA. {OR_MERGE}")
    elif method.promises.lora:
        report.problem(
            what,
            f"Write it as a LoRA: peft_multimodal.export_lora(model, folder, target={report.server!r}). {OR_MERGE}",
        )
    else:
        report.problem(what, f"{method.model.not_mergeable} Serve it with transformers.")
    return False


def _read(folder: Path) -> tuple[dict[str, Module], list[str]]:
    """The modules that the weights file has factors for, and its other keys."""
    modules: dict[str, Module] = {}
    others: list[str] = []
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118  (no mapping)
            if match := _KEY.fullmatch(key):
                shape = tuple(tensors.get_slice(key).get_shape())
                modules.setdefault(match[1], Module(match[1])).shapes[match[2]] = shape
            else:
                others.append(key)
    return modules, others


# --- the adapter's config --------------------------------------------------------------------------------------------


def _check_config(report: ServingReport, rules: Server, config: Mapping[str, Any]) -> None:
    for name, why in odd_fields(config, rules.refuses).items():
        report.problem(f"{name}={shown(config[name])}: {why}. {rules.title} refuses the adapter.")
    for name, why in odd_fields(config, rules.ignores).items():
        report.problem(f"{name}={shown(config[name])}: {rules.title} doesn't read it: {why}.")
    if changes_base(config):
        report.problem(
            f"init_lora_weights={shown(config['init_lora_weights'])} makes PEFT change the base's weights as it loads the adapter, and "
            f"{rules.title} serves the base as it is.",
            "Save it by PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA.",
        )
    targets = config.get("target_modules")
    if not rules.by_path and not isinstance(targets, list) and targets not in ("all", "all-linear"):
        report.problem(
            f"target_modules={shown(targets)}: {rules.title} reads a list of names alone, and refuses the adapter.",
            "Write the last names of the modules into adapter_config.json, as a list.",
        )


def _check_others(report: ServingReport, rules: Server, config: Mapping[str, Any], others: list[str]) -> None:
    """Modules that are trained whole, and other tensors that are no factors."""
    whole = set(config.get("modules_to_save") or ()) - rules.whole
    others = [key for key in others if not any(f".{name}." in key for name in rules.whole)]
    if not whole and not others:
        return
    named = (
        f"modules_to_save={shown(sorted(whole))}"
        if whole
        else "The file holds tensors that aren't called MODULE.lora_A.weight or .lora_B.weight"
    )
    examples = f" ({', '.join(_some(others))})" if others else ""
    refused = rules.others == "refused"
    verdict = "refuses the adapter" if refused else "ignores them without a word: the base's own act instead"
    report.problem(f"{named}{examples}: {rules.title} {verdict}.", f"Train without them. {OR_MERGE}")


def _check_ranks(report: ServingReport, rules: Server, config: Mapping[str, Any]) -> None:
    ranks = [module.rank for module in report.modules if module.rank is not None]
    if not ranks:
        return
    largest = max(*ranks, config["r"])
    room = rules.rank_for(largest)
    if room is None:
        report.problem(f"The rank is {largest}, and {rules.title} takes at most {rules.ranks[-1]}.")
    else:
        report.start = rules.start.format(rank=room)
    if odd := [m for m in report.modules if m.rank not in (None, _of(config, "r", m))]:
        module = odd[0]
        report.problem(
            f"{module.name!a} has rank {module.rank} in the file, {_of(config, 'r', module)} by the config, and so {len(odd)} of "
            f"{len(report.modules)} modules: PEFT refuses to load the adapter.",
            "Restore config and weights from one save.",
        )
        return
    off = [(m, *_scales(m, rules, config)) for m in report.modules if m.rank is not None]
    if rules.scale == "config" and (other := sorted({r for r in ranks if r != config["r"]})):
        report.problem(
            f"Modules have rank {', '.join(map(str, other))}, the config says r={config['r']}: {rules.title} reads no rank_pattern, and "
            "refuses the adapter.",
            f"Give all modules one rank; export_lora fills up with zeros. {OR_MERGE}",
        )
    elif wrong := [(m, ours, theirs) for m, ours, theirs in off if abs(ours - theirs) > 1e-6 * abs(ours)]:
        module, ours, theirs = wrong[0]
        report.problem(
            f"{rules.title} scales {len(wrong)} of {len(off)} modules otherwise than PEFT does ({module.name!a}: {theirs:.4g}, not "
            f"{ours:.4g}), as it doesn't read {_why(config)}.",
            f"Multiply lora_B by the scale and set lora_alpha = r. {OR_MERGE}",
        )


def _scales(module: Module, rules: Server, config: Mapping[str, Any]) -> tuple[float, float]:
    """What PEFT and the server multiply a module's B A with."""
    r, alpha, rank = config["r"], config["lora_alpha"], _of(config, "r", module)
    ours = _of(config, "lora_alpha", module) / (rank**0.5 if config.get("use_rslora") else rank)
    theirs = {"peft": ours, "config": alpha / r, "file": alpha / (module.rank or r)}[rules.scale]
    return ours, theirs


def _of(config: Mapping[str, Any], name: str, module: Module) -> Any:
    """A module's rank or alpha, by the config and its pattern."""
    pattern: dict[str, Any] = config.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[name]) or {}
    return pattern.get(get_pattern_key(list(pattern), module.name), config[name])


def _why(config: Mapping[str, Any]) -> str:
    return " and ".join(n for n in ("rank_pattern", "alpha_pattern", "use_rslora") if config.get(n)) or "the config's r"


def _sum_up(report: ServingReport) -> None:
    """Findings of the modules' verdicts, one for each reason."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for module in report.modules:
        if module.verdict not in ("loaded", "unchecked"):
            reasons.setdefault((module.verdict, module.why, module.way_out), []).append(module.name)
    for (verdict, why, way_out), names in reasons.items():
        what = f"{len(names)} of {len(report.modules)} modules {verdict}: {why} ({', '.join(_some(names))})."
        if verdict == "conditional":
            report.warning(what, f"Start it so. Or leave{way_out.removeprefix('Leave')}")
        else:
            report.problem(what, way_out)
    if not report.modules:
        report.problem(
            "The file holds no lora_A and lora_B of any module: nothing would be loaded.", "Save the adapter again."
        )
    elif all(module.verdict in ("ignored", "refused") for module in report.modules):
        report.problem("Nothing of the adapter would be loaded: the base model answers.")


def _some(names: list[str]) -> Iterator[str]:
    yield from (ascii(name)[1:-1] for name in names[:2])  # a file's names may hold anything, commands to a terminal too
    if len(names) > 2:
        yield "..."
