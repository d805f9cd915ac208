"""Budgeted residuals: diagonal cases by hand, any case by damped least squares and a dense SVD."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import textbook
from toolkit.analysis.reachability import BUDGETS, median, reach, residual_quartiles


def of(M, targets, radii, dtype=torch.float64):
    """`reach` of one token: residuals `[m, b]`, steering `[m, b, d_in]`, min_norm `[m]`, rank."""
    targets, radii = torch.tensor(np.array(targets))[None], torch.tensor(np.array(radii))[None]
    matrix = torch.tensor(np.array(M), dtype=dtype)
    found = reach(lambda _: matrix, targets, radii)
    assert found.residual.dtype == found.steering.dtype == torch.float64
    return (
        found.residual[0].numpy(),
        found.steering[0].numpy(),
        found.min_norm[0].numpy(),
        int(found.rank[0]),
    )


def orthonormal(rng, rows, columns):
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def with_singular_values(rng, d_out, d_in, values):
    k = len(values)
    return orthonormal(rng, d_out, k) @ np.diag(values) @ orthonormal(rng, d_in, k).T


def test_a_single_direction_by_hand():
    """A = diag(2, 1), v = 6 e₁: Δ = 3 e₁ suffices, and a budget b < 3 leaves 1 − b/3."""
    residual, steering, min_norm, rank = of(
        np.diag([2.0, 1.0]), [[6.0, 0.0]], [0.3, 1.5, 3.0, 10.0]
    )
    assert residual[0] == pytest.approx([0.9, 0.5, 0.0, 0.0], abs=1e-9)
    np.testing.assert_allclose(steering[0], [[0.3, 0], [1.5, 0], [3, 0], [3, 0]], atol=1e-8)
    assert min_norm == pytest.approx([3 * 0.99])
    assert rank == 2


def test_the_identity_by_hand():
    """A = I: the residual is max(0, 1 − r/‖v‖) whatever the direction."""
    v, radii = np.array([3.0, 0.0, -4.0]), [0.1, 1.0, 4.0, 5.0, 50.0]
    residual, _, min_norm, _ = of(np.eye(3), [v], radii)
    assert residual[0] == pytest.approx([max(0.0, 1 - r / 5) for r in radii], abs=1e-9)
    assert min_norm == pytest.approx([0.99 * 5])


def test_what_lies_outside_the_column_space_stays():
    """A = diag(1, 0), v = (3, 4): 0.8 is left at any budget, and no norm reaches 0.01."""
    residual, _, min_norm, rank = of(np.diag([1.0, 0.0]), [[3.0, 4.0]], [1.0, 3.0, 100.0])
    assert residual[0, 1:] == pytest.approx([0.8, 0.8])
    assert residual[0, 0] == pytest.approx(np.hypot(2, 4) / 5)
    assert min_norm[0] == np.inf
    assert rank == 1


def test_a_single_number_by_hand():
    """M = (2), v = 6: as the single direction above, on one dimension."""
    residual, steering, min_norm, rank = of([[2.0]], [[6.0]], [1.5, 10.0])
    assert residual[0] == pytest.approx([0.5, 0.0], abs=1e-9)
    assert steering[0, :, 0] == pytest.approx([1.5, 3.0])
    assert (min_norm[0], rank) == (pytest.approx(2.97), 1)


@pytest.mark.parametrize("shape", [(4, 4), (7, 3)])
def test_a_map_that_is_zero_reaches_nothing(shape):
    """W_d = 0: all of v is left, rank 0, no norm suffices, and the steering is 0."""
    residual, steering, min_norm, rank = of(np.zeros(shape), np.ones((2, shape[0])), BUDGETS)
    assert residual == pytest.approx(np.ones((2, len(BUDGETS))), abs=1e-12)
    assert not steering.any()
    assert (min_norm == np.inf).all()
    assert rank == 0


def test_rank_is_relative():
    """Singular values below 10⁻⁶ of the first do not count."""
    for smallest, rank in ((2e-6, 3), (5e-7, 2)):
        A = 1e5 * np.diag([1.0, 0.1, smallest])
        assert of(A, [[1.0, 1, 1]], [1.0])[3] == rank


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(8, 5, 5), (9, 6, 2)])
def test_a_target_that_lies_outside_by_a_known_share(d_out, d_in, rank):
    """v = cos θ u + sin θ w, u in col(M) and w orthogonal to it: sin θ is left in the end."""
    rng = np.random.default_rng(d_in + rank)
    basis = orthonormal(rng, d_out, d_out)
    M = basis[:, :rank] @ rng.standard_normal((rank, d_in))
    shares = np.array([0.0, 0.005, 0.3, 0.99])
    targets = [7 * (np.sqrt(1 - s**2) * basis[:, 0] + s * basis[:, -1]) for s in shares]
    residual, _, min_norm, found = of(M, targets, [1e6])
    assert residual[:, 0] == pytest.approx(shares, abs=1e-7)
    assert found == rank
    assert np.isfinite(min_norm).tolist() == [True, True, False, False]
    for v, norm in zip(targets[:2], min_norm[:2], strict=True):
        assert norm == pytest.approx(textbook.min_norm(M, v), rel=1e-6)


@pytest.mark.parametrize("d", [8, 64])
@pytest.mark.parametrize("outside", [0.8, 1.0])
def test_a_square_map_without_full_rank(d, outside):
    """As behind a norm, which annihilates one direction: what lies outside stays, whatever r."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        basis = orthonormal(rng, d, d)
        M = basis[:, :-1] @ rng.standard_normal((d - 1, d))
        v = np.sqrt(1 - outside**2) * basis[:, 0] + outside * basis[:, -1]
        residual, _, _, rank = of(M, [v], [1.0, 1e6])
        expected = [textbook.residual_by_svd(M, v, r) for r in (1.0, 1e6)]
        assert residual[0] == pytest.approx(expected, abs=1e-3)
        assert rank == d - 1


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(0, 6), st.integers(0, 3))
def test_any_matrix_is_the_textbooks(seed, decades, taller):
    """Square and tall, condition numbers up to 10⁶, as measured on a 135M model.

    `min_norm` is the norm of a step along the smallest singular values: from their squares, it
    keeps 16 − 2·6 digits.
    """
    rng, d = np.random.default_rng(seed), 6
    M = with_singular_values(rng, d + taller, d, 10 ** np.linspace(0, -decades, d))
    targets = rng.standard_normal((2, d + taller))
    targets[1] = M @ rng.standard_normal(d)
    radii = np.array(BUDGETS) * 7
    residual, _, min_norm, _ = of(M, targets, radii)
    for i, v in enumerate(targets):
        for j, radius in enumerate(radii):
            step = textbook.budgeted(M, v, radius)
            expected = np.linalg.norm(v - M @ step) / np.linalg.norm(v)
            assert residual[i, j] == pytest.approx(expected, rel=1e-6, abs=1e-8)
        expected = textbook.min_norm(M, v)
        assert min_norm[i] == pytest.approx(expected, rel=1e-15 * 10 ** (2 * decades) + 1e-8)
        assert list(residual[i]) == sorted(residual[i], reverse=True)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.floats(0, 5), st.sampled_from([torch.float32, torch.float64]))
