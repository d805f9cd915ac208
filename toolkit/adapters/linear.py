"""The linear adapter."""

from typing import Any, Self, final

import torch
from torch import Tensor

from toolkit.adapters.adapter import Adapter, fixed, random_rows
from toolkit.analysis.linear_fit import Rank


@final
class Linear(Adapter):
    """``Δ = up (down h) + b``, or ``Δ = up h + b`` where `down` is None (full rank).

    `up` `[d, r]`, `down` `[r, d]`, `bias` `[d]` or None.
    """

    kind = "linear"

    def __init__(self, up: Tensor, down: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.up = fixed(up)
        self.down = None if down is None else fixed(down)
        self.bias = None if bias is None else fixed(bias)

    @classmethod
    def identity(cls, width: int, rank: Rank, bias: bool = False) -> Self:
        down = None if rank == "full" else random_rows(rank, width)
        up = torch.zeros(width, width if rank == "full" else rank)
        return cls(up, down, torch.zeros(width) if bias else None)

    @property
    def rank(self) -> Rank:
        return "full" if self.down is None else len(self.down)

    @property
    def config(self) -> dict[str, Any]:
        return {"width": len(self.up), "rank": self.rank, "bias": self.bias is not None}

    def forward(self, states: Tensor) -> Tensor:
        inner = states if self.down is None else states @ self.down.T
        change = inner @ self.up.T
        return change if self.bias is None else change + self.bias
