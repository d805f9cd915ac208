"""The best linear fit, what it explains, and the spectrum of the deltas."""

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special

from tests.support.textbook.definitions import Array, Map


def fit(X: Array, T: Array, rank: int | str, relative_ridge: float = 1e-4) -> Map:
    """``A x + b`` by least squares with a ridge, then by reduced-rank regression."""
    n, d = X.shape
    if rank == 0:
        return np.zeros((T.shape[1], d)), T.mean(0)
    centred_X, centred_T = X - X.mean(0), T - T.mean(0)
    C_xx = centred_X.T @ centred_X / n
    ridge = relative_ridge * np.trace(C_xx) / d
    rows = np.vstack([centred_X, np.sqrt(n * ridge) * np.eye(d)])
    aims = np.vstack([centred_T, np.zeros((d, T.shape[1]))])
    A = np.linalg.lstsq(rows, aims, rcond=None)[0].T
    if rank != "full":
        root = np.real(scipy.linalg.sqrtm(C_xx + ridge * np.eye(d)))
        U = np.linalg.svd(A @ root)[0][:, :rank]
        A = U @ U.T @ A
    return A, T.mean(0) - A @ X.mean(0)


def explained(model: Map, X: Array, T: Array) -> float:
    A, b = model
    return 1 - np.mean(np.sum((T - X @ A.T - b) ** 2, 1)) / np.mean(np.sum(T**2, 1))


def spectrum(delta: Array, base: Array) -> dict[str, float]:
    """From the singular values of the deltas `[n, d]`."""
    lam = np.linalg.svd(delta, compute_uv=False) ** 2 / len(delta)
    p = lam / lam.sum()
    positive = p[p > 0]
    sums = np.cumsum(lam)
    counts = {
        f"k{percent}": next(k for k in range(1, len(lam) + 1) if sums[k - 1] >= share * sums[-1])
        for percent, share in ((50, 0.5), (90, 0.9), (95, 0.95), (99, 0.99))
    }
    rms = np.sqrt(lam.sum())
    return {
        "n_tokens": len(delta),
        "rms": rms,
        "relative_rms": rms / np.sqrt(np.mean(np.sum(base**2, 1))),
        "mean_share": np.sum(delta.mean(0) ** 2) / np.mean(np.sum(delta**2, 1)),
        "participation_ratio": lam.sum() ** 2 / np.sum(lam**2),
        "entropy_rank": np.exp(-np.sum(positive * np.log(positive))),
        **counts,
    }