def test_the_steering_keeps_to_the_budget_and_attains_the_residual(seed, decades, dtype):
    """‖Δ‖ ≤ r and ‖v − MΔ‖ is the residual, by plain arithmetic on what was returned."""
    rng, d = np.random.default_rng(seed), 12
    M = with_singular_values(rng, d + seed % 3, d, 10 ** np.linspace(0, -decades, d))
    M = M.astype(np.float32 if dtype == torch.float32 else float).astype(float)
    targets, radii = rng.standard_normal((3, len(M))), np.geomspace(1e-3, 1e3, 5)
    residual, steering, _, _ = of(M, targets, radii, dtype)
    left = targets[:, None] - steering @ M.T
    attained = np.linalg.norm(left, axis=-1) / np.linalg.norm(targets, axis=-1)[:, None]
    np.testing.assert_allclose(attained, residual, atol=1e-6)
    assert (np.linalg.norm(steering, axis=-1) <= radii * (1 + 1e-6)).all()


@pytest.mark.parametrize(("d_out", "d_in"), [(96, 96), (96, 24)])
@pytest.mark.parametrize("decades", [2, 5])
def test_float32_maps_are_as_good_as_a_float64_svd(d_out, d_in, decades):
    """Rounded to float32, at condition 10⁵: residuals to 10⁻⁵ of ‖v‖ (asked for: 10⁻³)."""
    rng = np.random.default_rng(decades)
    M = with_singular_values(rng, d_out, d_in, 10 ** np.linspace(0, -decades, d_in))
    targets, radii = rng.standard_normal((3, d_out)), np.geomspace(1e-2, 1e4, 13)
    residual, _, _, rank = of(M, targets, radii, torch.float32)
    expected = [[textbook.residual_by_svd(M, v, r) for r in radii] for v in targets]
    np.testing.assert_allclose(residual, expected, atol=1e-5)
    assert np.ptp(expected[0]) > 0.1  # the budgets are neither all vain nor all ample
    assert rank == d_in


