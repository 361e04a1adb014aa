"""CP factors out of what is there: a LoRA compressed, several adapters added up, the frozen weights' own factors."""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...core.anatomy import is_linear, unwrap
from .algebra import CompressionErrors, least_rank, parafac
from .layers import AuroraMatrixLayer, matrix_layers

ACCEPTABLE = 0.3  # relative error of a compressed LoRA's updates, all together


def stacks(
    layers: Mapping[str, AuroraMatrixLayer], adapter_name: str, weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, list[tuple[AuroraMatrixLayer, int]], Tensor]]:
    """For every group of factors: its name, the (layer, row of P) of its matrices, and these: N x d_out x d_in.

    Both arguments are by module path; a module's weights lie one below the other.
    """
    rows: dict[str, list[tuple[AuroraMatrixLayer, int]]] = defaultdict(list)
    matrices: dict[str, list[Tensor]] = defaultdict(list)
    for path, layer in layers.items():
        start = 0
        for group, first, end in layer.slices[adapter_name].blocks:
            d_out = len(layer.factors.aurora_mode_approx_V[adapter_name][group])
            for index in range(first, end):
                rows[group].append((layer, index))
                matrices[group].append(weights[path][start : start + d_out].float())
                start += d_out
    for group in rows:
        yield group, rows[group], torch.stack(matrices[group])


@torch.no_grad()
def inherit(model: nn.Module, adapter_name: str, rank: int) -> None:
    """Set U and P by a CP decomposition of the frozen weights; V stays 0, so that the outputs do too."""
    layers = matrix_layers(model, adapter_name)
    weights = {path: torch.cat(layer.base_weights()) for path, layer in layers.items()}
    for group, rows, stack in stacks(layers, adapter_name, weights):
        _, (P, _, U) = parafac(stack, rank, iterations=10, starts=("random",))
        P = P / P.square().mean().sqrt().clamp_min(1e-12)
        rows[0][0].factors.U(adapter_name, group).copy_(U / U.norm(dim=0) * math.sqrt(1 / rank))
        write_rows(adapter_name, rows, P)


def write_rows(adapter_name: str, rows: list[tuple[AuroraMatrixLayer, int]], P: Tensor) -> None:
    for (layer, index), row in zip(rows, P, strict=True):
        layer.aurora_mode_approx_P_norm[adapter_name][index].copy_(row)


@torch.no_grad()
def from_lora(model: PeftModel, config: Any, adapter_name: str, iterations: int) -> tuple[PeftModel, CompressionErrors]:
    """See `AuroraModeApproxModel.from_lora`."""
    updates = lora_updates(model, adapter_name)
    if config.core != "cp":
        raise ValueError("from_lora makes CP factors: use core='cp'.")
    config = copy.copy(config)
    config.target_modules, config.alpha = sorted(updates), None
    bare: Any = model.unload()
    compressed: Any = get_peft_model(bare, config, adapter_name=adapter_name)
    layers = matrix_layers(compressed.base_model.model, adapter_name)
    groups = list(stacks(layers, adapter_name, updates))
    for group, rows, stack in groups:
        if not stack.any():  # an untrained part of the LoRA: V stays 0
            continue
        weights, (P, V, U) = parafac(stack, config.r, iterations, starts=("svd", "random", "random"))
        factors = rows[0][0].factors
        factors.U(adapter_name, group).copy_(U)
        factors.aurora_mode_approx_V[adapter_name][group].copy_(V)
        factors.aurora_mode_approx_lambda_norm[adapter_name][group].copy_(weights)
        write_rows(adapter_name, rows, P)
    errors = CompressionErrors()
    for path, layer in layers.items():
        update = updates[path].float()
        errors.add(path, float((layer.get_delta_weight(adapter_name) - update).norm()), float(update.norm()))
    if errors.total > ACCEPTABLE:
        needed = max(config.r + 1, *(least_rank(stack, ACCEPTABLE) for _, _, stack in groups))
        warnings.warn(
            f"r={config.r} is too small for this LoRA: {errors}. An error of {ACCEPTABLE} needs r={needed} at least. Take a "
            "larger r, or train on from here.",
            stacklevel=4,
        )
    return compressed, errors


def lora_updates(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """{module path: update, d_out x d_in} of a LoRA; ValueError if it holds anything else."""
    base: Any = model.get_base_model()
    layers: dict[str, Any] = {
        path: module
        for path, module in base.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module._get_available_adapters()
    }
    if not layers:
        raise ValueError(f"The model has no LoRA adapter {adapter_name!r}.")
    lora: Any = model.peft_config[adapter_name]
    lost = [path for path, module in layers.items() if not is_linear(unwrap(module))]
    lost += list(lora.modules_to_save or ()) + ["DoRA's magnitudes"] * lora.use_dora
    lost += ["biases"] * (lora.bias != "none")
    if lost:
        raise ValueError(f"CP factors hold updates of linear layers alone; this LoRA also has: {', '.join(lost)}.")
    updates = {path: module.get_delta_weight(adapter_name) for path, module in layers.items()}
    return {path: d.t() if isinstance(unwrap(layers[path]), Conv1D) else d for path, d in updates.items()}


def check_addable(
    model: nn.Module, configs: Mapping[str, Any], adapters: list[str], weights: list[float], adapter_name: str,
    combination_type: str,
) -> None:  # fmt: skip
    """Refuse a sum of adapters that CP factors can't hold; `configs` is {adapter: config} of all that there are."""
    if combination_type not in ("sum", "cat"):
        raise ValueError(
            f"combination_type={combination_type!r} isn't supported: Aurora adds updates up exactly, by factors side by "
            'side. Leave it out, or pass "sum" or "cat".'
        )
    if unknown := [a for a in adapters if a not in configs]:
        raise ValueError(f"No such adapter: {unknown}. There are {list(configs)}.")
    if len(adapters) != len(weights) or not adapters or adapter_name in configs:
        raise ValueError("add_weighted_adapter takes as many weights as adapters, at least one, and a new name.")
    blocks = [{p: layer.slices[a].blocks for p, layer in matrix_layers(model, a).items()} for a in adapters]
    summands = [configs[a] for a in adapters]
    if any(b != blocks[0] for b in blocks) or any(c.core != "cp" or c.use_gqt or c.use_ice for c in summands):
        raise ValueError(
            "Only CP adapters over the same modules with the same sharing can be added up, and without GQT or ICE, "
            "which are no weight updates."
        )
    if whole := sorted({name for c in summands for name in c.modules_to_save or ()}):
        raise ValueError(
            f"The adapters train whole modules beside them (modules_to_save: {', '.join(whole)}), which are no weight "
            "updates and can't be added up. Add up adapters that were trained without modules_to_save."
        )


@torch.no_grad()
def write_sum(model: nn.Module, adapter_name: str, summands: list[tuple[str, float, float]]) -> None:
    """Put the factors of several adapters side by side into another one's; a summand is (adapter, weight, its s)."""
    layers = matrix_layers(model, adapter_name).values()
    for factors in {id(layer.factors): layer.factors for layer in layers}.values():
        for name in ("U", "V", "lambda_norm"):
            store = getattr(factors, f"aurora_mode_approx_{name}")
            for group, total in store[adapter_name].items():
                factor = [store[a][group] * w * s if name == "lambda_norm" else store[a][group] for a, w, s in summands]
                total.copy_(torch.cat(factor, dim=-1))
    for layer in layers:
        P = layer.aurora_mode_approx_P_norm
        P[adapter_name].copy_(torch.cat([P[a] for a, _, _ in summands], dim=-1))
