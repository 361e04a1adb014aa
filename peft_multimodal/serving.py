"""Whether a server would load a LoRA: `python -m peft_multimodal doctor MODEL ADAPTER --serve vllm`.

Servers ignore what they don't know, and the base model answers. So every key of the file is held against the modules of the
base, which is built from its config on the meta device, and the adapter's config against the server's rules
(`files/servers.py`). Any LoRA folder can be looked at.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import nn

from . import doctor
from .core.anatomy import describe, is_linear, linear_shape, own_modules
from .core.registry import method_of
from .files.export import PREFIX
from .files.released import released_names
from .files.saving import AdapterError, check_files, find_adapter
from .files.servers import LANGUAGE_MODEL, SERVERS, Server, changes_base, odd_fields

_KEY = re.compile(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
_LAYER = re.compile(r"layers\.(\d+)\.")
MERGE = "Merge the adapter and serve the merged model: model.merge_and_unload().save_pretrained(folder)."
OR_MERGE = f"Or m{MERGE[1:]}"
LEAVE_OUT = (
    "Leave the tower out: in training by target_modules or towers=[...], afterwards by export_lora(drop=[...]). "
    + MERGE
)
OTHER_BASE = f"Name the base that it was trained on, or correct the keys. {OR_MERGE}"


@dataclass
class Module:
    """What a LoRA's file has for one module, and what the server makes of it.

    Args:
        name: Without PEFT's prefix.
        shapes: {"A": (rank, d_in), "B": (d_out, rank)}.
        verdict: "loaded", "conditional" (on how the server is started), "ignored" or "refused".
        why, way_out: Of every verdict but "loaded".
    """

    name: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    verdict: str = "loaded"
    why: str = ""
    way_out: str = ""

    @property
    def rank(self) -> int | None:
        return self.shapes["A"][0] if "A" in self.shapes else None

    def judge(self, verdict: str, why: str, way_out: str = OTHER_BASE) -> None:
        if self.verdict in ("loaded", "conditional"):
            self.verdict, self.why, self.way_out = verdict, why, way_out


@dataclass
class ServingReport:
    """What a server would load, ignore or refuse; `print(report)` shows it.

    Args:
        server, source: Its name, and what its rules were read in.
        base: The base model's class.
        start: How the server is started with this adapter.
        modules: Those that the file names.
        findings: Problems (the server refuses the adapter, or answers otherwise than it was trained) and warnings.
    """

    server: str
    source: str
    base: str | None = None
    start: str = ""
    modules: list[Module] = field(default_factory=list)
    findings: list[doctor.Finding] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return not any(finding.level == "problem" for finding in self.findings)

    def problem(self, what: str, way_out: str = MERGE) -> None:
        self.findings.append(doctor.Finding("problem", what, way_out))

    def warning(self, what: str, way_out: str = "") -> None:
        self.findings.append(doctor.Finding("warning", what, way_out))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "healthy": self.healthy}

    def __str__(self) -> str:
        counts = Counter(module.verdict for module in self.modules)
        parts = [f"server: {self.server}, by the rules of {self.source}"]
        if self.base:
            parts.append(f"base: {self.base} (whether the server has this class is not looked at)")
        if self.modules:
            parts.append("modules: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
        if self.start:
            parts.append(f"start with: {self.start}")
        parts += [f"{f.level.upper()}: {f.what}" + (f"\n  {f.way_out}" if f.way_out else "") for f in self.findings]
        return "\n\n".join([*parts, "it will be served" if self.healthy else "it won't be served as it was trained"])


def check_serving(model: nn.Module | str | Path, adapter: str | Path, server: str, **kwargs: Any) -> ServingReport:
    """Look at what a server would do with an adapter.

    Args:
        model: The base, or a folder or Hub id, of which the config alone is read.
        adapter: A folder or Hub id.
        server: "vllm", "sglang" or "llama.cpp".
        kwargs: Of the adapter: revision, subfolder, token.

    Raises:
        ValueError: there are no rules for such a server.

    Example:
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
        _check_modules(report, rules, base)
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
        report.problem(f"{name}={config[name]!r}: {why}. {rules.title} refuses the adapter.")
    for name, why in odd_fields(config, rules.ignores).items():
        report.problem(f"{name}={config[name]!r}: {rules.title} doesn't read it: {why}.")
    if changes_base(config):
        report.problem(
            f"init_lora_weights={config['init_lora_weights']!r} makes PEFT change the base's weights as it loads the adapter, and "
            f"{rules.title} serves the base as it is.",
            "Save it by PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA.",
        )
    targets = config.get("target_modules")
    if not rules.by_path and not isinstance(targets, list) and targets not in ("all", "all-linear"):
        report.problem(
            f"target_modules={targets!r}: {rules.title} reads a list of names alone, and refuses the adapter.",
            "Write the last names of the modules into adapter_config.json, as a list.",
        )


