"""An adapter's tensors between a model and a file: gathered under roles, and fitted into a model that has all of them.

Nothing here changes a model before every tensor of the file has been found to fit.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from . import anatomy
from .config import MultimodalConfig
from .modules import without_wrappers
from .storage import known_here

_PREFIX = "base_model.model."  # PEFT's, of every key in a file
_WHOLE = re.compile(r"modules_to_save\.[^.]+\.")


class WeightsDontFit(ValueError):
    """An adapter's file holds other tensors than the adapter has. Nothing was written."""


# --- from a model to a file ------------------------------------------------------------------------------------------


def checkpoint_keys(model: nn.Module, layer_cls: Any, adapter_name: str) -> dict[str, str]:
    """{key in the adapter's file: key in the model} for every tensor of an adapter.

    `model.vision_tower.layers.3.self_attn.q_proj.<prefix>P_norm.default` is stored as
    `base_model.model.vision.q.3.<prefix>P_norm`: no module path, no adapter name.
    """
    keys: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, layer_cls):
            continue
        path = without_wrappers(path)
        for container_name in module.adapter_layer_names + module.other_param_names:
            container = getattr(module, container_name)
            if not isinstance(container, (nn.ModuleDict, nn.ParameterDict)) or adapter_name not in container:
                continue
            item = container[adapter_name]
            inside = [""] if isinstance(item, Tensor) else [f".{name}" for name in item.state_dict()]
            role = f"{module.role}." if module.role else ""
            for tail in inside:
                model_key = ".".join(filter(None, (path, container_name, adapter_name))) + tail
                keys[f"{_PREFIX}{role}{container_name}{tail}"] = model_key
    return keys


