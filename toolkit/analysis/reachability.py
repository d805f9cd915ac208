"""How much of a wanted change can a steering vector of a given size bring about?

The post asks whether ``ΔW_d m ∈ col(A(h))`` with ``A(h)`` the MLP's Jacobian. ``A(h)`` is square,
generically of full rank and very ill conditioned, so membership is true and says nothing. Here is
the *budgeted residual*, ``min ‖v − M Δ‖ / ‖v‖`` subject to ``‖Δ‖ ≤ r``, for any map M of a token.

Its solutions are ``Δ = Mᵀ (M Mᵀ + λ)⁻¹ v``, one for every damping λ ≥ 0 (Moré and Sorensen 1983).
``M Mᵀ = Q T Qᵀ`` with T tridiagonal, once a token; from there every λ of every target costs a
tridiagonal solve, O(d). M may be float32; the product and all that follows are float64, since
squaring M squares its condition number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import lapack
from scipy.optimize import brentq
from torch import Tensor

from toolkit.runtime.lapack import one_thread_each, tridiagonalise

BUDGETS = (0.01, 0.03, 0.1, 0.3, 1.0)
RANK_TOLERANCE = 1e-6
SMALL_RESIDUAL = 0.01
_EPSILON = float(np.finfo(float).eps)


@dataclass(frozen=True)
class Reach:
    """The answers for n tokens, m targets and b radii, float64.

    rank: numerical rank of each token's M at relative tolerance 1e-6, `[n]`.
    residual: ``min ‖v − M Δ‖ / ‖v‖`` subject to ``‖Δ‖ ≤ r``, `[n, m, b]`.
    steering: the Δ that attain it, `[n, m, b, d_in]`.
    min_norm: the least ‖Δ‖ whose residual is 0.01 (inf if none is), `[n, m]`.
    """

    rank: Tensor
    residual: Tensor
    steering: Tensor
    min_norm: Tensor


def reach(map_of: Callable[[int], Tensor], targets: Tensor, radii: Tensor) -> Reach:
    """Measure how closely ``M Δ`` reaches each target, token by token.

    `map_of(i)` is the M of token i, `[d_out, d_in]` with d_out ≥ d_in, asked for when it is its
    turn, on the device of the targets; `targets` `[n, m, d_out]`, none of them zero; `radii`
    `[n, b]`. Residuals are accurate to 1e-5 for condition numbers up to 1e4 and to 1e-4 up to 1e5;
    at 1e6 an ample budget leaves up to 4e-3 of ‖v‖ that is rounding of ``M Mᵀ``.
    """

    sizes = radii.double().cpu().numpy()

    @torch.no_grad()
    def one(token: int) -> tuple[int, np.ndarray, Tensor, np.ndarray]:
        return _reach_one(map_of(token), targets[token].double(), sizes[token])

    if targets.device.type == "cpu":
        with one_thread_each() as workers:
            found = list(workers.map(one, range(len(targets))))
    else:
        found = [one(token) for token in range(len(targets))]
    ranks, residuals, steerings, min_norms = zip(*found, strict=True)
    return Reach(
        rank=torch.tensor(ranks, device=targets.device),
        residual=torch.from_numpy(np.stack(residuals)).to(targets.device),
        steering=torch.stack(steerings),
        min_norm=torch.from_numpy(np.stack(min_norms)).to(targets.device),
    )


def _reach_one(
    matrix: Tensor, targets: Tensor, radii: np.ndarray
) -> tuple[int, np.ndarray, Tensor, np.ndarray]:
    sizes = targets.norm(dim=1).cpu().numpy()
    beyond = np.zeros(len(targets))  # of each target, what no Δ reaches: it is not in col(M)
    matrix, inside = matrix.double(), targets
    if matrix.shape[0] > matrix.shape[1]:
        basis, matrix = torch.linalg.qr(matrix)
        inside = targets @ basis
        beyond = (targets - inside @ basis.T).norm(dim=1).cpu().numpy()
    gram, rank = _reduced(matrix)
    along = gram.rotate(inside.T).T
    duals = np.zeros((len(targets), len(radii), len(matrix)))
    residual = np.zeros((len(targets), len(radii)))
    min_norm = np.zeros(len(targets))
    for i, c in enumerate(along):
        curve = _Curve(gram, np.ascontiguousarray(c))
        for j, radius in enumerate(radii):
            damping = curve.damping_for_norm(radius)
            duals[i, j] = curve.dual(damping)
            residual[i, j] = np.hypot(curve.residual(damping), beyond[i]) / sizes[i]
        small = (SMALL_RESIDUAL * sizes[i]) ** 2 - beyond[i] ** 2
        min_norm[i] = curve.norm_for_residual(np.sqrt(small)) if small > 0 else np.inf
    steering = gram.turned_back(duals.reshape(-1, len(matrix)).T).T.reshape(duals.shape) @ matrix
    return rank, residual, steering, min_norm


def _reduced(matrix: Tensor) -> tuple["_Tridiagonal | _Diagonal", int]:
    """Return ``M Mᵀ`` as ``Q T Qᵀ``, and its rank: T tridiagonal on a CPU, if it can be.

    Elsewhere a reduction that stops at tridiagonal is not at hand.
    """
    if matrix.device.type != "cpu":
        found = _Diagonal.of(gram_matrix(matrix))
        return found, found.rank()
    reduced = _Tridiagonal.of(gram_matrix(matrix).numpy())
    rank = reduced.rank()
    # Without full rank T's zeros are rounding: their eigenvectors must be told apart.
    return (reduced if rank == len(matrix) else _Diagonal.of(gram_matrix(matrix))), rank


_STRIPES = 4


def gram_matrix(matrix: Tensor) -> Tensor:
    """``M Mᵀ`` `[d, d]`; its upper triangle, in stripes of rows (the rest is not set)."""
    product = matrix.new_empty(len(matrix), len(matrix))
    for rows in np.array_split(np.arange(len(matrix)), _STRIPES):
        if len(rows):
            start, stop = int(rows[0]), int(rows[-1]) + 1
            torch.mm(matrix[start:stop], matrix[start:].T, out=product[start:stop, start:])
    return product


@dataclass(frozen=True)
class _Tridiagonal:
    """A symmetric matrix as ``Q T Qᵀ``: `diagonal` and `off` of T, Q as Householder reflectors."""

    diagonal: np.ndarray
    off: np.ndarray
    reflectors: np.ndarray
    scales: np.ndarray

    @classmethod
    def of(cls, symmetric: np.ndarray) -> "_Tridiagonal":
        """From the upper triangle of `symmetric`, which is overwritten."""
        diagonal, off, reflectors, scales = tridiagonalise(symmetric)
        return cls(diagonal, off, np.asfortranarray(reflectors[1:, :-1]), scales)

    def rotate(self, columns: Tensor) -> np.ndarray:
        """``Qᵀ columns``."""
        return self._turned(columns.numpy(), "T")

    def turned_back(self, columns: np.ndarray) -> Tensor:
        """``Q columns``."""
        return torch.from_numpy(self._turned(columns, "N"))

    def _turned(self, columns: np.ndarray, way: str) -> np.ndarray:
        turned = np.array(columns, order="F")
        if len(turned) > 1:
            work = 64 * turned.shape[1]
            part = lapack.dormqr("L", way, self.reflectors, self.scales, turned[1:], work)[0]
            turned[1:] = part
        return turned

    def solve(self, damping: float, c: np.ndarray) -> np.ndarray:
        """``(T + damping)⁻¹ c``; `damping` must make it positive definite."""
        if len(c) == 1:
            return c / (self.diagonal + damping)
        return lapack.dptsv(self.diagonal + damping, self.off, c)[2]

    def times(self, x: np.ndarray) -> np.ndarray:
        """``T x``."""
        product = self.diagonal * x
        product[1:] += self.off * x[:-1]
        product[:-1] += self.off * x[1:]
        return product

    def largest(self) -> float:
        """An upper bound of the largest eigenvalue, within a factor of two (Gershgorin)."""
        rows = np.abs(self.diagonal)
        rows[1:] += np.abs(self.off)
        rows[:-1] += np.abs(self.off)
        return float(rows.max())

    def rank(self) -> int:
        """How many eigenvalues exceed `RANK_TOLERANCE` squared of the largest one."""
        n = len(self.diagonal)
        if n == 1:
            return int(self.diagonal[0] > 0)
        found = lapack.dstebz(self.diagonal, self.off, 2, 0.0, 0.0, n, n, 0.0, "E")
        top = float(found[1][0])
        if top <= 0:
            return 0
        below, edge = -top, RANK_TOLERANCE**2 * top
        return n - int(lapack.dstebz(self.diagonal, self.off, 1, below, edge, 1, n, edge, "E")[0])


@dataclass(frozen=True)
class _Diagonal:
    """The same with T diagonal, and what is rounding in it exactly 0: of any rank, on any device.

    `vectors` are where the matrix was.
    """

    diagonal: np.ndarray
    vectors: Tensor

    @classmethod
    def of(cls, symmetric: Tensor) -> "_Diagonal":
        """From the upper triangle of `symmetric`."""
        values, vectors = torch.linalg.eigh(symmetric, UPLO="U")
        values = torch.where(values > _EPSILON * len(values) * values[-1], values, 0.0)
        return cls(values.cpu().numpy(), vectors)

    def rotate(self, columns: Tensor) -> np.ndarray:
        """``Qᵀ columns``."""
        if columns.device.type == "cpu":
            return self.vectors.numpy().T @ columns.numpy()
        return (self.vectors.T @ columns).cpu().numpy()

    def turned_back(self, columns: np.ndarray) -> Tensor:
        """``Q columns``."""
        if self.vectors.device.type == "cpu":
            return torch.from_numpy(self.vectors.numpy() @ columns)
        return self.vectors @ torch.from_numpy(columns).to(self.vectors.device)

    def rank(self) -> int:
        """How many eigenvalues exceed `RANK_TOLERANCE` squared of the largest one."""
        return int((self.diagonal > RANK_TOLERANCE**2 * self.diagonal[-1]).sum())

    def solve(self, damping: float, c: np.ndarray) -> np.ndarray:
        """``(T + damping)⁻¹ c``."""
        return c / (self.diagonal + damping)

    def times(self, x: np.ndarray) -> np.ndarray:
        """``T x``."""
        return self.diagonal * x

    def largest(self) -> float:
        """Return the largest eigenvalue."""
        return float(self.diagonal.max())


class _Curve:
    """The trade between ‖Δ‖ and the residual, by the damping λ, for one target.

    `c` is the target along Q's columns. With ``x = (T + λ)⁻¹ c``: ``‖Δ‖² = xᵀ T x``, and the
    residual is ``λ ‖x‖``.
    """

    def __init__(self, gram: _Tridiagonal | _Diagonal, c: np.ndarray) -> None:
        self.gram, self.c = gram, c
        self.largest = gram.largest() or 1.0
        self.least = _EPSILON * len(c) * self.largest  # smaller dampings are lost in T's rounding
        self.steepness = float(np.sqrt(max(c @ gram.times(c), 0.0)))  # ‖Mᵀ v‖

    def dual(self, damping: float) -> np.ndarray:
        """x."""
        return self.gram.solve(damping, self.c)

    def norm(self, damping: float) -> float:
        x = self.dual(damping)
        return float(np.sqrt(max(x @ self.gram.times(x), 0.0)))

    def residual(self, damping: float) -> float:
        return damping * float(np.linalg.norm(self.dual(damping)))

    def damping_for_norm(self, radius: float) -> float:
        """Return the least damping whose ‖Δ‖ is at most `radius`."""
        if self.norm(self.least) <= radius:
            return self.least
        highest = self.steepness / radius  # since ‖Δ‖ ≤ ‖Mᵀ v‖ / λ
        return self._solve(lambda damping: np.log(self.norm(damping) / radius), highest)

    def norm_for_residual(self, residual: float) -> float:
        """Return the least ‖Δ‖ whose residual is `residual`; inf if none reaches it."""
        if self.residual(self.least) > residual:
            return float("inf")
        # The residual is at least ‖v‖ λ / (λ + σ_1²), which is above what is asked for from here.
        size = float(np.linalg.norm(self.c))
        if size <= residual:
            return 0.0
        highest = self.largest * residual / (size - residual)
        return self.norm(self._solve(lambda d: np.log(residual / self.residual(d)), highest))

    def _solve(self, falling: Callable[[float], float], highest: float) -> float:
        """Return the damping up to `highest` at which the falling function is 0."""
        low, high = np.log(self.least), np.log(highest) + 1e-6
        if high <= low:
            return self.least
        return float(np.exp(brentq(lambda log: falling(np.exp(log)), low, high, xtol=1e-9)))


def residual_quartiles(residual: Sequence[float] | Tensor) -> dict[str, float]:
    """Return the columns ``residual_q25, residual_median, residual_q75`` of a table."""
    values = torch.as_tensor(residual, dtype=torch.float64)
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=values.device)
    names = ("residual_q25", "residual_median", "residual_q75")
    return dict(zip(names, values.quantile(points).tolist(), strict=True))


def median(values: Tensor) -> float:
    """Return the median, halfway between the two middle values; infinities sort last."""
    ordered = values.double().sort().values
    n = len(ordered)
    low, high = float(ordered[(n - 1) // 2]), float(ordered[n // 2])
    return low if low == high else (low + high) / 2
