"""A scale and a vector for each chosen attention head (LoFIT's first step)."""

from collections.abc import Sequence
from typing import Any, Self, final

import torch
from torch import Tensor

from toolkit.adapters.adapter import Adapter, fixed
from toolkit.analysis.linear_fit import Rank


@final
class HeadAffine(Adapter):
    """``Δz_i = a_i ⊙ z_i + v_i`` for the heads i in `heads`, nothing for the others.

    `scale` and `vector` `[len(heads), head_dim]`. LoFIT trains such scales with an L1 `l1` on
    them, keeps the heads whose scales are largest (`strongest_heads`), and trains vectors there.
    """

    kind = "head_affine"
    rank: Rank = "full"

    def __init__(
        self, scale: Tensor, vector: Tensor, heads: Sequence[int], n_heads: int, l1: float = 0.0
    ) -> None:
        super().__init__()
        self.scale, self.vector = fixed(scale), fixed(vector)
        self.heads, self.n_heads, self.l1 = list(heads), n_heads, l1

    @classmethod
    def identity(
        cls, width: int, n_heads: int, heads: Sequence[int] | None = None, l1: float = 0.0
    ) -> Self:
        heads = range(n_heads) if heads is None else heads
        shape = (len(heads), width // n_heads)
        return cls(torch.zeros(shape), torch.zeros(shape), heads, n_heads, l1)

    @property
    def config(self) -> dict[str, Any]:
        width = self.n_heads * self.scale.shape[1]
        return {"width": width, "n_heads": self.n_heads, "heads": self.heads, "l1": self.l1}

    def forward(self, states: Tensor) -> Tensor:
        z = states.reshape(*states.shape[:-1], self.n_heads, -1)
        change = torch.zeros_like(z)
        change[..., self.heads, :] = self.scale * z[..., self.heads, :] + self.vector
        return change.reshape(states.shape)

    def penalty(self) -> Tensor | float:
        return self.l1 * self.scale.abs().sum() if self.l1 else 0.0