def _check_others(report: ServingReport, rules: Server, config: Mapping[str, Any], others: list[str]) -> None:
    """Modules that are trained whole, and other tensors that are no factors."""
    whole = set(config.get("modules_to_save") or ()) - rules.whole
    others = [key for key in others if not any(f".{name}." in key for name in rules.whole)]
    if not whole and not others:
        return
    named = f"modules_to_save={sorted(whole)}" if whole else "The file holds tensors that are no lora_A or lora_B"
    examples = f" ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''})" if others else ""
    refused = rules.others == "refused"
    verdict = "refuses the adapter" if refused else "ignores them without a word: the base's own act instead"
    report.problem(f"{named}{examples}: {rules.title} {verdict}.", f"Train without them. {OR_MERGE}")


def _check_ranks(report: ServingReport, rules: Server, config: Mapping[str, Any]) -> None:
    ranks = [module.rank for module in report.modules if module.rank is not None]
    if not ranks:
        return
    room = rules.rank_for(max(*ranks, int(config.get("r") or 0)))
    if room is None:
        report.problem(f"The rank is {max(ranks)}, and {rules.title} takes at most {rules.ranks[-1]}.")
    else:
        report.start = rules.start.format(rank=room)
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
            f"{rules.title} scales {len(wrong)} of {len(off)} modules otherwise than PEFT does ({module.name}: {theirs:.4g}, not "
            f"{ours:.4g}), as it doesn't read {_why(config)}.",
            f"Multiply lora_B by the scale and set lora_alpha = r. {OR_MERGE}",
        )


def _scales(module: Module, rules: Server, config: Mapping[str, Any]) -> tuple[float, float]:
    """What PEFT and the server multiply a module's B A with."""
    r, alpha = config["r"], config["lora_alpha"]
    of: dict[str, Any] = {}
    for name, value in (("rank", r), ("alpha", alpha)):
        pattern: dict[str, Any] = config.get(f"{name}_pattern") or {}
        of[name] = pattern.get(get_pattern_key(list(pattern), module.name), value)
    ours = of["alpha"] / (of["rank"] ** 0.5 if config.get("use_rslora") else of["rank"])
    theirs = {"peft": ours, "config": alpha / r, "file": alpha / (module.rank or r)}[rules.scale]
    return ours, theirs


def _why(config: Mapping[str, Any]) -> str:
    return " and ".join(n for n in ("rank_pattern", "alpha_pattern", "use_rslora") if config.get(n)) or "the config's r"


# --- the file's keys -------------------------------------------------------------------------------------------------


@dataclass
class Place:
    """A module of the base that can have a LoRA."""

    path: str
    released: str | None
    tower: str
    shape: tuple[int, int]  # (d_in, d_out)

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2]


def _places(base: nn.Module) -> list[Place]:
    towers = {matrix.module: matrix.tower for matrix in describe(base).matrices}
    found = {
        path: module
        for path, module in own_modules(base).items()
        if is_linear(module) or isinstance(module, nn.Embedding)
    }
    names = released_names(base, found)
    return [
        Place(path, names[path], towers.get(path, LANGUAGE_MODEL), _shape(module)) for path, module in found.items()
    ]


