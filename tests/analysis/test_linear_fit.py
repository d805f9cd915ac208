"""Reduced-rank regression on matrices with known answers."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import textbook
from tests.support.pairs import moments_of
from toolkit.analysis.linear_fit import RANKS, explained, fit_linear, ranks_below
from toolkit.statistics import MomentSums


def shares(fit, moments, ranks):
    return explained(fit, moments, "x", "t", moments.energy("t"), ranks)


def problem(seed, n=80, d=10, rank=None, noise=0.0, decades=0.0):
    """x over `decades` of scales and off centre; t = A x + b + noise with A of `rank`."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) * 10 ** np.linspace(0, -decades, d) + rng.standard_normal(d)
    A = rng.standard_normal((d, rank or d)) @ rng.standard_normal((rank or d, d))
    t = x @ A.T + rng.standard_normal(d) + noise * rng.standard_normal((n, d))
    return torch.from_numpy(x), torch.from_numpy(t)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_map_of_rank_r_is_recovered_at_rank_r_and_not_before(rank):
    x, t = problem(0, rank=rank)
    moments = moments_of(x, t)
    fit = fit_linear(moments, "x", "t", relative_ridge=1e-12)
    share = shares(fit, moments, range(8))
    assert all(share[r] > 1 - 1e-9 for r in range(rank, 8))
    assert all(share[r] < 0.999 for r in range(rank))
    assert torch.linalg.matrix_rank(fit.matrix(rank), rtol=1e-9) == rank


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.floats(0, 3), st.sampled_from([0.0, 0.1, 3.0]))
def test_every_rank_is_the_textbooks(seed, decades, noise):
    """The map and what it explains, on the tokens it was fitted on and on others."""
    x, t = problem(seed, noise=noise, decades=decades, rank=6)
    other_x, other_t = problem(seed + 1, noise=noise, decades=decades)
    moments, others = moments_of(x, t), moments_of(other_x, other_t)
    fit = fit_linear(moments, "x", "t")
    ranks = [0, 1, 3, 9, "full"]
    on_fit, on_others = shares(fit, moments, ranks), shares(fit, others, ranks)
    for rank in ranks:
        A, b = textbook.fit(x.numpy(), t.numpy(), rank)
        scale = max(1.0, np.abs(A).max())
        np.testing.assert_allclose(fit.matrix(rank), A, rtol=0, atol=1e-7 * scale)
        np.testing.assert_allclose(fit.bias(rank), b, rtol=0, atol=1e-6 * scale)
        assert on_fit[rank] == pytest.approx(textbook.explained((A, b), x.numpy(), t.numpy()))
        expected = textbook.explained((A, b), other_x.numpy(), other_t.numpy())
        assert on_others[rank] == pytest.approx(expected, rel=1e-6, abs=1e-6)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.floats(0, 3))
def test_explained_is_monotone_in_rank_on_the_fit_set(seed, decades):
    x, t = problem(seed, noise=0.5, decades=decades)
    moments = moments_of(x, t)
    share = shares(fit_linear(moments, "x", "t"), moments, [*range(10), "full"])
    values = list(share.values())
    assert all(b >= a - 1e-12 for a, b in pairwise(values))
    assert values[-1] <= 1


def test_no_map_explains_more_than_the_full_one():
    """Optimality: any small change of A or b leaves a larger penalised residual."""
    x, t = problem(3, noise=1.0)
    moments = moments_of(x, t)
    fit = fit_linear(moments, "x", "t")
    ridge = 1e-4 * float(moments.covariance["x", "x"].trace()) / 10

    def loss(A, b):
        return float((t - x @ A.T - b).square().sum(1).mean() + ridge * A.square().sum())

    best = loss(fit.matrix("full"), fit.bias("full"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        dA, db = (1e-3 * torch.randn(*s, generator=generator).double() for s in ((10, 10), (10,)))
        assert loss(fit.matrix("full") + dA, fit.bias("full") + db) > best


def test_rank_zero_is_the_mean():
    """Explains ``‖Et‖²/E‖t‖²``, which is not automatically 0."""
    x, t = problem(1, noise=1.0)
    moments = moments_of(x, t)
    fit = fit_linear(moments, "x", "t")
    assert not fit.matrix(0).any()
    assert torch.allclose(fit.bias(0), t.mean(0))
    expected = t.mean(0).square().sum() / t.square().sum(1).mean()
    assert shares(fit, moments, [0])[0] == pytest.approx(float(expected))


def test_explained_is_negative_where_the_fit_is_worse_than_nothing():
    x, t = problem(1)
    fit = fit_linear(moments_of(x, t), "x", "t")
    assert all(share < 0 for share in shares(fit, moments_of(x, -t), [0, 3, "full"]).values())


def test_the_ridge_shrinks():
    """ridge = c · tr(C_xx)/d: with white x, B is 1/(1 + c) of the least-squares map."""
    x = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).standard_normal((60, 5)))[0])
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x)).T
    A = torch.from_numpy(np.random.default_rng(1).standard_normal((5, 5)))
    fit = fit_linear(moments_of(x, x @ A.T), "x", "t", relative_ridge=0.25)
    assert torch.allclose(fit.matrix("full"), A / 1.25)


def test_a_state_that_never_varies_gives_the_fixed_vector():
    x, t = torch.zeros(9, 4).double(), torch.randn(9, 4).double()
    moments = moments_of(x, t)
    fit = fit_linear(moments, "x", "t")
    share = shares(fit, moments, [0, 2, "full"])
    assert share[0] == pytest.approx(share[2]) == pytest.approx(share["full"])
    assert not fit.matrix("full").any()


def test_a_zero_target_is_explained_zero():
    x = torch.randn(9, 4).double()
    moments = moments_of(x, torch.zeros(9, 4).double())
    assert set(shares(fit_linear(moments, "x", "t"), moments, [0, 2, "full"]).values()) == {0.0}


def test_ranks_are_below_the_dimension():
    assert ranks_below(16) == [0, 1, 2, 4, 8, "full"]
    assert ranks_below(1000) == list(RANKS)


def test_what_varies_by_rounding_alone_is_a_constant():
    """float32 states that are one and the same but for their last bit give a fixed vector."""
    x = 50 + torch.randn(1, 12, generator=torch.Generator().manual_seed(0)).repeat(30, 1)
    x = (x * (1 + 6e-8 * torch.randn(30, 12, generator=torch.Generator().manual_seed(1)))).double()
    t = x[:, :4] * 2
    sums = MomentSums([("x", "x"), ("t", "x"), ("t", "t")])
    sums.update({"x": x, "t": t})
    fit = fit_linear(sums.result(), "x", "t")
    assert not fit.full.any()
    assert torch.allclose(fit.bias(4), t.mean(0))
