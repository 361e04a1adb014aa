"""Modules and their paths: what is wrapped around a module, where it computes, and which layer it lies in."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D


def unwrap(module: Any) -> Any:
    """The base layer below any PEFT layers."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def is_linear(module: nn.Module) -> bool:
    """Whether the module is `y = x W^T + b`: `nn.Linear` (and its quantised subclasses) or transformers' `Conv1D`."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_matrix(module: nn.Module) -> bool:
    """Whether the module applies weight matrices, rather than being made of modules that do."""
    return is_linear(module) or isinstance(module, nn.MultiheadAttention)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    raise TypeError(f"{type(module).__name__} is no linear module")


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of the model itself, without what adapters have attached to it or wrapped around whole layers.

    A path is the one that the module has without adapters; `model.get_submodule(path)` finds it either way.
    """
    found: dict[str, nn.Module] = {}
    attached: list[str] = []
    wrappers: list[str] = []
    for path, module in model.named_modules():
        for wrapper in wrappers:
            if path.startswith(f"{wrapper}."):
                path = path.replace(f"{wrapper}.base_layer", wrapper, 1)
        if isinstance(module, BaseTunerLayer) and not hasattr(module, "base_layer"):
            attached.append(path + ".")
        elif isinstance(module, BaseTunerLayer) and not is_matrix(unwrap(module)):
            wrappers.append(path)
            attached += [f"{path}.{name}" for name in module.adapter_layer_names]
        elif not path.startswith(tuple(attached)):
            found[path] = module
            if isinstance(module, BaseTunerLayer):
                attached += [f"{path}.{name}" for name in module.adapter_layer_names]
    return found


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: its parameters' device; of offloaded ones that to which accelerate brings them."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    for part in module.modules() if device.type == "meta" else ():
        hook = getattr(part, "_hf_hook", None)
        for found in getattr(hook, "hooks", [hook]):
            if (there := getattr(found, "execution_device", None)) is not None:
                return torch.device(there)
    return device


def dtype_of(module: nn.Module) -> torch.dtype:
    """What a module computes in: its parameters' dtype; float32 where torch's quantisation has packed them all."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def base_model(model: Any) -> Any:
    """The Hugging Face model inside a `PeftModel` or a tuner, whatever is wrapped around them, or the model itself."""
    model = unwrapped(model)
    if isinstance(model, PeftModel) and not model.peft_config:  # its last adapter is deleted: PEFT asks for one
        return unwrapped(getattr(model.base_model, "model", model.base_model))
    return unwrapped(model.get_base_model()) if hasattr(model, "get_base_model") else model


def unwrapped(model: Any) -> Any:
    """The model inside what `torch.compile`, DistributedDataParallel and FSDP wrap around it, or the model itself."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, nn.Module):
        names = ("module",) if isinstance(model, parallel) else ("_orig_mod", "_fsdp_wrapped_module")
        inner = next((model._modules[name] for name in names if name in model._modules), None)
        if inner is None:
            break
        model = inner
    return model


def is_below(path: str, root: str) -> bool:
    """Whether a module path equals `root` or lies under it."""
    return not root or path == root or path.startswith(root + ".")


# --- paths ---------------------------------------------------------------------------------------------------------


def without_wrappers(name: str) -> str:
    """A module's or parameter's name without those of wrappers: FSDP's, `torch.compile`'s, torch's checkpointing's."""
    return re.sub(r"(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.", "", name)


def layer_of(path: str) -> str | None:
    """Path of the numbered layer that a module lies in: `encoder.layer.3.attention.self` -> `encoder.layer.3`."""
    match = re.match(r"(.*\.\d+)\.", path + ".")
    return match.group(1) if match else None


def stack_of(path: str) -> str:
    """Path of the stack of layers that a module lies in."""
    layer = layer_of(path)
    first = re.match(r"(.*?)\.\d+(\.|$)", layer or "")
    return first.group(1) if first else path.rpartition(".")[0]


def is_cross(path: str) -> bool:
    """Whether an attention reads another sequence than its own, by the name that the library gives such modules."""
    return bool(re.search(r"cross_?att|encoder_attn|encdecattention|cross_attention", path.lower()))
