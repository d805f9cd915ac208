"""The non-linear adapter: an autoencoder with a narrow middle."""

from typing import Any, Self, final

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from toolkit.adapters.adapter import Adapter, columns, fixed, random_rows
from toolkit.analysis.linear_fit import Rank


@final
class NonLinear(Adapter):
    """``Δ = up σ(down h + a) + b``: what is added stays in the r dimensions of `up`.

    `up` `[d, r]`, `down` `[r, d]`, `inner_bias` `[r]` and `bias` `[d]` or both None; `activation`
    is a name that transformers knows.
    """

    kind = "nonlinear"

    def __init__(
        self,
        up: Tensor,
        down: Tensor,
        inner_bias: Tensor | None = None,
        bias: Tensor | None = None,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.up, self.down = fixed(up), fixed(down)
        self.inner_bias = None if inner_bias is None else fixed(inner_bias)
        self.bias = None if bias is None else fixed(bias)
        self.activation = activation

    @classmethod
    def identity(cls, width: int, rank: Rank, bias: bool = False, activation: str = "silu") -> Self:
        r = columns(rank, width)
        inner, outer = (torch.zeros(r), torch.zeros(width)) if bias else (None, None)
        return cls(torch.zeros(width, r), random_rows(r, width), inner, outer, activation)

    @property
    def rank(self) -> Rank:
        width, r = self.up.shape
        return "full" if r == width else r

    @property
    def config(self) -> dict[str, Any]:
        return {
            "width": len(self.up),
            "rank": self.rank,
            "bias": self.bias is not None,
            "activation": self.activation,
        }

    def forward(self, states: Tensor) -> Tensor:
        inner = torch.nn.functional.linear(states, self.down, self.inner_bias)
        return torch.nn.functional.linear(ACT2FN[self.activation](inner), self.up, self.bias)
