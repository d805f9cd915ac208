"""The best linear fit of a delta from the hidden state, at every rank.

``f(x) = A x + b`` minimises ``E‖t − A x − b‖² + ridge·‖A‖²_F``, `b` unpenalised. Rank r is
reduced-rank regression (Izenman 1975): with `B` the full ridge solution and `U_r` the r leading
left singular vectors of ``B (C_xx + ridge·I)^{1/2}``, ``A_r = U_r U_rᵀ B`` and ``b = Et − A Ex``.
Rank 0 is the fixed vector ``b = Et``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import scipy.linalg
import torch
from torch import Tensor

from toolkit.statistics import Moments

Rank = int | Literal["full"]
RANKS: tuple[Rank, ...] = (0, 1, 2, 4, 8, 16, 32, 64, "full")
RELATIVE_RIDGE = 1e-4
ROUNDING = 1e-13  # of the energy of x: the variance that rounding alone gives it
MAX_RANK = max(rank for rank in RANKS if rank != "full")


@dataclass(frozen=True)
class LinearFit:
    """A fitted map at every rank up to some k, and at full rank.

    `x_mean` `[d_x]`, `t_mean` `[d_t]`; `full` `[d_t, d_x]` the ridge solution B; `directions`
    `[d_t, k]` whose columns are U, leading first.
    """

    x_mean: Tensor
    t_mean: Tensor
    full: Tensor
    directions: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """``A_r = up @ down``: `up` `[d_t, r]` with orthonormal columns, `down` `[r, d_x]`."""
        if rank > self.directions.shape[1]:
            raise ValueError(f"rank {rank} asked of a fit made up to {self.directions.shape[1]}")
        up = self.directions[:, :rank]
        return up, up.T @ self.full

    def matrix(self, rank: Rank) -> Tensor:
        """``A_r``, `[d_t, d_x]`."""
        if rank == "full":
            return self.full
        up, down = self.factors(rank)
        return up @ down

    def bias(self, rank: Rank) -> Tensor:
        """``b = Et − A_r Ex``, `[d_t]`."""
        return self.t_mean - self.matrix(rank) @ self.x_mean


def fit_linear(
    moments: Moments,
    x: str,
    t: str,
    max_rank: int = MAX_RANK,
    relative_ridge: float = RELATIVE_RIDGE,
) -> LinearFit:
    """Fit target `t` from source `x`, two variables of `moments`, which holds (x, x) and (t, x).

    The ridge is `relative_ridge` times the mean variance of a dimension of `x`. Ranks up to
    `max_rank`, and full rank, can be asked of the fit.
    """
    c_xx, c_tx = moments.covariance[x, x], moments.covariance[t, x]
    d = len(c_xx)
    ridge = relative_ridge * float(c_xx.trace()) / d
    # Where x varies by no more than float32 rounds it, nothing but a fixed vector can be fitted.
    if ridge * d <= relative_ridge * ROUNDING * float(moments.mean[x].square().sum()):
        full = torch.zeros_like(c_tx)
        directions = torch.eye(len(c_tx), max_rank, dtype=full.dtype, device=full.device)
        return LinearFit(moments.mean[x], moments.mean[t], full, directions)
    eye = torch.eye(d, dtype=c_xx.dtype, device=c_xx.device)
    factor = torch.linalg.cholesky(c_xx + ridge * eye)
    half = torch.linalg.solve_triangular(factor, c_tx.T, upper=False)  # L⁻¹ C_xt
    full = torch.linalg.solve_triangular(factor.T, half, upper=True).T
    # B (C_xx + ridge·I) Bᵀ = C_tx (C_xx + ridge·I)⁻¹ C_xt, whose eigenvectors are U.
    directions = leading_eigenvectors(half.T @ half, max_rank)
    return LinearFit(moments.mean[x], moments.mean[t], full, directions)


def leading_eigenvectors(symmetric: Tensor, k: int) -> Tensor:
    """The eigenvectors of the `k` largest eigenvalues, largest first, `[d, k]` (or `[d, d]`)."""
    d = len(symmetric)
    k = min(k, d)
    if k == 0:
        return symmetric.new_zeros(d, 0)
    if symmetric.device.type != "cpu":  # only LAPACK finds a few of them by themselves
        return torch.linalg.eigh(symmetric)[1][:, d - k :].flip(1)
    found = scipy.linalg.eigh(symmetric.numpy(), subset_by_index=[d - k, d - 1])[1]
    return torch.from_numpy(found[:, ::-1].copy())


def leading_part(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of rank `k` as ``up @ down``, `[m, k]` and `[k, n]`.

    The rows of `down` are orthonormal. It is what a singular value decomposition gives, from the
    leading eigenvectors of ``matrixᵀ matrix`` alone: a sixth of the time.
    """
    wide = matrix.double()
    directions = leading_eigenvectors(wide.T @ wide, k)
    return (wide @ directions).to(matrix.dtype), directions.T.to(matrix.dtype)


def explained(
    fit: LinearFit, moments: Moments, x: str, t: str, t_energy: float, ranks: Sequence[Rank]
) -> dict[Rank, float]:
    """``1 − E‖t − f(x)‖² / E‖t‖²`` on the tokens of `moments`, for every rank; 0 if t is zero.

    Uncentred, so rank 0 need not be 0; negative where the fit is worse than no steering.
    `t_energy` is ``E‖t‖²`` over the same tokens.
    """
    if t_energy == 0:
        return dict.fromkeys(ranks, 0.0)
    # About the fit's own means the residual is (t − t̄) − A (x − x̄), without the bias.
    x_off, t_off = moments.mean[x] - fit.x_mean, moments.mean[t] - fit.t_mean
    xx = moments.covariance[x, x] + torch.outer(x_off, x_off)
    tx = moments.covariance[t, x] + torch.outer(t_off, x_off)
    t_variance = t_energy - float(moments.mean[t].square().sum())
    rank_0 = max(t_variance, 0.0) + float(t_off.square().sum())

    full_gain = float(2 * (fit.full * tx).sum() - (fit.full * (fit.full @ xx)).sum())
    widest = max((rank for rank in ranks if rank != "full"), default=0)
    by_rank = [0.0]
    if widest:  # what each direction takes off the residual
        up, down = fit.factors(widest)
        gains = 2 * (down * (up.T @ tx)).sum(1) - (down * (down @ xx)).sum(1)
        by_rank += gains.cumsum(0).tolist()
    gain = {rank: full_gain if rank == "full" else by_rank[rank] for rank in ranks}
    return {rank: 1 - (rank_0 - gain[rank]) / t_energy for rank in ranks}


def ranks_below(d: int, ranks: Sequence[Rank] = RANKS) -> list[Rank]:
    """Return the ranks that a map of `d` dimensions can have, "full" among them."""
    return [rank for rank in ranks if rank == "full" or rank < d]
