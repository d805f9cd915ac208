"""Can steering before the MLP reach what fine-tuning did to it?

The post asks whether ``ΔW_d m ∈ col(A(h))`` with ``A(h) = W_d J(h)``. ``A(h)`` is square,
generically of full rank and very ill conditioned, so membership is true and says nothing. Here is
how much a steering vector of a given size leaves. The dense path: one float64 SVD a token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
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
    left, singular, right = torch.linalg.svd(jacobian.double())
    h = h.double()
    scale = float(h.norm())
    rank = int((singular > RANK_TOLERANCE * singular[0]).sum())
    unsteered = mlp(h[None])
    results = []
    for target in targets:
        v = target.double()
        coordinates = left.T @ v
        steps = [_budgeted(singular, coordinates, budget * scale) for budget in budgets]
        shifts = torch.stack([right.T @ step for step in steps])
        reached = mlp(h + shifts) - unsteered
        size = float(v.norm())
        results.append(
            Reach(
                rank=rank,
                residual=tuple(_norm(coordinates - singular * s) / size for s in steps),
                nonlinear_residual=tuple(_norm(r - v) / size for r in reached),
                min_norm=_norm_for(singular, coordinates, SMALL_RESIDUAL * size) / scale,
            )
        )
    return results


def _budgeted(singular: Tensor, c: Tensor, radius: float) -> Tensor:
    """Δ in right singular coordinates: ``s c / (s² + λ)`` with the least λ ≥ 0 of norm ≤ radius."""
    free = _damped(singular, c, 0.0)
    if _norm(free) <= radius:
        return free
    return _damped(
        singular, c, _solve(lambda damping: _norm(_damped(singular, c, damping)), radius)
    )


def _norm_for(singular: Tensor, c: Tensor, residual: float) -> float:
    """The smallest ‖Δ‖ whose residual ``‖c − sΔ‖`` is `residual`."""

    def left(damping: float) -> float:
        return _norm(c - singular * _damped(singular, c, damping))

    if left(0.0) > residual:
        return float("inf")
    # The residual grows with the damping: its negative falls, as the norm does.
    damping = _solve(lambda damping: -left(damping), -residual)
    return _norm(_damped(singular, c, damping))


def _damped(singular: Tensor, c: Tensor, damping: float) -> Tensor:
    # Directions below the numerical rank are left alone at zero damping.
    usable = singular > 1e-14 * singular[0]
    return torch.where(usable, singular * c / (singular.square() + damping), 0.0)


def _solve(falling: Callable[[float], float], value: float) -> float:
    """The damping at which the falling function takes `value`, by bisection of its logarithm."""
    low, high = -80.0, 80.0
    for _ in range(100):
        middle = (low + high) / 2
        if falling(10**middle) > value:
            low = middle
        else:
            high = middle
    return 10**high


def _norm(vector: Tensor) -> float:
    return float(vector.norm())


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
