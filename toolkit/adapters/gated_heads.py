"""Gated scales and vectors of attention heads (JoLA: Lai et al. 2025, arXiv:2502.01179)."""

from typing import Any, Self, final

import torch
from torch import Tensor

from toolkit.adapters.adapter import Adapter, fixed
from toolkit.analysis.linear_fit import Rank

# The hard-concrete distribution of Louizos et al. 2018 (arXiv:1712.01312), with their constants.
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
OPEN = 2.0  # the gates' logits at the start: nearly all are open


@final
class GatedHeads(Adapter):
    """``Δz_i = g_i^m (a_i ⊙ z_i) + g_i^a v_i``, with two hard-concrete gates a head.

    `scale`, `vector` `[n_heads, head_dim]`, `gates` `[2, n_heads]` the logits of the scales' and
    the vectors' gates. In training a gate is drawn anew in every pass; otherwise it is its
    distribution's clipped mean, often exactly 0 or 1. `l0` times the expected number of open gates
    is added to the loss.
    """

    kind = "gated_heads"
    rank: Rank = "full"

    def __init__(self, scale: Tensor, vector: Tensor, gates: Tensor, l0: float = 0.0) -> None:
        super().__init__()
        self.scale, self.vector, self.gates = fixed(scale), fixed(vector), fixed(gates)
        self.l0 = l0

    @classmethod
    def identity(cls, width: int, n_heads: int, l0: float = 0.0) -> Self:
        shape = (n_heads, width // n_heads)
        gates = torch.full((2, n_heads), OPEN)
        return cls(torch.zeros(shape), torch.zeros(shape), gates, l0)

    @property
    def config(self) -> dict[str, Any]:
        n_heads, head_dim = self.scale.shape
        return {"width": n_heads * head_dim, "n_heads": n_heads, "l0": self.l0}

    def forward(self, states: Tensor) -> Tensor:
        scales, vectors = self.open_gates()[..., None]
        z = states.reshape(*states.shape[:-1], *self.scale.shape)
        return (scales * self.scale * z + vectors * self.vector).reshape(states.shape)

    def open_gates(self) -> Tensor:
        """Return how far each gate is open, from 0 to 1, `[2, n_heads]`."""
        logits: Tensor = self.gates
        if self.training:
            noise = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            logits = (noise.logit() + logits) / TEMPERATURE
        return (logits.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)

    def penalty(self) -> Tensor | float:
        shift = TEMPERATURE * torch.tensor(-LOW / HIGH).log().item()
        return self.l0 * (self.gates - shift).sigmoid().sum() if self.l0 else 0.0
