"""Moments of long vectors from a random projection: leading directions at a fraction of the cost.

A vector x of d dimensions is seen through ``y = Ωᵀ x``, `[k]`, with Ω drawn once from a normal
distribution. What x says beyond y is left out (Nyström's approximation; Halko, Martinsson & Tropp
2011, doi:10.1137/090771806, section 5.5)::

    C_xx ≈ C_xy C_yy⁺ C_yx        C_tx ≈ C_ty C_yy⁺ C_yx

Variances of single dimensions are summed beside it and are exact; so are means and energies.
Sums take d·k numbers a pair in place of d², and 4·d·k operations a token in place of 2·d².
"""

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from toolkit.statistics.frame import Frame, add
from toolkit.statistics.moments import FramedSums, Pair

_ROUNDING = 1e-10  # of the largest eigenvalue of C_yy: directions below hold nothing but rounding


class SketchedSums(FramedSums):
    """Accumulates what `MomentSums` does, through projections of `width` dimensions.

    For every pair (a, b), (b, b) must be among `pairs`.
    """

    def __init__(
        self, pairs: Sequence[Pair], width: int, frames: Mapping[str, Frame] | None = None
    ) -> None:
        self.width = width
        self._maps: dict[str, Tensor] = {}
        self._square: dict[str, Tensor] = {}
        super().__init__(pairs, frames)

    def share(self, name: str) -> float:
        """Return the share of a vector's variance that its projection sees; 1 where it has none."""
        squares = self._frames[name].unit.square()
        whole = float((self._variance(name) * squares).sum())
        seen = float((self._left(name, name).square().sum(1) * squares).sum())
        return seen / whole if whole > 0 else 1.0

    def _variance(self, name: str) -> Tensor:
        return self._square[name] / self.n - (self._sum[name] / self.n).square()

    def _left(self, a: str, b: str) -> Tensor:
        """``C_ay C_yy^(−1/2)`` with y the projection of b, `[d_a, k]`."""
        y_mean = self._maps[b].T @ self._sum[b] / self.n
        c_yy = self._maps[b].T @ self._centred(b, b, y_mean)
        values, vectors = torch.linalg.eigh((c_yy + c_yy.T) / 2)
        kept = values > _ROUNDING * values[-1].clamp_min(0)
        root = vectors[:, kept] / values[kept].sqrt()
        return self._centred(a, b, y_mean) @ root

    def _centred(self, a: str, b: str, y_mean: Tensor) -> Tensor:
        return self._product[a, b] / self.n - torch.outer(self._sum[a] / self.n, y_mean)

    def _start(self, frames: Mapping[str, Frame]) -> None:
        super()._start(frames)
        for name in self.names:
            unit = frames[name].unit
            self._square[name] = torch.zeros_like(unit)
            # In the vector's own units: its large dimensions are what leading directions are.
            weights = unit / unit.max()
            drawn = _drawn(name, len(weights), self.width).to(weights.device)
            self._maps[name] = weights[:, None] * drawn

    def _totals(self) -> tuple[Tensor, ...]:
        return (*super()._totals(), *self._square.values())

    def _columns(self, name: str) -> int:
        return self.width

    def _add(self, framed: Mapping[str, Tensor]) -> None:
        seen = {b: framed[b] @ self._maps[b].to(framed[b].dtype) for _, b in self.pairs}
        for name, value in framed.items():
            add(self._square[name], value.square().sum(0, dtype=torch.float64), value.dtype)
        for a, b in self.pairs:
            add(self._product[a, b], framed[a].T @ seen[b], framed[a].dtype)

    def _covariance(self, a: str, b: str) -> Tensor:
        approximate = self._left(a, b) @ self._left(b, b).T
        if a == b:
            approximate.diagonal().copy_(self._variance(a))
        return approximate


def _drawn(name: str, d: int, width: int) -> Tensor:
    """A normal matrix `[d, width]` that is the same for a name in every block and process."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(d, width, generator=generator, dtype=torch.float64) / d**0.5
