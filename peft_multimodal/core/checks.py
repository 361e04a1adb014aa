"""What is checked before an adapter is put into a model."""

from __future__ import annotations

import re
import warnings
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .anatomy import Anatomy, Site, is_below, unread_layers, unwrapped
from .storage import check_around
from .switching import SwitchingTuner, tuner_of

# Folders that stand beside the files of an adapter: with its own name for a folder, another one's would lie among them.
COMPANIONS = ("encoder", "tokenizer")


def check_adapter_name(name: str) -> None:
    """Adapters' names are keys of torch's containers, parts of parameters' names, and names of folders."""
    why = ""
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        why = "torch's containers have an attribute of this name"
    elif name in COMPANIONS:
        why = "a folder of this name stands beside an adapter's files"
    elif not re.fullmatch(r"[^\s./\\:\x00]+", name):
        why = "it holds a dot, slash, colon or space, or is empty"
    if why:
        near = re.sub("[^A-Za-z0-9_-]+", "-", name).strip("-") or "default"
        raise ValueError(
            f"adapter_name={name!r} can't be used: {why}. Adapters are called by letters, digits, - and _, such as "
            f"{f'{near}-1' if near == name else near!r}."
        )


def check_bare(model: nn.Module) -> None:
    """Refuse a model that something is wrapped around, which would go on running what was there before."""
    if (bare := unwrapped(model)) is not model:
        kind, name = type(model).__name__, type(bare).__name__
        wrap = "torch.compile" if kind == "OptimizedModule" else kind
        raise ValueError(
            f"{name} is wrapped in {kind}. An adapter goes onto the model itself, and the wrapper around both: make or load the "
            f"adapter first, then {wrap}(model)."
        )


def check_beside(tuner: Any, present: dict[str, Any], config: Any, adapter_name: str) -> None:
    """Refuse what a model's adapters, of earlier calls of `get_peft_model`, leave no room for."""
    for name, other in present.items():
        if name == adapter_name:
            raise ValueError(
                f"The model has an adapter {name!r} already ({other.peft_type.value}). Take it out first by its "
                "PeftModel's unload(), or call the new one otherwise: get_peft_model(model, config, "
                f"adapter_name={name + '-2'!r})."
            )
        theirs = getattr(tuner_of(other), "not_beside", {})
        if reason := tuner.not_beside.get(other.peft_type) or theirs.get(config.peft_type):
            raise ValueError(reason)


def check_reach(tuner: SwitchingTuner, sites: list[Site], wraps: bool) -> None:
    """Refuse modules inside layers that another method has wrapped, and with `wraps` those around what would move."""
    for path, wrapper in tuner.model.named_modules():
        if not isinstance(wrapper, BaseTunerLayer) or not hasattr(wrapper, "base_layer"):
            continue
        inside = next((site.module for site in sites if site.module.startswith(f"{path}.")), None)
        if inside is not None and not isinstance(wrapper, tuner.tuner_layer_cls):
            raise ValueError(
                f"{inside} lies inside a layer that {type(wrapper).__name__} has wrapped, where PEFT puts no adapter. Make or "
                "load this adapter first and the other one after it."
            )
    if wraps:
        method = type(tuner).__name__.removesuffix("Model")
        check_around(tuner.model, list(dict.fromkeys(s.module for s in sites)), tuner.tuner_layer_cls, method)


def check_whole_modules(tuner: SwitchingTuner, config: Any) -> None:
    """Refuse to train a module as a whole that another method trains: one of the two copies alone would act."""
    others = {id(m) for m in tuner.whole_modules(of_others=True)}
    for path, module in tuner.model.named_modules():
        if id(module) in others and path.endswith(tuple(config.modules_to_save or ())):
            raise ValueError(
                f"modules_to_save: {path} is trained by the adapter of another method already, and one copy alone can "
                "act. Leave it out here, or train it with this adapter alone."
            )


def warn_of_unread(model: nn.Module, sites: list[Site], anatomy: Anatomy) -> None:
    """Say which layers of the vision tower get no gradient, as the model reads an earlier one."""
    unread = unread_layers(model, anatomy)
    if not unread or not any(site.tower == "vision" for site in sites):
        return
    adapted = [path for path in unread if any(is_below(site.module, path) for site in sites)]
    names = ", ".join(adapted or unread)
    what = (
        f"The adapter has parts there that won't train; target_modules=None leaves {'them' if len(unread) > 1 else 'it'} out."
        if adapted
        else "The adapter has nothing there."
    )
    warnings.warn(
        f"{anatomy.model_class} reads its image features from an earlier layer of the vision tower (vision_feature_layer in "
        f"its config): {names} gets no gradient. {what}",
        stacklevel=2,
    )
