"""A chosen spectrum gives known counts and effective dimensions."""

import numpy as np
import pytest
import torch

from toolkit.analysis.spectrum import spectrum


def of(eigenvalues, seed=0, mean=None, base_energy=1.0):
    """The spectrum of a matrix with these eigenvalues in random directions."""
    d = len(eigenvalues)
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]
    second = torch.from_numpy(Q @ np.diag(eigenvalues) @ Q.T)
    mean = torch.zeros(d).double() if mean is None else mean
    return spectrum(second, mean, base_energy, 100)


@pytest.mark.parametrize(("d", "rank"), [(6, 1), (6, 4), (50, 50)])
def test_equal_eigenvalues_count_themselves(d, rank):
    """r equal eigenvalues are r dimensions by both measures; shares are reached at ⌈share·r⌉."""
    result = of([2.0] * rank + [0.0] * (d - rank))
    assert result.participation_ratio == pytest.approx(rank)
    assert result.entropy_rank == pytest.approx(rank, rel=1e-6)
    assert result.rms == pytest.approx((2 * rank) ** 0.5)
    assert result.k90 == pytest.approx(0.9 * rank, abs=1)
    assert result.k99 == pytest.approx(rank, abs=0.6)


def test_counts_of_a_chosen_spectrum():
    """60, 25, 8, 4, 2.5, 0.5 percent: 1, 3, 4 and 5 of them reach 50, 90, 95 and 99."""
    result = of([60, 25, 8, 4, 2.5, 0.5])
    assert (result.k50, result.k90, result.k95, result.k99) == (1, 3, 4, 5)
    p = np.array([60, 25, 8, 4, 2.5, 0.5]) / 100
    assert result.participation_ratio == pytest.approx(1 / np.sum(p**2))
    assert result.entropy_rank == pytest.approx(np.exp(-np.sum(p * np.log(p))))


@pytest.mark.parametrize("decades", [0, 3, 8, 14])
def test_effective_dimensions_do_not_depend_on_scale(decades):
    small, large = of([4, 2, 1, 1]), of(10.0**decades * np.array([4, 2, 1, 1]))
    assert small.participation_ratio == pytest.approx(large.participation_ratio)
    assert small.entropy_rank == pytest.approx(large.entropy_rank)
    assert (small.k50, small.k99) == (large.k50, large.k99) == (1, 4)
    assert large.rms == pytest.approx(10 ** (decades / 2) * 8**0.5)


def test_mean_share_and_relative_rms():
    """A constant delta is all mean; rms is relative to that of the base state."""
    delta = torch.tensor([3.0, 4.0]).double()
    result = spectrum(torch.outer(delta, delta), delta, 100.0, 7)
    assert result.mean_share == pytest.approx(1)
    assert result.rms == pytest.approx(5)
    assert result.relative_rms == pytest.approx(0.5)
    assert result.n_tokens == 7
    assert (result.k50, result.k99) == (1, 1)


def test_nothing_has_no_dimension():
    result = of([0.0] * 4)
    values = [v for k, v in vars(result).items() if k != "n_tokens"]
    assert set(values) == {0}
