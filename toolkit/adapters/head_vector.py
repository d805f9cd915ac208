"""A vector for each chosen attention head (LoFIT: Yin et al. 2024, arXiv:2406.01563)."""

from collections.abc import Sequence
from typing import Any, Self, final

import torch
from torch import Tensor

from toolkit.adapters.adapter import Adapter, fixed
from toolkit.analysis.linear_fit import Rank


@final
class HeadVector(Adapter):
    """``Δz_i = v_i`` for the heads i in `heads`, nothing for the others.

    The state is all heads side by side, `[..., n_heads · head_dim]`; `vector`
    `[len(heads), head_dim]`.
    """

    kind = "head_vector"
    rank: Rank = 0

    def __init__(self, vector: Tensor, heads: Sequence[int], n_heads: int) -> None:
        super().__init__()
        self.vector, self.heads, self.n_heads = fixed(vector), list(heads), n_heads

    @classmethod
    def identity(cls, width: int, n_heads: int, heads: Sequence[int] | None = None) -> Self:
        heads = range(n_heads) if heads is None else heads
        return cls(torch.zeros(len(heads), width // n_heads), heads, n_heads)

    @property
    def config(self) -> dict[str, Any]:
        width = self.n_heads * self.vector.shape[1]
        return {"width": width, "n_heads": self.n_heads, "heads": self.heads}

    def forward(self, states: Tensor) -> Tensor:
        whole = self.vector.new_zeros(self.n_heads, self.vector.shape[1])
        whole[self.heads] = self.vector
        return whole.reshape(-1).expand_as(states)
