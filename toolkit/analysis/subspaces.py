"""How alike the leading directions of two vectors are, and how alike chance makes them.

Subspaces are bases with orthonormal columns, `[d, k]`, float64.
"""

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

_DRAWS = 200


def leading_directions(second_moment: Tensor, k: int) -> Tensor:
    """Return the `k` leading eigenvectors of a symmetric matrix `[d, d]`, `[d, k]`, largest first.

    Directions that hold no more than rounding are left out, so that there may be fewer.
    """
    matrix = second_moment.double().cpu().numpy()
    d = len(matrix)
    k = min(k, d)
    values, vectors = scipy.linalg.eigh(matrix, subset_by_index=(d - k, d - 1))
    floor = max(values[-1], 0) * d * np.finfo(np.float64).eps
    return torch.from_numpy(vectors[:, values > floor][:, ::-1].copy())


def subspace_overlap(a: Tensor, b: Tensor) -> float:
    """``‖aᵀb‖²_F / min(k_a, k_b)``: the mean squared cosine of the principal angles.

    1 where one subspace holds the other, 0 where they are orthogonal, NaN where one is nothing.
    Source: Björck and Golub 1973, doi:10.1090/S0025-5718-1973-0348991-3.
    """
    k = min(a.shape[1], b.shape[1])
    return float((a.T @ b).square().sum()) / k if k else float("nan")


def chance_overlap(k_a: int, k_b: int, d: int) -> tuple[float, float]:
    """Mean and standard deviation of `subspace_overlap` where one subspace is drawn uniformly.

    ``‖aᵀb‖²_F`` has the mean ``k_a k_b / d`` and the variance
    ``2 k_a k_b (d − k_a)(d − k_b) / (d² (d − 1)(d + 2))``, which follows from the second moments
    of the entries of a projection whose distribution no rotation changes.
    """
    k = min(k_a, k_b)
    if k == 0 or d < 2:
        return float("nan"), float("nan")
    variance = 2 * k_a * k_b * (d - k_a) * (d - k_b) / (d**2 * (d - 1) * (d + 2))
    return k_a * k_b / d / k, variance**0.5 / k


def drawn_overlap(covariance: Tensor, k_a: int, k_b: int, seed: int = 0) -> tuple[float, float]:
    """Mean and 95 % quantile of the overlap of `k_a` and `k_b` directions drawn from a covariance.

    Each is a normal vector with that `[d, d]` covariance: what two changes have in common that
    merely lie where vectors of that covariance lie. NaN where one has no direction.
    """
    if min(k_a, k_b) == 0:
        return float("nan"), float("nan")
    values, vectors = torch.linalg.eigh(covariance.double().cpu())
    root = vectors * values.clamp_min(0).sqrt()
    generator = torch.Generator().manual_seed(seed)

    def draw(k: int) -> Tensor:
        normal = torch.randn(_DRAWS, len(root), k, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(root @ normal).Q

    cosines = draw(k_a).mT @ draw(k_b)
    overlaps = cosines.square().sum((1, 2)) / min(k_a, k_b)
    return float(overlaps.mean()), float(overlaps.quantile(0.95))
