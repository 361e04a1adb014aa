"""The algebra of CP tensors by tensorly: for merging, compressing and inspecting, never in a training step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def pytorch_backend() -> Iterator[None]:
    """tensorly on PyTorch tensors in this thread; unlike tensorly's own context, the process's default is left alone."""
    import tensorly as tl

    before = tl.get_backend()
    tl.set_backend("pytorch", local_threadsafe=True)
    try:
        yield
    finally:
        tl.set_backend(before, local_threadsafe=True)


def cp_slices(weights: Tensor, P: Tensor, V: Tensor, U: Tensor) -> Tensor:
    """V diag(weights * P_n) U^T for every row of P: n x d_out x d_in."""
    from tensorly.cp_tensor import cp_to_tensor

    with pytorch_backend():
        return cp_to_tensor((weights, [P, V, U]))


def tucker_slices(core: Tensor, P: Tensor, V: Tensor, U: Tensor, scale: float) -> Tensor:
    """scale V G(P_n)^T U^T for every row of P, with G(c)_ij = sum_k core_ijk c_k: n x d_out x d_in."""
    from tensorly import tenalg

    with pytorch_backend():
        core = scale * tenalg.mode_dot(core.permute(2, 1, 0), P, mode=0)  # n x j x i
        return tenalg.multi_mode_dot(core, [V, U], modes=[1, 2])


def parafac(stack: Tensor, rank: int, iterations: int, starts: tuple[str, ...]) -> tuple[Tensor, list[Tensor]]:
    """CP of an N x d_out x d_in tensor: weights (R) and factors [P, V, U] with columns of unit norm.

    Alternating least squares ends in local minima: the best of the `starts` is taken.
    """
    from tensorly import decomposition

    best: Any = None
    least = math.inf
    with pytorch_backend():
        for seed, start in enumerate(starts):
            tensor, errors = decomposition.parafac(
                stack.double(), rank, n_iter_max=iterations, init=start, normalize_factors=True, random_state=seed,
                tol=1e-10, return_errors=True,
            )  # fmt: skip
            if best is None or float(errors[-1]) < least:
                best, least = tensor, float(errors[-1])
    weights, factors = best
    return weights.to(stack.dtype), [factor.to(stack.dtype) for factor in factors]


def least_rank(stack: Tensor, error: float) -> int:
    """A bound from below on the R that leaves a relative error: what the unfoldings of N x d_out x d_in need.

    No tensor of CP rank R has an unfolding of a higher rank.
    """
    needed = 1
    for axis in range(3):
        unfolded = stack.movedim(axis, 0).flatten(1).double()
        energy = torch.linalg.eigvalsh(unfolded @ unfolded.T).clamp_min(0).flip(0)
        left = energy.sum() - energy.cumsum(0)
        needed = max(needed, 1 + int((left > error**2 * energy.sum()).sum()))
    return needed


class CompressionErrors(dict[str, float]):
    """What `from_lora` loses: {module: ||dW_lora - dW_cp|| / ||dW_lora||}.

    A module that the LoRA has hardly changed may be lost as a whole (an error of 1) and matter little. `total` weighs
    modules by the size of their updates.

    Examples:
        >>> model, errors = AuroraModeApproxModel.from_lora(lora, AuroraModeApproxConfig(r=64))
        >>> print(errors)
        relative error of the updates: 0.12 in all; by module 0.17 on average, from 0.03 to 0.98 (layers.0.q_proj)
    """

    def __init__(self) -> None:
        super().__init__()
        self._lost = self._whole = 0.0

    def add(self, module: str, lost: float, whole: float) -> None:
        """The norms of what is lost of an update, and of the update."""
        self[module] = lost / max(whole, 1e-12)
        self._lost, self._whole = math.hypot(self._lost, lost), math.hypot(self._whole, whole)

    @property
    def total(self) -> float:
        """||dW_lora - dW_cp|| / ||dW_lora|| of all modules together: 0 is exact, 1 is nothing kept."""
        return self._lost / max(self._whole, 1e-12)

    def __str__(self) -> str:
        worst = max(self, key=lambda module: self[module])
        return (
            f"relative error of the updates: {self.total:.2g} in all; by module {sum(self.values()) / len(self):.2g} on "
            f"average, from {min(self.values()):.2g} to {self[worst]:.2g} ({worst})"
        )
