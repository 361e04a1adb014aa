"""The CP tensor: the factors that all matrices share, and the update that is made of them in a training step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.parts import AttachedPart, MultimodalLayer
from .algebra import cp_slices, tucker_slices


class AuroraModeApproxLayer(MultimodalLayer):
    """Base of everything that this method puts into a model."""


class SharedFactors(AttachedPart, AuroraModeApproxLayer):
    """U, V and lambda (or the Tucker core) of every adapter and group. It hangs below the model, is visited by PEFT as
    a layer, and is the one place of these parameters: layers look them up at each call."""

    adapter_layer_names = (
        "aurora_mode_approx_U",
        "aurora_mode_approx_V",
        "aurora_mode_approx_lambda_norm",  # Trainer gives names that end in `_norm` no weight decay
        "aurora_mode_approx_core",
    )

    aurora_mode_approx_U: Any  # each {adapter: {group: Parameter}}
    aurora_mode_approx_V: Any
    aurora_mode_approx_lambda_norm: Any
    aurora_mode_approx_core: Any

    def add(self, adapter_name: str, r: int, core: str, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Create the factors of an adapter of rank r; `shapes` is {group: (d_in, d_out)}."""
        cp = core == "cp"
        draw = {g: torch.randn(d_in, r) / math.sqrt(d_in) for g, (d_in, _) in shapes.items()}
        if not cp:  # the authors' choice: Linear's own initialisation
            draw = {g: torch.empty(d_in, r).uniform_(-1, 1) / math.sqrt(d_in) for g, (d_in, _) in shapes.items()}
        self.aurora_mode_approx_U[adapter_name] = nn.ParameterDict(draw)
        self.aurora_mode_approx_V[adapter_name] = nn.ParameterDict(
            {g: torch.zeros(d_out, r) for g, (_, d_out) in shapes.items()}
        )
        if cp:
            self.aurora_mode_approx_lambda_norm[adapter_name] = nn.ParameterDict({g: torch.ones(r) for g in shapes})
        else:
            cores = {g: nn.init.xavier_uniform_(torch.empty(r, r, r)) for g in shapes}
            self.aurora_mode_approx_core[adapter_name] = nn.ParameterDict(cores)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """`peft.convert_to_lora` asks every layer, and this one changes no weight: it is in the way of nothing.

        Raises:
            TypeError: the adapter has target_modules=None, which PEFT takes for a set of names.
        """
        config: Any = getattr(self.host(), "peft_config", {}).get(adapter_name)
        if config is not None and config.target_modules is None:
            raise TypeError(
                "peft.convert_to_lora needs an adapter that names its target_modules, and this one takes its method's default "
                "(None). peft_multimodal.export_lora(model, folder) writes it as a LoRA, and exactly."
            )
        return True

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Zeros, as wide as the widest matrix: `peft.convert_to_lora` takes apart what every layer gives."""
        U, V = ([*store[adapter_name].values()] for store in (self.aurora_mode_approx_U, self.aurora_mode_approx_V))
        return U[0].new_zeros(max(map(len, V)), max(map(len, U)))

    def U(self, adapter: str, group: str) -> Tensor:
        """d_in x R."""
        return self.aurora_mode_approx_U[adapter][group]

    def is_tucker(self, adapter: str) -> bool:
        return adapter in self.aurora_mode_approx_core

    def modes(self, adapter: str, group: str, P: Tensor) -> Tensor:
        """V diag(lambda * P_n) (or V G(P_n)^T) for n rows of P, stacked: (n d_out) x R."""
        if self.is_tucker(adapter):
            V = self.aurora_mode_approx_V[adapter][group]
            core = self.aurora_mode_approx_core[adapter][group]
            return torch.einsum("oj,ijk,nk->noi", V.to(P.dtype), core.to(P.dtype), P).flatten(0, 1)
        V, c = self.V_and_modes(adapter, group, P)
        return (c[:, None, :] * V).flatten(0, 1)

    def V_and_modes(self, adapter: str, group: str, P: Tensor) -> tuple[Tensor, Tensor]:
        """V (d_out x R) and lambda * P_n (n x R) of a CP core."""
        return self.aurora_mode_approx_V[adapter][group], self.aurora_mode_approx_lambda_norm[adapter][group] * P

    @torch.no_grad()
    def updates(self, adapter: str, group: str, P: Tensor, scale: float) -> Tensor:
        """The whole s V diag(lambda * P_n) U^T for n rows of P, in float32 or better: n x d_out x d_in."""
        U, V = self.U(adapter, group), self.aurora_mode_approx_V[adapter][group]
        dtype = torch.promote_types(U.dtype, torch.float32)
        P, V, U = P.to(dtype), V.to(dtype), U.to(dtype)
        if self.is_tucker(adapter):
            return tucker_slices(self.aurora_mode_approx_core[adapter][group].to(dtype), P, V, U, scale)
        return cp_slices(scale * self.aurora_mode_approx_lambda_norm[adapter][group].to(dtype), P, V, U)


class AddUpdate(torch.autograd.Function):
    """y + xu W^T with W = V diag(c_n), stacked over n.

    The sum is made in the matrix product, one pass over y less; and W is made again in the backward pass instead of
    being kept for it: it would cost d_out R numbers a matrix, as much as x U itself for short inputs.

    Shapes: y (M, n d_out), xu (M, R), V (d_out, R), c (n, R).
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, xu: Tensor, V: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(xu, V, c)
        return torch.addmm(y, xu, (c[:, None, :] * V).flatten(0, 1).t().to(xu.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        xu, V, c = ctx.saved_tensors
        grad_xu = grad @ (c[:, None, :] * V).flatten(0, 1).to(grad.dtype) if ctx.needs_input_grad[1] else None
        grad_V = grad_c = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            grad_W = (grad.t() @ xu).to(V.dtype).unflatten(0, (len(c), len(V)))
            grad_V, grad_c = (grad_W * c[:, None, :]).sum(0), (grad_W * V).sum(1)
        return grad if ctx.needs_input_grad[0] else None, grad_xu, grad_V, grad_c
