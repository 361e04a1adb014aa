"""Rows of all processes together, with gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """All processes' rows, in their order; in backward each gets the sum of what all of them owe it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.first, ctx.size = dist.get_rank() * len(x), len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad)
        return grad[ctx.first : ctx.first + ctx.size]


def gather_with_gradients(x: Tensor) -> Tensor:
    """(B, ...) of each process -> (processes * B, ...), with gradients; every process has as many rows."""
    return _Gather.apply(x)
