"""LoReFT (Wu et al. 2024, arXiv:2404.03592)."""

from typing import Any, Self, cast, final

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from toolkit.adapters.adapter import Adapter, columns, fixed
from toolkit.analysis.linear_fit import Rank


class _Rows(nn.Module):
    """A matrix whose rows torch keeps orthonormal."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows)


@final
class LoReFT(Adapter):
    """``Δ = Rᵀ(W y + b − R y)``: within the row space of R, the state becomes ``W y + b``.

    R `[r, d]` with orthonormal rows (handed in as any `rows` that are, kept so by torch's
    parametrisation while it is trained), `target` W `[r, d]`, `bias` b `[r]`.
    """

    kind = "loreft"

    def __init__(self, rows: Tensor, target: Tensor, bias: Tensor) -> None:
        super().__init__()
        # Without torch's trivialisation, which would keep a [d, d] matrix beside the r rows.
        self.basis = orthogonal(_Rows(rows), orthogonal_map="householder", use_trivialization=False)
        self.target, self.bias = fixed(target), fixed(bias)
        self.requires_grad_(False).eval()

    @classmethod
    def identity(cls, width: int, rank: Rank) -> Self:
        r = columns(rank, width)
        if torch.empty(0).is_meta:  # only the shapes are asked for, and torch makes no base there
            return cls(torch.empty(r, width), torch.empty(r, width), torch.zeros(r))
        rows = torch.linalg.qr(torch.randn(width, r)).Q.T.contiguous()
        made = cls(rows, torch.empty(r, width), torch.zeros(r))
        made.target.data = made.rows.contiguous().clone()
        return made

    @property
    def rows(self) -> Tensor:
        """R."""
        with torch.no_grad():  # torch cuts this to integers, which must not be weight decay's 0
            signs = self.basis.parametrizations["weight"].original.diagonal()  # type: ignore
            signs.copy_(signs.sign())
        return cast(Tensor, self.basis.weight)

    @property
    def rank(self) -> Rank:
        r, width = self.target.shape
        return "full" if r == width else r

    @property
    def config(self) -> dict[str, Any]:
        return {"width": self.target.shape[1], "rank": self.rank}

    def forward(self, states: Tensor) -> Tensor:
        rows = self.rows
        return torch.nn.functional.linear(states, self.target - rows, self.bias) @ rows
