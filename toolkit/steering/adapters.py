"""Adapters: functions from a hidden state to what is added to it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from toolkit.analysis.linear_fit import Rank

Fit = Literal["free", "forced", "sequential"]


class FixedVector(nn.Module):
    """``Δ = b``, whatever the state."""

    kind = "vector"
    rank: Rank = 0

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.bias.expand_as(states)


class Linear(nn.Module):
    """``Δ = up (down h) + b``, or ``Δ = up h + b`` where `down` is None (full rank).

    `up` `[d, r]`, `down` `[r, d]`, `bias` `[d]`.
    """

    kind = "linear"

    def __init__(self, up: Tensor, down: Tensor | None, bias: Tensor) -> None:
        super().__init__()
        self.up = nn.Parameter(up, requires_grad=False)
        self.down = nn.Parameter(down, requires_grad=False) if down is not None else None
        self.bias = nn.Parameter(bias, requires_grad=False)

    @property
    def rank(self) -> Rank:
        return "full" if self.down is None else len(self.down)

    def forward(self, states: Tensor) -> Tensor:
        inner = states if self.down is None else states @ self.down.T
        return inner @ self.up.T + self.bias


Adapter = FixedVector | Linear


@dataclass(frozen=True)
class Adapters:
    """Adapters of one kind at one location, by block, and how they were fitted."""

    location: str
    by_layer: Mapping[int, Adapter]
    fit: Fit
    info: dict = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return next(iter(self.by_layer.values())).kind

    @property
    def rank(self) -> Rank:
        return next(iter(self.by_layer.values())).rank

    @property
    def parameters(self) -> int:
        """How many numbers the adapters hold."""
        return sum(p.numel() for adapter in self.by_layer.values() for p in adapter.parameters())
