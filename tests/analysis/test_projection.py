"""Subspaces at chosen angles, and projections that must split sums drawn from them."""

import numpy as np
import pytest
import torch

from tests.support import textbook
from toolkit.analysis.linear_fit import fit_linear
from toolkit.analysis.projection import (
    AffineMap,
    centred_r2,
    compose,
    energy_subspace,
    oblique_projection,
    overlap,
)
from toolkit.statistics import MomentSums

D = 12


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def basis(d, k):
    return torch.linalg.qr(draw(d, k)).Q


def subspaces_at(degrees, n_more=2):
    """Two subspaces that lean to each other by `degrees` in pairs of directions, else orthogonal.

    Each has `n_more` directions of its own beside.
    """
    axes = basis(D, 2 * len(degrees) + 2 * n_more)
    one, other = [], []
    for index, angle in enumerate(np.radians(degrees)):
        u, v = axes[:, 2 * index], axes[:, 2 * index + 1]
        one.append(u)
        other.append(np.cos(angle) * u + np.sin(angle) * v)
    rest = axes[:, 2 * len(degrees) :]
    skip = torch.stack([*one, *rest[:, :n_more].T], 1)
    mlp = torch.stack([*other, *rest[:, n_more:].T], 1)
    turn = lambda x: x @ torch.linalg.qr(draw(x.shape[1], x.shape[1])).Q  # noqa: E731
    return turn(skip), turn(mlp)


# --- subspaces and angles


def test_an_energy_subspace_is_the_leading_eigenvectors_that_it_takes():
    """60, 25, 10, 5 percent in chosen directions: 1, 2, 3 and 4 of them."""
    axes = basis(D, 4)
    second = axes @ torch.diag(torch.tensor([60.0, 25, 10, 5]).double()) @ axes.T
    for share, k in ((0.5, 1), (0.8, 2), (0.9, 3), (0.99, 4), (1.0, 4)):
        found = energy_subspace(second, share)
        assert found.shape == (D, k)
        assert torch.allclose(found.T @ found, torch.eye(k).double(), atol=1e-12)
        assert torch.allclose(found @ found.T, axes[:, :k] @ axes[:, :k].T, atol=1e-10)


def test_a_share_of_one_is_all_that_is_spanned_however_little_energy_it_has():
    axes = basis(D, 3)
    second = axes @ torch.diag(torch.tensor([1.0, 1e-6, 1e-12]).double()) @ axes.T
    assert energy_subspace(second, 1).shape == (D, 3)
    assert energy_subspace(torch.zeros(D, D), 0.9).shape == (D, 0)


@pytest.mark.parametrize("share", [0, -0.1, 1.1])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=f"share is {share}: expected more than 0"):
        energy_subspace(torch.eye(3), share)


def test_overlap_finds_the_chosen_angles():
    found = overlap(*subspaces_at([7.0, 30.0, 60.0]))
    assert (found.d, found.skip, found.mlp) == (D, 5, 5)
    assert found.smallest == pytest.approx(7)
    assert found.median == pytest.approx(60)  # of 7, 30, 60, 90, 90
    assert not found.meet


def test_subspaces_that_share_a_direction_or_are_too_large_meet():
    skip, mlp = subspaces_at([1e-7, 50.0])
    assert overlap(skip, mlp).meet
    large = overlap(basis(D, 7), basis(D, 6))
    assert large.meet
    assert large.smallest == 0
    nothing = overlap(basis(D, 3), basis(D, 3)[:, :0])
    assert not nothing.meet
    assert nothing.smallest == nothing.median == 90


# --- the projection


def test_the_oblique_projection_splits_sums():
    """Keeps what is in one, takes away what is in the other and what is in neither."""
    skip, mlp = subspaces_at([7.0, 30.0])
    P = oblique_projection(mlp, skip)
    s, y = skip @ draw(4, 20), mlp @ draw(4, 20)
    assert torch.allclose(P @ (s + y), y, atol=1e-12)
    assert torch.allclose(P @ P, P, atol=1e-12)
    outside = torch.linalg.qr(torch.cat([skip, mlp], 1), mode="complete").Q[:, 8:]
    assert (P @ outside).abs().max() < 1e-12
    by_hand = np.linalg.lstsq(torch.cat([mlp, skip], 1).numpy(), np.eye(D), rcond=None)[0]
    np.testing.assert_allclose(P.numpy(), mlp.numpy() @ by_hand[:4], atol=1e-12)


@pytest.mark.parametrize("degrees", [1.0, 10.0, 80.0])
def test_its_norm_is_one_over_the_sine_of_the_smallest_angle(degrees):
    P = oblique_projection(*subspaces_at([degrees, 85.0]))
    norm = float(torch.linalg.matrix_norm(P, 2))
    assert norm == pytest.approx(1 / np.sin(np.radians(degrees)))


def test_an_orthogonal_projection_is_not_enough_where_the_subspaces_lean():
    skip, mlp = subspaces_at([60.0])
    s, y = skip @ draw(3, 20), mlp @ draw(3, 20)
    assert not torch.allclose(mlp @ mlp.T @ (s + y), y, atol=0.1)