@pytest.mark.parametrize("d_out", [40, 60])
def test_residuals_fall_as_the_radius_grows(d_out):
    """To 0, or for a tall map to what lies outside its columns."""
    rng = np.random.default_rng(5)
    M = with_singular_values(rng, d_out, 40, np.geomspace(1, 1e-3, 40))
    v, radii = rng.standard_normal(d_out), np.geomspace(1e-4, 1e5, 60)
    residual = of(M, [v], radii)[0][0]
    assert (np.diff(residual) <= 1e-12).all()
    outside = np.linalg.norm(v - M @ np.linalg.lstsq(M, v, rcond=None)[0]) / np.linalg.norm(v)
    assert residual[0] == pytest.approx(1, abs=1e-3)
    assert residual[-1] == pytest.approx(outside, abs=1e-8)


def test_tokens_are_answered_one_by_one():
    """Several tokens at once: as each alone, with its own map, targets and radii."""
    rng = np.random.default_rng(6)
    maps, targets = rng.standard_normal((3, 5, 4)), rng.standard_normal((3, 2, 5))
    radii = rng.uniform(0.1, 1, (3, 4))
    matrices, *others = (torch.from_numpy(x) for x in (maps, targets, radii))
    together = reach(matrices.__getitem__, *others)
    for i in range(3):
        residual, steering, min_norm, rank = of(maps[i], targets[i], radii[i])
        np.testing.assert_array_equal(together.residual[i], residual)
        np.testing.assert_array_equal(together.steering[i], steering)
        np.testing.assert_array_equal(together.min_norm[i], min_norm)
        assert together.rank[i] == rank


def test_scale_does_not_matter():
    """M and v times anything, as far as float32 reaches: the same residuals."""
    rng = np.random.default_rng(7)
    M, v = rng.standard_normal((6, 6)), rng.standard_normal(6)
    expected = of(M, [v], [0.3, 1.0])
    for scale in (1e-20, 1e-6, 1e6, 1e20):
        found = of(scale * M, [scale * v], [0.3, 1.0])
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-8)
        np.testing.assert_allclose(found[2], expected[2], rtol=1e-8)


def test_quartiles_and_medians():
    """As numpy's; halves of infinities are infinite, not NaN."""
    values = np.random.default_rng(1).uniform(size=8)
    found = residual_quartiles(values.tolist())
    assert list(found) == ["residual_q25", "residual_median", "residual_q75"]
    assert list(found.values()) == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]))
    assert median(torch.from_numpy(values)) == pytest.approx(np.median(values))
    for some, middle in (([1.0, np.inf], np.inf), ([np.inf] * 2, np.inf), ([1, 2, np.inf], 2)):
        assert median(torch.tensor(some)) == middle
