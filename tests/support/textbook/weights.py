"""Singular values of every matrix's change."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.support.textbook.definitions import Array, to_numpy


def weight_row(W: Array, dW: Array) -> dict[str, Any]:
    """From full singular value decompositions."""
    U, s, _ = np.linalg.svd(W, full_matrices=False)
    basis = U[:, s > s[0] * max(W.shape) * np.finfo(np.float32).eps]
    sigma = np.linalg.svd(dW, compute_uv=False)
    squares = np.cumsum(sigma**2)
    outside = dW - basis @ (basis.T @ dW)
    return {
        "rows": W.shape[0],
        "columns": W.shape[1],
        "norm_2": sigma[0],
        "norm_fro": np.linalg.norm(dW),
        "relative": np.linalg.norm(dW) / np.linalg.norm(W),
        "rank": np.linalg.matrix_rank(dW),
        "stable_rank": np.sum(sigma**2) / sigma[0] ** 2,
        "k90": int(np.argmax(squares >= 0.9 * squares[-1])) + 1,
        "outside": np.sum(outside**2) / np.sum(dW**2),
    }


def weights(base: Any, tuned: Any) -> Iterator[dict[str, Any]]:
    """Rows for one block: every matrix of a module that is no norm."""
    theirs = dict(tuned.named_parameters())
    for name, parameter in base.named_parameters():
        if parameter.ndim == 2:
            W, T = to_numpy(parameter), to_numpy(theirs[name])
            if type(base).__name__.startswith("GPT2"):
                W, T = W.T, T.T
            yield {"module": name.removesuffix(".weight"), **weight_row(W, T - W)}
