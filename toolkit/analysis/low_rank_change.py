"""The best low-rank parts of a weight change, plainly or in the metric of what the module reads.

With ``C = E[xxᵀ]`` (uncentred) the factors ``up @ down`` of rank r minimise
``E‖(ΔW − up down) x‖²``: with `U_r` the r leading left singular vectors of ``ΔW C^{1/2}``,
``up = U_r`` and ``down = U_rᵀ ΔW``, so neither ``C^{1/2}`` nor its inverse is needed: `U_r` are
eigenvectors of ``ΔW C ΔWᵀ``. To `C` is added a ridge, by which inputs that never occur are
followed too as soon as a rank allows it. Without `C` it is the singular value decomposition of ΔW.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from toolkit.analysis.linear_fit import leading_eigenvectors

RELATIVE_RIDGE = 1e-6  # of the mean eigenvalue of C
MAX_RANK = 64

K = TypeVar("K", bound=Hashable)
Factors = tuple[Tensor, ...]


@dataclass(frozen=True)
class LowRank:
    """Hold the leading rank-one pieces of one matrix's change, the most gainful first.

    `up` `[out, k]`, with orthonormal columns, and `down` `[k, in]`; `gains` `[k]`, falling: the
    energy of each piece in units of the module's own.
    """

    up: Tensor
    down: Tensor
    gains: Tensor

    @property
    def cost(self) -> int:
        """Count the numbers of one piece, ``in + out``."""
        return self.up.shape[0] + self.down.shape[1]

    def leading(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return copies of up `[out, r]` and down `[r, in]` of the first `rank` pieces."""
        return self.up[:, :rank].clone(), self.down[:rank].clone()

    def to(self, dtype: torch.dtype, device: Any = None) -> "LowRank":
        """Return the same pieces with factors of another precision, on `device` (None: there)."""
        up, down = (part.to(dtype=dtype, device=device) for part in (self.up, self.down))
        return LowRank(up, down, self.gains.to(device=device))


def truncated(
    change: Tensor | Factors, second_moment: Tensor | None, scale: float, max_rank: int = MAX_RANK
) -> LowRank:
    """Return the leading pieces, at most `max_rank`, of a change `[out, in]` or of its factors.

    `second_moment` `[in, in]` is that of the module's inputs; without it the pieces are those of
    the plain singular value decomposition. A piece's gain is ``σ² / scale``. Pieces that are no
    larger than what rounding leaves are left out: a change of rank 3 has three.
    """
    basis, rows = _rows_of(change)
    gram = _weighted(rows, second_moment) @ rows.T
    directions = leading_eigenvectors(gram, max_rank)
    energies = (directions * (gram @ directions)).sum(0).clamp(min=0)
    # Of a sum of squares in float64; singular values are thus good to 1e-7 of the largest.
    rounding = max(len(gram), rows.shape[1]) * torch.finfo(torch.float64).eps
    kept = energies > rounding * energies.max() if len(energies) else energies > 0
    directions, energies = directions[:, kept], energies[kept]
    up = directions if basis is None else basis @ directions
    return LowRank(up, directions.T @ rows, energies / scale if scale > 0 else energies)


def within_budget(pieces: Mapping[K, LowRank], budget: int) -> dict[K, int]:
    """Choose the rank of every module, so that all pieces together hold at most `budget` numbers.

    Pieces are taken by gain per number, the largest first; one that no longer fits is passed over
    for those that do.
    """
    # The sort is stable: equal pieces keep their order, so that a rank is always a beginning.
    order = sorted(
        ((float(gain) / found.cost, key) for key, found in pieces.items() for gain in found.gains),
        key=lambda piece: -piece[0],
    )
    ranks, left = dict.fromkeys(pieces, 0), budget
    for _, key in order:
        if pieces[key].cost <= left:
            ranks[key] += 1
            left -= pieces[key].cost
    return ranks


def _rows_of(change: Tensor | Factors) -> tuple[Tensor | None, Tensor]:
    """Split the change into orthonormal columns (None: the identity) and the fewest rows."""
    factors = (change,) if isinstance(change, Tensor) else change
    first, *rest = (factor.detach().double() for factor in factors)
    if not rest and len(first) <= first.shape[1]:
        return None, first
    basis, rows = torch.linalg.qr(first)
    for factor in rest:
        rows = rows @ factor
    return basis, rows


def _weighted(rows: Tensor, second_moment: Tensor | None) -> Tensor:
    """Return ``rows (C + ridge·I)``, `[r, in]`."""
    if second_moment is None:
        return rows
    ridge = RELATIVE_RIDGE * float(second_moment.trace()) / len(second_moment)
    return rows @ second_moment.to(rows) + ridge * rows
