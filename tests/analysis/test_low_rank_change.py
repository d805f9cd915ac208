"""Low-rank parts of a matrix's change against numpy's singular value decomposition."""

import numpy as np
import pytest
import torch

from toolkit.analysis.low_rank_change import RELATIVE_RIDGE, LowRank, truncated, within_budget

SHAPES = [(7, 7), (5, 12), (12, 5), (1, 6), (6, 1)]


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def second_moment(d, n=200, seed=1):
    """Draw inputs with a large mean, whose dimensions differ in size and correlate."""
    x = draw(seed, n, d) @ draw(seed + 1, d, d) * np.logspace(0, -2, d) + 3
    return x.T @ x / n


def square_root(C):
    values, vectors = np.linalg.eigh(C + RELATIVE_RIDGE * np.trace(C) / len(C) * np.eye(len(C)))
    return vectors * np.sqrt(values) @ vectors.T


def textbook(D, C):
    """The singular values in the metric of C, and the best matrix of every rank."""
    root = np.eye(D.shape[1]) if C is None else square_root(C)
    U, s, Vt = np.linalg.svd(D @ root, full_matrices=False)
    back = Vt @ np.linalg.inv(root)
    return s, [U[:, :r] * s[:r] @ back[:r] for r in range(len(s) + 1)]


def tensors(*arrays):
    return [None if array is None else torch.from_numpy(array) for array in arrays]


@pytest.mark.parametrize("metric", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_rank_is_the_textbooks(shape, metric):
    D, C = draw(0, *shape), second_moment(shape[1]) if metric else None
    found = truncated(*tensors(D, C), scale=2.5)
    s, best = textbook(D, C)
    np.testing.assert_allclose(found.gains, s**2 / 2.5, rtol=1e-9)
    assert found.cost == sum(shape)
    for rank, matrix in enumerate(best):
        up, down = found.leading(rank)
        assert up.shape == (shape[0], rank)
        np.testing.assert_allclose(up @ down, matrix, atol=1e-7 * np.abs(D).max())
        np.testing.assert_allclose(up.T @ up, np.eye(rank), atol=1e-12)


@pytest.mark.parametrize("metric", [True, False])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_factors_give_what_their_product_gives(shape, metric):
    """And a change of rank 3 has three pieces, which are all of it."""
    up, down = draw(2, shape[0], 3), draw(3, 3, shape[1])
    C = second_moment(shape[1]) if metric else None
    up, down, D, C = tensors(up, down, up @ down, C)
    whole, parts = (truncated(change, C, 1.0) for change in (D, (up, down)))
    for found in (whole, parts):
        assert len(found.gains) == 3
        torch.testing.assert_close(found.up @ found.down, D, rtol=0, atol=1e-12 * float(D.norm()))
    torch.testing.assert_close(whole.gains, parts.gains, rtol=1e-9, atol=0)


def error(D, C, found, rank):
    up, down = found.leading(rank)
    gap = D - up.numpy() @ down.numpy()
    return np.trace(gap @ C @ gap.T)


@pytest.mark.parametrize("seed", range(5))
def test_gains_are_what_is_won_and_the_metric_is_never_worse(seed):
    D, C = draw(seed, 9, 6), second_moment(6, seed=seed)
    metric, plain = truncated(*tensors(D, C), 1.0), truncated(*tensors(D, None), 1.0)
    total = np.trace(D @ C @ D.T)
    for rank in range(7):
        ours, theirs = error(D, C, metric, rank), error(D, C, plain, rank)
        assert ours <= theirs + 1e-6 * total
        won = total - ours
        np.testing.assert_allclose(metric.gains[:rank].sum(), won, rtol=1e-4, atol=1e-4 * total)
    assert error(D, C, metric, 2) < 0.99 * error(D, C, plain, 2)


def test_inputs_that_never_occur_are_followed_last():
    """Take first the direction that occurs, however small; recover both."""
    D, C = np.diag([0.1, 10.0]), np.diag([1.0, 0.0])
    found = truncated(*tensors(D, C), 1.0)
    np.testing.assert_allclose(found.up[:, 0].abs(), [1, 0], atol=1e-12)
    np.testing.assert_allclose(found.up @ found.down, D, atol=1e-12)
    np.testing.assert_allclose(truncated(*tensors(D, None), 1.0).up[:, 0].abs(), [0, 1], atol=1e-12)


@pytest.mark.parametrize("metric", [True, False])
def test_nothing_changed_and_nothing_entering_have_no_pieces(metric):
    zeros, ones = np.zeros((4, 3)), np.ones((4, 3))
    cases = [(zeros, second_moment(3) if metric else None)]
    cases += [(ones, np.zeros((3, 3)))] if metric else []
    for D, C in cases:
        found = truncated(*tensors(D, C), 0.0)
        assert (found.up.shape, found.down.shape, found.gains.shape) == ((4, 0), (0, 3), (0,))


def test_no_more_pieces_than_are_asked_for():
    found = truncated(torch.from_numpy(draw(0, 8, 8)), None, 1.0, max_rank=2)
    assert len(found.gains) == 2
    assert len(truncated(torch.from_numpy(draw(0, 8, 8)), None, 1.0, max_rank=0).gains) == 0


def pieces(gains, rows, columns):
    k = len(gains)
    return LowRank(torch.zeros(rows, k), torch.zeros(k, columns), torch.tensor(gains))


def greedy(found, budget):
    """One piece after another: of the next of every module the best that still fits."""
    ranks = dict.fromkeys(found, 0)
    while True:
        offers = [
            (float(p.gains[ranks[k]]) / p.cost, k)
            for k, p in found.items()
            if ranks[k] < len(p.gains) and p.cost <= budget
        ]
        if not offers:
            return ranks
        best = max(offers)[1]
        ranks[best] += 1
        budget -= found[best].cost


@pytest.mark.parametrize("seed", range(5))
def test_a_budget_goes_to_the_most_gain_per_number(seed):
    rng = np.random.default_rng(seed)
    found = {
        name: pieces(sorted(rng.exponential(size=5), reverse=True), *rng.integers(2, 30, 2))
        for name in range(6)
    }
    whole = sum(5 * p.cost for p in found.values())
    for budget in (0, 3, 50, 200, 500, whole - 1, whole, whole + 7):
        ranks = within_budget(found, budget)
        assert ranks == greedy(found, budget)
        assert sum(ranks[name] * p.cost for name, p in found.items()) <= budget
    assert set(within_budget(found, whole).values()) == {5}


def test_a_piece_that_does_not_fit_leaves_room_for_smaller_ones():
    found = {"wide": pieces([100.0, 90.0], 10, 10), "narrow": pieces([1.0], 2, 2)}
    assert within_budget(found, 25) == {"wide": 1, "narrow": 1}
    assert within_budget(found, 3) == {"wide": 0, "narrow": 0}
