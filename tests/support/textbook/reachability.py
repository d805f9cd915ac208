"""What a step within a budget leaves of a target, by damped least squares."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special

from tests.support.textbook.activations import ACTIVATIONS
from tests.support.textbook.definitions import BUDGETS, Array
from tests.support.textbook.mlp import Matrices, jacobian
from tests.support.textbook.modules import mlp_output


def damped(A: Array, v: Array, log10_damping: float) -> Array:
    """``argmin ‖v − AΔ‖² + λ‖Δ‖²``, stable however ill conditioned A is."""
    d = A.shape[1]
    rows = np.vstack([A, np.sqrt(10.0**log10_damping) * np.eye(d)])
    return np.linalg.lstsq(rows, np.concatenate([v, np.zeros(d)]), rcond=None)[0]


def budgeted(A: Array, v: Array, radius: float) -> Array:
    """``argmin ‖v − AΔ‖`` subject to ``‖Δ‖ ≤ radius``: the damping at which the norm is met."""
    free = np.linalg.lstsq(A, v, rcond=1e-13)[0]
    if np.linalg.norm(free) <= radius:
        return free
    excess = lambda damping: np.log(np.linalg.norm(damped(A, v, damping)) / radius)  # noqa: E731
    return damped(A, v, scipy.optimize.brentq(excess, -26, 12, xtol=1e-13))


def min_norm(A: Array, v: Array, share: float = 0.01) -> float:
    """The smallest ‖Δ‖ with ``‖v − AΔ‖ = share·‖v‖``."""

    def excess(damping: float) -> float:
        left = np.linalg.norm(v - A @ damped(A, v, damping))
        return np.log(left / (share * np.linalg.norm(v)))

    if np.linalg.norm(v - A @ np.linalg.lstsq(A, v, rcond=1e-13)[0]) > share * np.linalg.norm(v):
        return np.inf
    return np.linalg.norm(damped(A, v, scipy.optimize.brentq(excess, -26, 12, xtol=1e-13)))


def residual_by_svd(A: Array, v: Array, radius: float) -> float:
    """``min ‖v − AΔ‖ / ‖v‖`` subject to ``‖Δ‖ ≤ radius``, from the singular values of A."""
    U, s, _ = np.linalg.svd(A, full_matrices=False)
    U, s = U[:, s > 1e-13 * s[0]], s[s > 1e-13 * s[0]]
    c = U.T @ v
    outside = np.linalg.norm(v - U @ c)
    if np.linalg.norm(c / s) <= radius:
        return float(outside / np.linalg.norm(v))
    norm = lambda log: np.linalg.norm(s * c / (s**2 + np.exp(log)))  # noqa: E731
    log = scipy.optimize.brentq(lambda log: np.log(norm(log) / radius), -90, 90, xtol=1e-13)
    inside = np.linalg.norm(np.exp(log) * c / (s**2 + np.exp(log)))
    return float(np.hypot(inside, outside) / np.linalg.norm(v))


def reachability(base: Any, tuned: Any, h: Array) -> Iterator[dict[str, Any]]:
    """Rows for one block; `base` and `tuned` are its float64 blocks."""
    B, T = Matrices.of(base), Matrices.of(tuned)
    value, _ = ACTIVATIONS[B.activation]
    for target in ("down", "exact"):
        residuals, nonlinear, norms, ranks = [], [], [], []
        for token in h:
            m = value(B.gate @ token + B.gate_bias)
            if B.up is not None:
                m = m * (B.up @ token + B.up_bias)
            y = mlp_output(base, token[None])[0]
            v = (T.down - B.down) @ m + T.down_bias - B.down_bias
            if target == "exact":
                v = mlp_output(tuned, token[None])[0] - y
            A, size = jacobian(B, token), np.linalg.norm(token)
            steps = [budgeted(A, v, rho * size) for rho in BUDGETS]
            moved = [mlp_output(base, (token + step)[None])[0] - y for step in steps]
            residuals.append([np.linalg.norm(v - A @ s) / np.linalg.norm(v) for s in steps])
            nonlinear.append([np.linalg.norm(x - v) / np.linalg.norm(v) for x in moved])
            norms.append(min_norm(A, v) / size)
            ranks.append(np.linalg.matrix_rank(A, rtol=1e-6))
        for i, budget in enumerate(BUDGETS):
            at = np.array(residuals)[:, i]
            yield {
                "target": target,
                "budget": budget,
                "residual_q25": np.quantile(at, 0.25),
                "residual_median": np.median(at),
                "residual_q75": np.quantile(at, 0.75),
                "nonlinear_residual_median": np.median(np.array(nonlinear)[:, i]),
                "min_norm_median": np.median(norms),
                "rank_median": np.median(ranks),
                "n_tokens": len(h),
            }
