"""Budgeted residuals: diagonal cases by hand, any case by damped least squares."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import textbook
from toolkit.analysis.reachability import BUDGETS, reach, reach_all, summarise


def linear_mlp(A):
    """An MLP that is its own Jacobian."""
    return lambda h: h @ A.T


def of(A, v, h, budgets=BUDGETS):
    A, v, h = (torch.as_tensor(x, dtype=torch.float64) for x in (A, v, h))
    return reach(A, v, h, linear_mlp(A), budgets)


def test_a_single_direction_by_hand():
    """A = diag(2, 1), v = 6 e₁, ‖h‖ = 10: Δ = 3 e₁ suffices, and a budget b < 3 leaves 1 − b/3."""
    result = of(np.diag([2.0, 1.0]), [6.0, 0.0], [0.0, 10.0], budgets=(0.03, 0.15, 0.3, 1.0))
    assert result.residual == pytest.approx((0.9, 0.5, 0.0, 0.0), abs=1e-9)
    assert result.min_norm == pytest.approx(0.3 * 0.99)
    assert result.rank == 2


def test_the_identity_by_hand():
    """A = I: the residual is max(0, 1 − ρ‖h‖/‖v‖) whatever the direction."""
    v, h = np.array([3.0, 0.0, -4.0]), np.array([0.0, 10.0, 0.0])
    result = of(np.eye(3), v, h)
    expected = [max(0.0, 1 - rho * 10 / 5) for rho in BUDGETS]
    assert result.residual == pytest.approx(expected, abs=1e-9)
    assert result.min_norm == pytest.approx(0.99 * 5 / 10)


def test_what_lies_outside_the_column_space_stays():
    """A = diag(1, 0), v = (3, 4): 0.8 is left at any budget, and no norm reaches 0.01."""
    result = of(np.diag([1.0, 0.0]), [3.0, 4.0], [100.0, 0.0])
    assert result.residual[-1] == pytest.approx(0.8)
    assert result.min_norm == np.inf
    assert result.rank == 1


def test_rank_is_relative():
    """Singular values below 10⁻⁶ of the first do not count."""
    for smallest, rank in ((2e-6, 3), (5e-7, 2)):
        A = 1e5 * np.diag([1.0, 0.1, smallest])
        assert of(A, [1.0, 1, 1], [1.0, 0, 0]).rank == rank


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(0, 6))
def test_any_matrix_is_the_textbooks(seed, decades):
    """Condition numbers up to 10⁶, as measured on a 135M model.

    `min_norm` is the norm of a step along the smallest singular values: from their squares, it
    keeps 16 − 2·6 digits.
    """
    rng, d = np.random.default_rng(seed), 6
    left, right = (np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(2))
    A = left @ np.diag(10 ** np.linspace(0, -decades, d)) @ right
    v, h = rng.standard_normal(d), 3 * rng.standard_normal(d)
    result = of(A, v, h)
    for residual, rho in zip(result.residual, BUDGETS, strict=True):
        step = textbook.budgeted(A, v, rho * np.linalg.norm(h))
        expected = np.linalg.norm(v - A @ step) / np.linalg.norm(v)
        assert residual == pytest.approx(expected, rel=1e-6, abs=1e-8)
    expected = textbook.min_norm(A, v) / np.linalg.norm(h)
    assert result.min_norm == pytest.approx(expected, rel=1e-15 * 10 ** (2 * decades) + 1e-8)
    assert list(result.residual) == sorted(result.residual, reverse=True)


def test_a_linear_mlp_has_no_nonlinear_excess():
    rng = np.random.default_rng(0)
    result = of(rng.standard_normal((5, 5)), rng.standard_normal(5), rng.standard_normal(5))
    assert result.nonlinear_residual == pytest.approx(result.residual, abs=1e-9)


def test_a_saturating_mlp_falls_short():
    """y = tanh(h) at 0 has Jacobian I and reaches tanh(1) of v = 1."""
    one, h = torch.ones(1).double(), torch.zeros(1).double()
    (result,) = reach_all(torch.eye(1).double(), [one], h + 1e-9, torch.tanh, (1e9,))
    assert result.residual[0] == pytest.approx(0, abs=1e-6)
    assert result.nonlinear_residual[0] == pytest.approx(1 - np.tanh(1), abs=1e-6)


def test_summary_is_of_quartiles():
    rng = np.random.default_rng(1)
    A = rng.standard_normal((4, 4))
    results = [of(A, rng.standard_normal(4), rng.standard_normal(4)) for _ in range(7)]
    for i, row in enumerate(summarise("down", results)):
        residuals = [r.residual[i] for r in results]
        assert (row.target, row.budget, row.n_tokens) == ("down", BUDGETS[i], 7)
        found = row.residual_q25, row.residual_median, row.residual_q75
        assert found == pytest.approx(tuple(np.quantile(residuals, [0.25, 0.5, 0.75])))
        nonlinear = np.median([r.nonlinear_residual[i] for r in results])
        assert row.nonlinear_residual_median == pytest.approx(nonlinear)
        assert row.min_norm_median == pytest.approx(np.median([r.min_norm for r in results]))


def test_a_median_of_infinities_is_infinite():
    results = [of(np.diag([1.0, 0.0]), [3.0, 4.0], [1.0, 0.0])] * 2
    assert summarise("down", results)[0].min_norm_median == np.inf
