"""What files can bring back: checked before a model is changed, and before anything is written into it.

An adapter of this package is stored under roles, which no wrapper moves. PEFT's own adapters, and whatever is trained as a
whole (`modules_to_save`), are stored under their modules' paths: a layer put around such a module later makes its file
one that doesn't load.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import SafetensorError, safe_open
from torch import nn

from . import anatomy
from .companions import TASK_HEADS, record_of
from .config import MultimodalConfig
from .parts import MultimodalLayer
from .registry import METHODS

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


# --- adapters of several kinds on one model --------------------------------------------------------------------------


def check_below(outer: nn.Module, model: nn.Module) -> None:
    """Refuse to wrap `outer`, a PeftModel around `model`, where that would leave its adapters behind in part."""
    if isinstance(model, PeftModel):
        raise ValueError(
            f"{_kinds(outer)} was put around a PeftModel, and its files then name modules inside of that: under another "
            "adapter they wouldn't load again. Make or load the adapters of this package first and that one last."
        )
    if path := _trained_tokens(model):
        raise ValueError(
            f"{path} has rows that an adapter trains (trainable_token_indices), and PEFT then can't save any adapter that doesn't. "
            "Merge it first, model = model.merge_and_unload(), or train whole embeddings by its modules_to_save."
        )
    if outer is model:
        return
    path = next((name for name, module in outer.named_modules() if module is model), "")
    if lost := [key for key in outer.state_dict() if not key.startswith(f"{path}.")]:
        raise ValueError(
            f"{_kinds(outer)} keeps weights outside the model's layers ({lost[0]}, ...), which another PeftModel neither saves nor "
            f"runs. Merge it first, model = model.merge_and_unload(), or use {_mergeable()} in its place."
        )


def check_around(model: nn.Module, paths: Collection[str], layer_cls: type[MultimodalLayer], method: str) -> None:
    """Refuse to put layers around modules with something that is stored under its path."""
    kinds = getattr(model, "peft_config", {})
    biases = [name for name, config in kinds.items() if getattr(config, "bias", None) == "all"]
    for path in paths:
        module = model.get_submodule(path)
        if isinstance(module, layer_cls):
            continue  # it has its layer: nothing moves
        for below, inner in module.named_modules():
            names = _stored_by_path(inner) or (biases if getattr(inner, "bias", None) is not None else [])
            if names:
                place = f"{path}.{below}" if below else path
                first = names[0]
                kind = kinds[first].peft_type.value if first in kinds else "PEFT"
                raise ValueError(
                    f"{place} belongs to adapter {first!r} ({kind}), which is stored by its modules' paths. {method} would put a "
                    f"layer around {path}, and what save_pretrained then writes of {first!r} could not be loaded again. Leave these "
                    f"modules to one of the two, merge {first!r} first (model = model.merge_and_unload()), or use a method of this "
                    "package in its place: their files name no modules."
                )


def _stored_by_path(module: nn.Module) -> list[str]:
    """The adapters that a module holds under its path."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return sorted(module._adapters)
    if isinstance(module, BaseTunerLayer) and not isinstance(module, MultimodalLayer):
        return sorted(module._get_available_adapters()) or [type(module).__name__]
    return []


def _trained_tokens(model: nn.Module, adapter_name: str | None = None) -> str | None:
    """Path of an embedding whose rows other adapters than this one train."""
    wrappers = ((path, m) for path, m in model.named_modules() if isinstance(m, TrainableTokensWrapper))
    return next((path for path, m in wrappers if adapter_name not in m._adapters), None)


def _kinds(outer: nn.Module) -> str:
    configs = getattr(outer, "peft_config", {})
    return " and ".join(f"adapter {name!r} ({config.peft_type.value})" for name, config in configs.items())


def _mergeable() -> str:
    """The methods that are weight updates alone."""
    return " or ".join(["LoRA", *(m.title for m in METHODS.values() if m.model.not_mergeable is None)])


def fault_of_saving(model: nn.Module, adapter_name: str) -> str | None:
    """Why a wrapped model can't save an adapter of this package; None where it can."""
    config: Any = getattr(model, "peft_config", {})[adapter_name]
    inside: Any = anatomy.base_model(model)
    if isinstance(inside, PeftModel) and (names := modules_of(config)):
        return (
            f"Adapter {adapter_name!r} trains modules_to_save={names}, and another adapter was put around its PeftModel "
            f"({_others(model, adapter_name)}): PEFT then switches these modules off, and would save them under names that don't "
            f"load. Save it by the PeftModel that it was made by, selected_adapters=[{adapter_name!r}], and put the methods of "
            "this package around PEFT's own adapters, not under them."
        )
    if path := _trained_tokens(model, adapter_name):
        return (
            f"Another adapter ({_others(model, adapter_name)}) trains rows of {path} (trainable_token_indices), and PEFT then can't "
            f"save {adapter_name!r}, which doesn't: selected_adapters=[...] saves that one alone. Save {adapter_name!r} before the "
            "other one is put around it, or train whole embeddings there by modules_to_save."
        )
    return None