def test_no_projection_where_they_meet():
    """A shared direction, or more dimensions than there are."""
    skip, mlp = subspaces_at([50.0])
    with pytest.raises(ValueError, match="3 of 12 dimensions share a direction"):
        oblique_projection(mlp, torch.cat([skip[:, :2], mlp[:, :1]], 1))
    with pytest.raises(ValueError, match="7 and 6 of 12 dimensions"):
        oblique_projection(basis(D, 6), basis(D, 7))


def test_where_they_meet_no_affine_map_gives_the_term_from_the_sum():
    """With a shared direction the best map's R² falls short of 1; without it does not."""
    skip, mlp = subspaces_at([50.0])
    skip = skip[:, :2]
    for onto, exact in ((mlp, True), (torch.cat([mlp, skip[:, :1]], 1), False)):
        s, y = draw(200, 2) @ skip.T, draw(200, onto.shape[1]) @ onto.T
        moments = moments_of((s + y).numpy(), y.numpy())
        guess = AffineMap.of(fit_linear(moments, "x", "t", 0, relative_ridge=1e-10))
        assert (centred_r2(guess, moments, "x", "t") > 1 - 1e-6) is exact


# --- composed adapters


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_composed_adapter_reads_the_guess(rank, with_bias):
    up, down, h = draw(D, rank), draw(rank, D), draw(D, 30)
    bias = draw(D) if with_bias else None
    guess = AffineMap(draw(D, D), draw(D))
    new_up, new_down, new_bias = compose(up, down, bias, guess)
    y = guess.matrix @ h + guess.offset[:, None]
    expected = up @ down @ y + (bias[:, None] if with_bias else 0)
    assert torch.allclose(new_up @ (new_down @ h) + new_bias[:, None], expected, atol=1e-10)
    assert torch.linalg.matrix_rank(new_up @ new_down) <= rank


def test_behind_the_sum_the_composed_adapter_is_the_adapter_of_one_term():
    """Δ = A y = A P h, of rank r at most; with an overlap added the same P is wrong."""
    skip, mlp = subspaces_at([20.0, 40.0])
    s, y, up, down = skip @ draw(4, 50), mlp @ draw(4, 50), draw(D, 2), draw(2, D)
    P = oblique_projection(mlp, skip)
    up_h, down_h, _ = compose(up, down, None, AffineMap(P, torch.zeros(D).double()))
    assert torch.allclose(up_h @ down_h @ (s + y), up @ down @ y, atol=1e-11)
    assert torch.linalg.matrix_rank(up_h @ down_h) <= 2
    errors = []
    for size in (0.01, 0.02, 0.04):
        mixed = y + size * skip[:, :1] @ draw(1, 50).abs()
        errors.append(float((up_h @ down_h @ (s + mixed) - up @ down @ mixed).norm()))
    assert 1e-4 < errors[0] < errors[1] < errors[2]


# --- how well a guess guesses


def samples(noise=0.0):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 5)) + 3
    t = x @ rng.standard_normal((5, 4)) + 2 + noise * rng.standard_normal((60, 4))
    return x, t


def moments_of(x, t):
    sums = MomentSums([("x", "x"), ("t", "t"), ("t", "x")])
    sums.update({"x": torch.from_numpy(x), "t": torch.from_numpy(t)})
    return sums.result()


def test_r2_is_the_textbooks_on_tokens_that_the_fit_did_not_see():
    x, t = samples(noise=2.0)
    fitted, others = moments_of(x[:30], t[:30]), moments_of(x[30:], t[30:])
    guess = AffineMap.of(fit_linear(fitted, "x", "t", 0))
    A, b = textbook.fit(x[:30], t[:30], "full")
    missed = t[30:] - x[30:] @ A.T - b
    variance = np.sum((t[30:] - t[30:].mean(0)) ** 2)
    assert centred_r2(guess, others, "x", "t") == pytest.approx(1 - np.sum(missed**2) / variance)
    seen = np.random.default_rng(1).standard_normal((2, 4))
    expected = 1 - np.sum((missed @ seen.T) ** 2) / np.sum(
        ((t[30:] - t[30:].mean(0)) @ seen.T) ** 2
    )
    found = centred_r2(guess, others, "x", "t", torch.from_numpy(seen))
    assert found == pytest.approx(expected)
    assert found < centred_r2(guess, fitted, "x", "t", torch.from_numpy(seen))


def test_r2_of_an_exact_guess_of_the_mean_and_of_a_constant():
    x, t = samples()
    moments = moments_of(x, t)
    exact = AffineMap.of(fit_linear(moments, "x", "t", 0, relative_ridge=1e-12))
    assert centred_r2(exact, moments, "x", "t") == pytest.approx(1)
    mean = AffineMap(torch.zeros(4, 5).double(), moments.mean["t"])
    assert centred_r2(mean, moments, "x", "t") == pytest.approx(0)
    constant = moments_of(x, np.ones((60, 4)))
    assert centred_r2(mean, constant, "x", "t") == 0
