"""UniAdapter's algebra: the down projections, the branches, and what they add. The equations stand in `__init__.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class Down(nn.Module):
    """act(LN(x) D + b)."""

    def __init__(self, width: int, bottleneck: int, activation: str, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.down = nn.Linear(width, bottleneck)
        self.activation = activation
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., m)."""
        return ACTIVATIONS[self.activation](self.down(self.norm(x)))


class Branch(nn.Module):
    """U of one tower or of a fusion, with a D of its own where it shares none.

    Args:
        width, bottleneck: d and m.
        scale: s.
        down: Its own D.
        shared: The container of what it shares, where there is such a thing, and the name of its adapter in there.
        reads_query: Whether it adds the query residual where its layer fuses.
        normed: Whether what a fusion adds is normalised behind a gate.
    """

    def __init__(
        self,
        width: int,
        bottleneck: int,
        scale: float,
        down: Down | None,
        shared: tuple[nn.ModuleDict, str] | None,
        reads_query: bool,
        normed: bool,
    ) -> None:
        super().__init__()
        self.scale, self.reads_query, self.normed = scale, reads_query, normed
        self._shared = shared  # looked up at each call
        self.down = down
        self.up = nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.bias)
        if normed:
            self.norm = nn.LayerNorm(width)
            self.gate_norm = nn.Parameter(torch.zeros(1))  # by its name the optimizer doesn't decay it
        else:
            nn.init.zeros_(self.up.weight)

    def stages(self) -> list[nn.Module]:
        """What makes z of x, one after the other."""
        shared = None if self._shared is None else self._shared[0][self._shared[1]]
        return [stage for stage in (self.down, shared) if stage is not None]

    def z(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., m)."""
        for stage in self.stages():
            x = stage(x)
        return x

    def shares_with(self, other: Branch) -> bool:
        """Whether z is the same in both."""
        return self.stages()[0] is other.stages()[0]


def up(z: Tensor, branches: Sequence[Branch], scale: float) -> Tensor:
    """s U z with the sum U of the branches."""
    if any(callable(branch.up.weight) for branch in branches):  # torch's quantisation has packed it
        return scale * sum(branch.up(z) for branch in branches)
    weight, bias = (sum(getattr(branch.up, name) for branch in branches) for name in ("weight", "bias"))
    return F.linear(z, scale * weight, scale * bias)


def added_in_a_tower(branch: Branch, x: Tensor) -> Tensor:
    """s U z(x)."""
    return up(branch.z(x), [branch], branch.scale)


def added_by_modality(text: Branch, image: Branch, x: Tensor, is_image: Tensor) -> Tensor:
    """s U z(x) where tokens of texts and images stand in one sequence, each with its U. is_image: (B, L)."""
    z = text.z(x)
    z_image = z if image.shares_with(text) else image.z(x)
    return torch.where(is_image[..., None], up(z_image, [image], image.scale), up(z, [text], text.scale))


def added_by_fusion(branches: Sequence[Branch], a: Tensor, x: Tensor) -> Tensor:
    """s U_t z(a) + s (U_m z(x) + U_t z(x)), by a text's and a fusion's branch or one of them alone."""
    text, fusion = branches[0], branches[-1]
    z = text.z(torch.stack([a, x]) if text.reads_query else x[None])
    scale = 1.0 if fusion.normed else fusion.scale
    if fusion.shares_with(text):
        y = up(z[-1], branches, scale)
    else:
        y = up(z[-1], [text], scale) + up(fusion.z(x), [fusion], scale)
    if fusion.normed:
        y = fusion.scale * fusion.gate_norm * fusion.norm(y)
    return y + up(z[0], [text], text.scale) if text.reads_query else y