def _shape(module: Any) -> tuple[int, int]:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return linear_shape(module)


def _check_modules(report: ServingReport, rules: Server, base: nn.Module) -> None:
    places = _places(base)
    if not any(matrix.tower == LANGUAGE_MODEL for matrix in describe(base).matrices):
        report.problem(
            f"{type(base).__name__} has no language model that generates, and {rules.title} serves LoRA for these alone."
        )
        return
    find = _by_path(places) if rules.by_path else _by_layer(places)
    leaves = {place.leaf for place in places}
    renamed = 0
    for module in report.modules:
        place = find(module.name)
        if place is None:
            _judge_unknown(module, rules, leaves)
            continue
        renamed += rules.by_path and place.released != module.name
        if fault := _fault(module, place):
            module.judge("refused", fault)
        elif place.tower != LANGUAGE_MODEL:
            module.judge(rules.other_towers, f"LoRA in the {place.tower} tower: {rules.towers_note}", LEAVE_OUT)
    if not rules.by_path:
        _check_stacked(report.modules)
    if renamed:
        report.warning(
            f"{renamed} keys name modules as transformers 5 does, not as the released checkpoint: they load where {rules.title}'s class "
            "of this model maps both.",
            f"export_lora(target={rules.name!r}) writes the checkpoint's names.",
        )


def _by_path(places: list[Place]) -> Any:
    names = {place.path: place for place in places} | {place.released: place for place in places if place.released}
    return names.get


def _by_layer(places: list[Place]) -> Any:
    """Of a module that has no such path, the one of the language model with its layer's number and last name."""
    names = _by_path(places)
    numbered = {(m[1], p.leaf): p for p in places if p.tower == LANGUAGE_MODEL and (m := _LAYER.search(p.path))}

    def find(name: str) -> Place | None:
        match = _LAYER.search(name)
        return names(name) or (numbered.get((match[1], name.rpartition(".")[2])) if match else None)

    return find


def _judge_unknown(module: Module, rules: Server, leaves: set[str]) -> None:
    if module.name.rpartition(".")[2] not in leaves:
        module.judge("refused", "the base has no module of this last name")
    elif rules.unknown == "refused":
        module.judge("refused", "the base has no such module")
    else:
        module.judge("ignored", "the base has no such module, and nothing is said: the base model answers")


def _fault(module: Module, place: Place) -> str | None:
    if missing := {"A", "B"} - module.shapes.keys():
        return f"lora_{missing.pop()} is missing"
    A, B = module.shapes["A"], module.shapes["B"]
    if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
        return f"lora_A {A} and lora_B {B} don't belong together"
    if (A[1], B[0]) != place.shape:
        return (
            f"it is {A[1]} -> {B[0]}, the base's module {place.shape[0]} -> {place.shape[1]}: the LoRA of another base"
        )
    return None


def _check_stacked(modules: list[Module]) -> None:
    """SGLang stacks q, k and v: a layer's q without v fails, and so does k in some layers and not in others."""
    names = {module.name for module in modules}
    for module in modules:
        if module.name.endswith("q_proj") and module.name.replace("q_proj", "v_proj") not in names:
            module.judge(
                "refused", "q_proj without v_proj, which are stacked", "Train q_proj and v_proj together. " + OR_MERGE
            )


def _sum_up(report: ServingReport) -> None:
    """Findings of the modules' verdicts, one for each reason."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for module in report.modules:
        if module.verdict != "loaded":
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
    elif report.base and not any(module.verdict in ("loaded", "conditional") for module in report.modules):
        report.problem("Nothing of the adapter would be loaded: the base model answers.")


def _some(names: list[str]) -> Iterator[str]:
    yield from names[:2]
    if len(names) > 2:
        yield "..."
