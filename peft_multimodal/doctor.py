"""What fits and what doesn't, before anything is trained or loaded in earnest; the command line prints it.

A model is looked at without its weights: it is built from its config on the meta device. An adapter is loaded onto that,
by the same code as ever, so what is found here is what would happen there.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ._version import INSTALL, __version__
from .core import anatomy
from .core.config import FORMAT_VERSION, MultimodalConfig
from .core.finding import Finding
from .core.matching import matched_modules
from .core.parts import MultimodalLayer
from .core.registry import METHODS, Method, method_of
from .core.storage import fault_of_saving
from .core.switching import layer_names
from .files.saving import UNCLEAR, AdapterError, check_files, find_adapter

PACKAGE = "peft-multimodal"
CHECKED = ("torch", "transformers", "peft", "safetensors", "tensorly")


@dataclass
class Report:
    """What the doctor found; `print(report)` shows it, `report.healthy` is the exit code's side.

    Args:
        versions: {package: version}.
        model: Its class.
        towers: Of each its name, path, attentions, width, parameters, and how many of them are trained.
        methods: {method: {"fits", "places": {"vision q": 12, ...}, "reason": why it doesn't fit, or None}}.
        adapter: Of the folder that was named: what its config says, its format, and whether it fits.
        adapters: {name: {"method", "active", "towers": {tower: {"parameters", "trained"}}, "left_alone": towers}} of the
            model, or of one onto which the folder's adapter was loaded. "shared" parameters belong to no tower.
        findings: Problems and warnings.
    """

    versions: dict[str, str] = field(default_factory=dict)
    model: str | None = None
    towers: list[dict[str, Any]] = field(default_factory=list)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return not any(finding.level == "problem" for finding in self.findings)

    def problem(self, what: str, way_out: str = "") -> None:
        self.findings.append(Finding("problem", what, way_out))

    def warning(self, what: str, way_out: str = "") -> None:
        self.findings.append(Finding("warning", what, way_out))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "healthy": self.healthy}

    def __str__(self) -> str:
        parts = ["versions: " + ", ".join(f"{name} {version}" for name, version in self.versions.items())]
        if self.model:
            header = ("tower", "module", "attentions", "width", "parameters", "trained")
            rows = [
                (t["name"], t["path"] or "(the model)", t["attentions"], t["width"] or "-", f"{t['parameters']:,}", f"{t['trained']:,}")
                for t in self.towers
            ]  # fmt: skip
            parts.append(f"model: {self.model}\n" + anatomy.table(header, rows))
            methods = (_method_line(name, method) for name, method in self.methods.items())
            parts.append("\n".join(["methods, with their defaults:", *methods]))
        if self.adapter:
            parts.append("\n  ".join(["adapter:", *_file_lines(self.adapter)]))
        parts += [_adapter_text(name, adapter) for name, adapter in self.adapters.items()]
        parts += [f"{f.level.upper()}: {f.what}" + (f"\n  {f.way_out}" if f.way_out else "") for f in self.findings]
        return "\n\n".join([*parts, "healthy" if self.healthy else "not healthy"])


def _method_line(name: str, method: dict[str, Any]) -> str:
    places = ", ".join(f"{count} x {place}" for place, count in method["places"].items())
    return f"  {name}: {places}" if method["fits"] else f"  {name}: no. {method['reason']}"


def _file_lines(adapter: dict[str, Any]) -> Iterator[str]:
    yield from (f"{key}: {value}" for key, value in adapter.items() if key not in ("format", "fits"))
    if written := adapter.get("format"):
        yield f"format: {written['version']}, written by {PACKAGE} {written['package']}; read up to {written['newest']}"
    if "fits" in adapter:
        yield "fits: " + ("every weight has its place" if adapter["fits"] else "no")


def _adapter_text(name: str, adapter: dict[str, Any]) -> str:
    rows = [(tower, f"{n['parameters']:,}", f"{n['trained']:,}") for tower, n in adapter["towers"].items()]
    state = "active" if adapter["active"] else "not active"
    left = f"\nleft as they are: {', '.join(adapter['left_alone'])}" if adapter["left_alone"] else ""
    title = f"adapter {name!r} ({adapter['method']}, {state}):\n"
    return title + anatomy.table(("tower", "parameters", "trained"), rows) + left


def examine(model: nn.Module | str | Path, adapter: str | Path | None = None, **kwargs: Any) -> Report:
    """Look at a model, and at an adapter for it.

    Args:
        model: A model (a wrapped one too), or a folder or Hub id, of which the config alone is read.
        adapter: A folder or Hub id.
        kwargs: Of the adapter: revision, subfolder, token.
    """
    report = Report()
    _versions(report)
    built = _model(report, model)
    if built is not None:
        _towers(report, built)
        report.methods = {method.title: _would_match(built, method) for method in METHODS.values()}
        if isinstance(anatomy.unwrapped(built), PeftModel):
            _adapters(report, anatomy.unwrapped(built))
    if adapter is not None:
        _adapter(report, built, adapter, kwargs)
    return report


def _versions(report: Report) -> None:
    report.versions = {PACKAGE: __version__}
    wanted: dict[str, Requirement] = {}
    with suppress(metadata.PackageNotFoundError):  # it runs from its sources
        wanted = {r.name: r for r in map(Requirement, metadata.requires(PACKAGE) or ()) if r.marker is None}
    for name in CHECKED:
        try:
            report.versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            report.problem(f"{name} is not installed.", f'pip install "{wanted.get(name, name)}"')
            continue
        needed = wanted.get(name)
        if needed is not None and not needed.specifier.contains(report.versions[name], prereleases=True):
            report.problem(
                f"{name} {report.versions[name]} is installed, {needed} is needed.", f'pip install -U "{needed}"'
            )


def _model(report: Report, model: nn.Module | str | Path) -> nn.Module | None:
    if isinstance(model, nn.Module):
        return model
    name = str(model)
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever a model's own code says to its config
        report.problem(
            f"{name!r} is no model that transformers can read: {_one_line(error)}",
            "Name a folder with a config.json or a Hub id; a private one needs `hf auth login`.",
        )
        return None
    model_class = _class_of(report, config)
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            if model_class is None:
                return transformers.AutoModel.from_config(config, trust_remote_code=False)
            return model_class(config)
    except Exception as error:  # as above
        report.problem(
            f"{model_class.__name__ if model_class else config.model_type} can't be built from the config of {name!r}: "
            f"{_one_line(error)}",
            f"transformers is {transformers.__version__}; the config was written by {config.transformers_version}.",
        )
        return None


def _class_of(report: Report, config: Any) -> Any:
    """The model's class; None where the config names none, and what its `model_type` stands for has to do."""
    named = config.architectures
    if not named:
        return None
    name = named[0] if isinstance(named, (list, tuple)) else named
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    report.warning(
        f"The config's architectures name {name!r}, which is no model class of transformers {transformers.__version__}; what "
        f"is looked at is the plain model of type {config.model_type!r}.",
        "Upgrade transformers, or correct architectures; a class of your own: peft_multimodal.doctor.examine(model).",
    )
    return None


def _empty_twin(model: nn.Module) -> Any:
    """A model like this one, without weights and without adapters: what is tried out on it, this one doesn't see."""
    base: Any = anatomy.base_model(model)
    with torch.device("meta"):
        return type(base)(copy.deepcopy(base.config))


def _would_match(model: nn.Module, method: Method) -> dict[str, Any]:
    try:
        with warnings.catch_warnings(action="ignore"):
            places = Counter(f"{site.tower} {site.kind}" for site in matched_modules(model, method.smallest()))
    except ValueError as error:
        return {"fits": False, "places": {}, "reason": _one_line(error)}
    return {"fits": True, "places": dict(places), "reason": None}


def _adapter(report: Report, model: nn.Module | None, name: str | Path, kwargs: dict[str, Any]) -> None:
    try:
        folder = find_adapter(name, **kwargs)
        written = check_files(folder)
        report.adapter = {key: written.get(key) for key in ("peft_type", "base_model_name_or_path", "peft_version")}
        with warnings.catch_warnings(action="ignore"):
            config = PeftConfig.from_pretrained(str(name), **kwargs)
    except AdapterError as error:
        return report.problem(error.what, error.way_out)
    except (ValueError, *UNCLEAR) as error:
        return report.problem(
            f"The config of {str(name)!r} is refused: {_one_line(error)}", "Correct the value, or save it again."
        )
    if not isinstance(config, MultimodalConfig):
        return report.warning(
            f"{str(name)!r} is an adapter of {written['peft_type']}, which is PEFT's own and not looked at here.",
            "It loads by PEFT's PeftModel.from_pretrained. Would a server load it? --serve vllm looks at any LoRA.",
        )
    report.adapter["format"] = {
        "version": config.format_version,
        "package": config.package_version,
        "newest": FORMAT_VERSION,
    }
    for package, then in (("peft", config.peft_version), (PACKAGE, config.package_version)):
        if _newer(then, report.versions.get(package)):
            report.warning(
                f"The adapter was saved with {package} {then}, which is newer than {report.versions[package]} here.",
                f"{INSTALL} in newer sources of {PACKAGE}" if package == PACKAGE else f"pip install -U {package}",
            )
    if model is None:
        return None
    try:
        options: dict[str, Any] = {"low_cpu_mem_usage": True, "is_trainable": True, **kwargs}
        with warnings.catch_warnings(action="ignore"):
            loaded = PeftModel.from_pretrained(_empty_twin(model), str(name), **options)
    except (ValueError, OSError, *UNCLEAR) as error:
        report.adapter["fits"] = False
        base_name = report.adapter["base_model_name_or_path"]
        return report.problem(
            f"The adapter doesn't fit: {_one_line(error)}",
            f"It was trained on {base_name!r}." if base_name else "Load the base that it was trained on.",
        )
    report.adapter["fits"] = True
    return _adapters(report, loaded)


def _towers(report: Report, model: nn.Module) -> None:
    """The model's towers; what is trained in one are parameters of its own and of adapters."""
    found, base = anatomy.describe(model), anatomy.base_model(model)
    adapters = [_by_tower(base, name) for name in getattr(anatomy.unwrapped(model), "peft_config", {})]
    modules = anatomy.own_modules(base)
    report.model = found.model_class
    for t in found.towers:
        own = {p for path, m in modules.items() if anatomy.is_below(path, t.path) for p in m.parameters(recurse=False)}
        trained = _counts(own.union(*(towers.get(t.name, ()) for towers in adapters)))["trained"]
        sizes = {"attentions": t.attentions, "width": t.hidden_size, "parameters": t.parameters, "trained": trained}
        report.towers.append({"name": t.name, "path": t.path, **sizes})
    if not found.towers:
        report.problem(
            f"{found.model_class} has no tower that is known: nothing reads pixels or tokens.",
            "Name a vision-language model, or one of its towers.",
        )


def _counts(parameters: Collection[nn.Parameter]) -> dict[str, int]:
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
    }


def _by_tower(model: nn.Module, *adapter_names: str) -> dict[str, list[nn.Parameter]]:
    """{tower: the parameters that adapters have in it}; of those that all towers share, "shared"."""
    towers: dict[str, list[nn.Parameter]] = {}
    roots = {t.path: t.name for t in anatomy.describe(model).towers}
    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if isinstance(layer, MultimodalLayer):
            tower = layer.role.partition(".")[0] or "shared"
        else:  # of a method of PEFT's own
            inside = [(len(root), name) for root, name in roots.items() if anatomy.is_below(path, root)]
            tower = max(inside)[1] if inside else "other"
        containers = [getattr(layer, name, None) for name in layer.adapter_layer_names]
        parameters = [p for container in containers for name in adapter_names for p in _parameters(container, name)]
        if parameters:
            towers.setdefault(tower, []).extend(parameters)
    return towers


def _adapters(report: Report, model: PeftModel) -> None:
    """What a model's adapters hold, and towers in which one has no parameter that trains while elsewhere it has."""
    base, attending = anatomy.base_model(model), [t.name for t in anatomy.describe(model).towers if t.attentions]
    for name, config in model.peft_config.items():
        counts = {tower: _counts(held) for tower, held in _by_tower(base, *layer_names(config, name)).items()}
        method = method_of(config)
        report.adapters[name] = {
            "method": method.title if method else str(getattr(config.peft_type, "value", config.peft_type)),
            "active": name in model.active_adapters,
            "towers": counts,
            "left_alone": [tower for tower in attending if tower not in counts] if counts else [],
        }
        if method is None:
            continue
        if fault := fault_of_saving(model, name):
            report.problem(fault)
        trains = {tower: bool(n["trained"]) for tower, n in counts.items() if tower != "shared"}
        frozen = [tower for tower, does in trains.items() if not does]
        if frozen and any(trains.values()):
            report.warning(
                f"In the {' and '.join(frozen)} tower no parameter of adapter {name!r} trains, elsewhere they do.",
                "If that is an accident, set requires_grad on them again, or wrap the model again.",
            )
        elif frozen and not config.inference_mode:
            report.warning(
                f"No parameter of adapter {name!r} trains.",
                f"To train it: model.set_adapter({name!r}), or load it with is_trainable=True.",
            )


def _parameters(container: Any, name: str) -> Iterator[nn.Parameter]:
    if isinstance(container, (nn.ModuleDict, nn.ParameterDict)) and name in container:
        item: Any = container[name]
        yield from item.parameters() if isinstance(item, nn.Module) else [item]


def _newer(then: str | None, now: str | None) -> bool:
    try:
        return bool(then and now) and Version(str(then).partition("@")[0]) > Version(str(now))
    except InvalidVersion:
        return False


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
