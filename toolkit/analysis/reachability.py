"""Can steering before the MLP reach what fine-tuning did to it?

The post asks whether ``ΔW_d m ∈ col(A(h))`` with ``A(h) = W_d J(h)``. ``A(h)`` is square,
generically of full rank and very ill conditioned, so membership is true and says nothing. Here is
how much a steering vector of a given size leaves. The dense path: one float64 decomposition a
token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

BUDGETS = (0.01, 0.03, 0.1, 0.3, 1.0)
RANK_TOLERANCE = 1e-6
SMALL_RESIDUAL = 0.01


@dataclass(frozen=True)
class Reach:
    """One token's answer.

    rank: numerical rank of A(h) at relative tolerance 1e-6.
    residual: for each budget ρ, ``min ‖v − AΔ‖ / ‖v‖`` subject to ``‖Δ‖ ≤ ρ‖h‖``.
    nonlinear_residual: that Δ put through the real MLP, ``‖y(h+Δ) − y(h) − v‖ / ‖v‖``.
    min_norm: the smallest ρ whose residual is 0.01 (inf if none is).
    """

    rank: int
    residual: tuple[float, ...]
    nonlinear_residual: tuple[float, ...]
    min_norm: float


def reach(
    jacobian: Tensor,
    target: Tensor,
    h: Tensor,
    mlp: Callable[[Tensor], Tensor],
    budgets: tuple[float, ...] = BUDGETS,
) -> Reach:
    """How closely ``A(h) Δ`` reaches `target` `[d]`, with `mlp` mapping `[n, d]` to `[n, d]`."""
    return reach_all(jacobian, [target], h, mlp, budgets)[0]


def reach_all(
    jacobian: Tensor,
    targets: list[Tensor],
    h: Tensor,
    mlp: Callable[[Tensor], Tensor],
    budgets: tuple[float, ...] = BUDGETS,
) -> list[Reach]:
    """`reach` for several targets of one token, from one decomposition of A(h)."""
    # The eigenvectors of A Aᵀ are A's left singular vectors, ten times cheaper than its SVD. The
    # squares of singular values below 1e-7 of the largest are rounding: those directions are left
    # out, as an SVD's are that lie below its own rounding.
    a = jacobian.double()
    eigenvalues, left = torch.linalg.eigh(a @ a.T)
    squares = eigenvalues.clamp_min(0).numpy()
    usable = squares > 1e-14 * squares[-1]
    h = h.double()
    scale = float(h.norm())
    rank = int((squares > RANK_TOLERANCE**2 * squares[-1]).sum())
    unsteered = mlp(h[None])
    results = []
    for target in targets:
        v = target.double()
        size = float(v.norm())
        curve = _Curve(squares, usable, (left.T @ v).numpy())
        dampings = [curve.damping_for_norm(budget * scale) for budget in budgets]
        # Δ = Aᵀ (A Aᵀ + λ)⁻¹ v, for all budgets at once.
        duals = torch.from_numpy(np.stack([curve.dual(damping) for damping in dampings]))
        reached = mlp(h + duals @ left.T @ a) - unsteered
        results.append(
            Reach(
                rank=rank,
                residual=tuple(curve.residual(damping) / size for damping in dampings),
                nonlinear_residual=tuple(float((r - v).norm()) / size for r in reached),
                min_norm=curve.norm_for_residual(SMALL_RESIDUAL * size) / scale,
            )
        )
    return results


@dataclass(frozen=True)
class _Curve:
    """The trade between ‖Δ‖ and the residual: ``Δ = Aᵀ (A Aᵀ + λ)⁻¹ v`` for every damping λ ≥ 0.

    `squares` are A's squared singular values, `usable` those that are not rounding, `c` the
    target's coordinates along the left singular vectors; each `[d]`.
    """

    squares: np.ndarray
    usable: np.ndarray
    c: np.ndarray

    def dual(self, damping: float) -> np.ndarray:
        """``(A Aᵀ + λ)⁻¹ v`` along the left singular vectors."""
        divisor = np.where(self.usable, self.squares + damping, 1.0)
        return np.where(self.usable, self.c / divisor, 0.0)

    def norm(self, damping: float) -> float:
        """‖Δ‖."""
        return float(np.sqrt((self.squares * self.dual(damping) ** 2).sum()))

    def residual(self, damping: float) -> float:
        """‖v − AΔ‖."""
        return float(np.linalg.norm(self.c - self.squares * self.dual(damping)))

    def damping_for_norm(self, radius: float) -> float:
        """The least damping whose ‖Δ‖ is at most `radius`."""
        if self.norm(0.0) <= radius:
            return 0.0
        return self._solve(lambda damping: self.norm(damping) - radius)

    def norm_for_residual(self, residual: float) -> float:
        """The smallest ‖Δ‖ whose residual is `residual`; inf if none reaches it."""
        if self.residual(0.0) > residual:
            return float("inf")
        return self.norm(self._solve(lambda damping: residual - self.residual(damping)))

    def _solve(self, falling: Callable[[float], float]) -> float:
        """The damping at which the falling function is 0."""
        largest = float(self.squares[-1])
        low, high = np.log(largest) - 80, np.log(largest) + 80
        return float(np.exp(brentq(lambda log: falling(np.exp(log)), low, high, xtol=1e-12)))


@dataclass(frozen=True)
class ReachabilityRow:
    """Over the sampled tokens of one block, for one target and budget: quartiles and medians."""

    target: str
    budget: float
    residual_q25: float
    residual_median: float
    residual_q75: float
    nonlinear_residual_median: float
    min_norm_median: float
    rank_median: float
    n_tokens: int


def summarise(
    target: str, reaches: list[Reach], budgets: tuple[float, ...] = BUDGETS
) -> list[ReachabilityRow]:
    """One row per budget."""
    residual = torch.tensor([r.residual for r in reaches], dtype=torch.float64)
    nonlinear = torch.tensor([r.nonlinear_residual for r in reaches], dtype=torch.float64)
    quartiles = residual.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0)
    min_norm = _median(torch.tensor([r.min_norm for r in reaches], dtype=torch.float64))
    rank = _median(torch.tensor([r.rank for r in reaches], dtype=torch.float64))
    return [
        ReachabilityRow(
            target=target,
            budget=budget,
            residual_q25=float(quartiles[0, i]),
            residual_median=float(quartiles[1, i]),
            residual_q75=float(quartiles[2, i]),
            nonlinear_residual_median=_median(nonlinear[:, i]),
            min_norm_median=min_norm,
            rank_median=rank,
            n_tokens=len(reaches),
        )
        for i, budget in enumerate(budgets)
    ]


def _median(values: Tensor) -> float:
    """The median, halfway between the two middle values; infinities sort last."""
    ordered = values.sort().values
    n = len(ordered)
    low, high = float(ordered[(n - 1) // 2]), float(ordered[n // 2])
    return low if low == high else (low + high) / 2
