"""Overlap of subspaces: the principal angles of another library, and chance by drawing."""

import numpy as np
import pytest
import scipy.linalg
import torch

from toolkit.analysis.subspaces import (
    chance_overlap,
    drawn_overlap,
    leading_directions,
    subspace_overlap,
)


def random_basis(rng, d, k):
    return torch.from_numpy(np.linalg.qr(rng.normal(size=(d, k)))[0])


def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles():
    rng = np.random.default_rng(0)
    a, b = random_basis(rng, 12, 3), random_basis(rng, 12, 5)
    angles = scipy.linalg.subspace_angles(a.numpy(), b.numpy())
    assert subspace_overlap(a, b) == pytest.approx((np.cos(angles) ** 2).mean(), abs=1e-12)
    assert subspace_overlap(a, a) == pytest.approx(1, abs=1e-12)
    assert subspace_overlap(a, a[:, :1]) == pytest.approx(1, abs=1e-12)
    assert np.isnan(subspace_overlap(a, a[:, :0]))


@pytest.mark.parametrize(("k_a", "k_b", "d"), [(1, 1, 5), (2, 3, 8), (4, 4, 16)])
def test_chance_is_what_random_subspaces_give(k_a, k_b, d):
    rng = np.random.default_rng(1)
    fixed, n = random_basis(rng, d, k_a), 4000
    drawn = [subspace_overlap(fixed, random_basis(rng, d, k_b)) for _ in range(n)]
    mean, sd = chance_overlap(k_a, k_b, d)
    assert mean == pytest.approx(np.mean(drawn), abs=4 * sd / n**0.5)
    assert sd == pytest.approx(np.std(drawn), rel=0.05)


def test_leading_directions_are_eigenvectors_without_rounding():
    rng = np.random.default_rng(2)
    basis = random_basis(rng, 10, 3)
    moment = basis @ torch.diag(torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64)) @ basis.T
    found = leading_directions(moment, 2)
    assert (found * basis[:, :2]).sum(0).abs().tolist() == pytest.approx([1, 1], abs=1e-12)
    assert leading_directions(moment, 8).shape == (10, 3)  # no more than there are
    assert leading_directions(torch.zeros(4, 4), 2).shape == (4, 0)


def test_drawn_overlap_grows_with_what_the_covariance_shares():
    even, _ = drawn_overlap(torch.eye(16), 2, 2)
    assert even == pytest.approx(chance_overlap(2, 2, 16)[0], abs=0.02)
    flat = torch.diag(torch.tensor([1.0, 1.0, *[1e-9] * 14]))
    mean, high = drawn_overlap(flat, 2, 2)
    assert mean == pytest.approx(1, abs=1e-3)
    assert high >= mean
    assert np.isnan(drawn_overlap(even * torch.eye(4), 0, 2)[0])