def _others(model: Any, adapter_name: str) -> str:
    return ", ".join(f"{n!r}: {c.peft_type.value}" for n, c in model.peft_config.items() if n != adapter_name)


# --- modules that are trained and saved as a whole -------------------------------------------------------------------


def modules_of(config: Any) -> list[str]:
    """`modules_to_save` without the heads that PEFT adds unasked."""
    return [name for name in config.modules_to_save or () if name not in TASK_HEADS.get(config.task_type, ())]


def check_modules_to_save(model: nn.Module, config: MultimodalConfig) -> None:
    """Refuse names that PEFT would pass over in silence, or stumble over when half of the adapter is made."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in modules_of(config):
        matched = {path: module for path, module in modules.items() if path.endswith(name)}
        if not matched and name in _wholes_in_file(config):
            continue  # an older file may name what never was; what it holds is checked as it is loaded
        if not matched:
            raise ValueError(_no_such_module(model, modules, name))
        for path, module in matched.items():
            if isinstance(module, _CONTAINERS):
                raise ValueError(
                    f"modules_to_save={name!r} names {path}, a {type(module).__name__}, which is no module that runs. Name its "
                    f"modules: {', '.join(f'{path}.{child}' for child, _ in list(module.named_children())[:3])}, ..."
                )
            if isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer"):
                raise ValueError(
                    f"modules_to_save={name!r} names {path}, which an adapter adapts: it can't be trained as a whole as well. Leave "
                    "it to one of the two."
                )


def without_modules_to_save(model: nn.Module, adapter_name: str, alone: bool = True) -> None:
    """Put the original modules back in the places of those that one adapter trains as a whole.

    Args:
        alone: Only where no other adapter trains them, too.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, ModulesToSaveWrapper) or adapter_name not in child._adapters:
                continue
            if not alone or set(child._adapters) == {adapter_name}:
                setattr(parent, name, child.original_module)


def _no_such_module(model: nn.Module, modules: Mapping[str, nn.Module], name: str) -> str:
    whole = [path for path, _ in model.named_parameters() if path == name or path.endswith(f".{name}")]
    if whole:
        return (
            f"modules_to_save={name!r} names a bare parameter ({whole[0]}), and PEFT saves modules alone. To train it: "
            f"model.get_base_model().{whole[0]}.requires_grad_(True) after get_peft_model. No adapter file holds it: keep its "
            "value beside the adapter, and set it again after loading."
        )
    leaves = list(dict.fromkeys(path.rpartition(".")[2] for path in modules if not path.rpartition(".")[2].isdigit()))
    close = difflib.get_close_matches(name.rpartition(".")[2], leaves, n=1)
    top = ", ".join(child for child, _ in model.named_children())
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"modules_to_save={name!r}: {type(model).__name__} has no module of this name.{meant} At its top there are {top}; "
        "[name for name, _ in model.named_modules()] lists all."
    )


# --- what a file holds -----------------------------------------------------------------------------------------------


def check_file_has_modules(model: nn.Module, config: MultimodalConfig) -> None:
    """Refuse a file that lacks the modules which its config says it holds: PEFT meets them one by one, as a KeyError."""
    names = [name for name in modules_of(config) if name in _wholes_in_file(config)]
    keys = _keys_of(config) if names else None
    if keys is None:
        return
    for name in names:
        for path, module in model.named_modules(remove_duplicate=False):
            whole = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
            tensors = whole.state_dict() if path.endswith(name) else ()
            if missing := [t for t in tensors if not any(key.endswith(f"{name}.{t}") for key in keys)]:
                raise ValueError(
                    f"The adapter's config says modules_to_save={names}, but its {SAFETENSORS_WEIGHTS_NAME} has no "
                    f"{path}.{missing[0]}. Restore the file from where it was saved."
                )


def _keys_of(config: MultimodalConfig) -> list[str] | None:
    """The keys of the file beside a loaded config; None where there is none here, or it can't be read."""
    origin = record_of(config).origin
    if origin is None:
        return None
    with suppress(OSError, SafetensorError), safe_open(origin.folder / SAFETENSORS_WEIGHTS_NAME, "pt") as tensors:
        return list(tensors.keys())
    return None


def _wholes_in_file(config: MultimodalConfig) -> tuple[str, ...]:
    """The `modules_to_save` of the file that a config was read from."""
    origin = record_of(config).origin
    return () if origin is None else origin.modules_to_save


# --- the base's name -------------------------------------------------------------------------------------------------


def is_hub_id(name: Any) -> bool:
    """Whether a name can be a repository's, and is no path of a file or folder here."""
    if not isinstance(name, str) or not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def known_here(base: str | None) -> str | None:
    """A folder on this machine with the config of a base model; None where there is none.

    PEFT compares the sizes of vocabularies by it when an adapter is saved, and asks the Hub where it isn't named a folder.
    """
    if not base or Path(base, "config.json").is_file():
        return base
    with suppress(HFValidationError):
        cached = try_to_load_from_cache(base, "config.json")
        if isinstance(cached, str):
            return str(Path(cached).parent)
    return None