def gathered(
    tuner: Any, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What an adapter's file holds of the model's state dict; `tuner` is the class of the method's model."""
    state_dict = {without_wrappers(key): value for key, value in state_dict.items()}
    keys = tuner.checkpoint_keys(model, adapter_name)
    if not state_dict.keys() >= set(keys.values()):
        # PEFT has dropped keys that contain another adapter's name, which may be a part of a module path.
        state_dict = {without_wrappers(key): value for key, value in model.state_dict().items()} | state_dict
    tensors = {stored: state_dict[key] for stored, key in keys.items()}
    for stored, value in tensors.items():
        if stored.endswith(tuner.scalars) and not hasattr(value, "full_tensor"):  # a shard keeps its dimension
            tensors[stored] = value.reshape(())
    return _Gathered(tensors, config, state_dict if tuner.owns_token_rows else ())


class _Gathered(dict[str, Tensor]):
    """An adapter's tensors, to which PEFT adds what else is saved: modules, and embeddings where the base was resized.

    To see whether it was, PEFT asks the Hub for the base's config, unless the base is named by a folder. Until PEFT asks for
    the last of the tensors, or has dropped them, the config therefore names the folder of the cache that holds this config,
    or no base.

    Args:
        of_model: Names of the model's tensors, where none of them may be added. Parts that are saved whole
            (`modules_to_save`) come under names of the file's, embeddings under the model's.
    """

    def __init__(self, tensors: dict[str, Tensor], config: MultimodalConfig, of_model: Collection[str]) -> None:
        super().__init__(tensors)
        self._of_model = of_model
        base = config.base_model_name_or_path
        self._show_base = weakref.finalize(self, setattr, config, "base_model_name_or_path", base)
        config.base_model_name_or_path = known_here(base)

    def update(self, other: Any) -> None:  # type: ignore[override]
        super().update({k: v for k, v in other.items() if without_wrappers(k) not in self._of_model})

    def items(self) -> Any:  # the last thing that PEFT asks for
        self._show_base()
        return super().items()


# --- from a file to a model ------------------------------------------------------------------------------------------


def fitted(
    tuner: Any, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A file's tensors under the model's names.

    Args:
        tuner: The class of the method's model.
        state_dict: Of the file; what is saved whole beside the adapter has the model's names already.

    Raises:
        WeightsDontFit: one is missing, is one too many, or has another shape, another kind of numbers, or NaN.
    """
    present = model.state_dict()
    real = {without_wrappers(key): key for key in present}  # parts of the model may be compiled
    expected = {stored: real[key] for stored, key in tuner.checkpoint_keys(model, adapter_name).items()}
    stored, others = {}, {}
    for key, value in state_dict.items():
        canonical = _PREFIX + key.removeprefix(_PREFIX)
        if canonical in expected:
            stored[canonical] = value[None] if canonical.endswith(tuner.scalars) and not value.ndim else value
        else:
            others[key] = value
    problems = [f"missing: {_some(expected.keys() - stored.keys())}"] if expected.keys() - stored.keys() else []
    if extra := [k for k in others if k not in present and _PREFIX + k not in present]:
        problems.append(f"not of this adapter: {_some(extra)}")
    for key, value in stored.items():
        problems += _faults(_short(key), value, present[expected[key]])
    others = {key if key in present else _PREFIX + key: value for key, value in others.items()}
    buffers = {key for key, _ in model.named_buffers(remove_duplicate=False)}
    for key, value in others.items():
        if key in present:
            problems += _faults(_WHOLE.sub("", _short(key)), value, present[key], key not in buffers)
    if problems:
        way_out = _resize(model, others)
        if expected and not stored:
            way_out = (
                " None of its keys is this method's: if a Trainer resumes here, give each run an output_dir of its own."
            )
        base = config.base_model_name_or_path or "unknown"
        listed = problems[:6] + ([f"and {len(problems) - 6} more"] if len(problems) > 6 else [])
        raise WeightsDontFit(
            f"The weights don't fit adapter {adapter_name!r} ({config.peft_type.value}, trained on {base!r}); nothing was "
            f"loaded. {'; '.join(listed)}. Load it into the model it was trained on, with the config it was saved with.{way_out}"
        )
    result = {expected[key]: value for key, value in stored.items()} | _copied(model, others)
    return result | _not_missing(model, tuner.prefix, adapter_name, result)


def _faults(key: str, value: Tensor, wanted: Tensor, trained: bool = True) -> Iterator[str]:
    """What is wrong with a stored tensor that shall take a place in a model; a buffer may hold -inf, as a mask does."""
    if tuple(value.shape) != tuple(wanted.shape):
        yield f"{key} has shape {tuple(value.shape)}, the model needs {tuple(wanted.shape)}"
    elif value.is_floating_point() != wanted.is_floating_point():
        yield f"{key} holds {value.dtype}, the model needs {wanted.dtype}"
    elif trained and value.is_floating_point() and not value.is_meta and not bool(torch.isfinite(value).all()):
        yield f"{key} holds NaN or infinite values"


@torch.no_grad()
def _copied(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write tensors into parameters of a model where they stand; returns what to hand to `load_state_dict`.

    `load_state_dict(assign=True)` would put the file's tensors in place of the parameters: in the file's dtype, and no longer
    tied to what they were tied to.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    handed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        parameter = parameters.get(key)
        plain = type(parameter) is nn.Parameter and not parameter.is_meta and not value.is_meta
        if parameter is not None and plain and parameter.shape == value.shape:
            parameter.copy_(value)
            handed[key] = parameter
        else:  # sharded, or not there yet
            handed[key] = value
    return handed


def _not_missing(model: nn.Module, prefix: str, adapter_name: str, loaded: Collection[str]) -> dict[str, Tensor]:
    """What PEFT would take for missing keys of an adapter: other parts whose names contain the adapter's.

    They are given back as they are: a frozen encoder's weights, those of other adapters, and all of a method's for an
    adapter that is called like a piece of its prefix.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    kept = model.state_dict().keys() - set(loaded)
    return {key: value for key, value in tensors.items() if key in kept and prefix in key and adapter_name in key}


def _resize(model: nn.Module, others: dict[str, Tensor]) -> str:
    """The way out where a file holds embeddings of another size than the model's."""
    with suppress(AttributeError, NotImplementedError):  # no model of transformers, or one without token embeddings
        rows, present = anatomy.base_model(model).get_input_embeddings().num_embeddings, model.state_dict()
        for key, value in others.items():
            mine = present[key].shape if key in present else ()
            if mine[:1] == (rows,) and value.shape[1:] == mine[1:] and len(value) != rows:
                return f" The base was resized then: model.resize_token_embeddings({len(value)}) before loading."
    return ""


def _short(key: str) -> str:
    return key.removeprefix(_PREFIX)


def _some(keys: Collection[str]) -> str:
    names = sorted(_short(k) for k in keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
