"""The fixed vector."""

from typing import Any, Self, final

import torch
from torch import Tensor

from toolkit.adapters.adapter import Adapter, fixed
from toolkit.analysis.linear_fit import Rank


@final
class FixedVector(Adapter):
    """``Δ = b``, whatever the state; `bias` `[d]`."""

    kind = "vector"
    rank: Rank = 0

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = fixed(bias)

    @classmethod
    def identity(cls, width: int) -> Self:
        return cls(torch.zeros(width))

    @property
    def config(self) -> dict[str, Any]:
        return {"width": len(self.bias)}

    def forward(self, states: Tensor) -> Tensor:
        return self.bias.expand_as(states)
