"""Ranks by limits and by totals, against searching all of them."""

import itertools
from math import sqrt

import numpy as np
import pytest

from toolkit.analysis.rank_budget import ladder, predicted, ranks_within, spread

LEFT = ((0.09, 0.04, 0.01), (0.16, 0.05, 0.02), (0.04, 0.03, 0.0))


def _errors(ranks, gains):
    errors = [0.0]
    for shares, gain, rank in zip(LEFT, gains, ranks, strict=True):
        errors.append(sqrt((gain * errors[-1]) ** 2 + shares[rank]))
    return errors[1:]


@pytest.mark.parametrize("limit", [0.25, 0.3, 0.4, 0.6])
def test_no_blocks_error_passes_the_limit_and_more_may_not_be_left(limit):
    """Each rank is the smallest that leaves no more than all may leave; more breaks the limit."""
    gains = (1.0, 0.5, 0.9)
    found = ranks_within(LEFT, gains, limit)
    assert found.holds
    np.testing.assert_allclose(found.errors, _errors(found.ranks, gains))
    assert max(found.errors) <= limit
    most = max(shares[rank] for shares, rank in zip(LEFT, found.ranks, strict=True))
    larger = sorted({share for shares in LEFT for share in shares if share > most})
    for shares, rank in zip(LEFT, found.ranks, strict=True):
        assert all(share > most for share in shares[:rank])
    if larger:
        ranks = [next(r for r, share in enumerate(row) if share <= larger[0]) for row in LEFT]
        assert max(_errors(ranks, gains)) > limit


def test_blocks_that_enlarge_errors_need_more_ranks():
    """The assumption on gains matters: what held with small ones breaks with large ones."""
    small = ranks_within(LEFT, (1.0, 0.1, 0.1), 0.25)
    assert small.holds
    assert max(_errors(small.ranks, (1.0, 3.0, 3.0))) > 0.25
    large = ranks_within(LEFT, (1.0, 1.0, 1.0), 0.25)
    assert sum(large.ranks) > sum(small.ranks)


def test_a_limit_that_no_rank_holds_says_so():
    found = ranks_within(LEFT, (1.0, 1.0, 1.0), 0.05)
    assert not found.holds
    assert found.ranks == (2, 2, 2)
    assert found.errors[0] == pytest.approx(0.1)


def test_spread_takes_the_largest_gains():
    assert spread([[9, 1, 1], [8, 7, 6], [0.1, 0, 0]], 5) == (1, 3, 1)
    assert spread([[1, 0.5], [1, 0.6]], 2) == (1, 1)
    assert spread([[9, 8, 7, 1], [6, 2, 1, 0], [0.1, 0.1, 0, 0]], 6) == (3, 2, 1)


def test_spread_leaves_the_least_predicted_cost_of_all_sets_of_its_size():
    """Against all sets with one rank a block at least; `left` falls by the gains."""
    gains = ((5.0, 3.0, 0.5), (4.0, 2.5, 2.0), (1.0, 0.2, 0.1))
    costs = (1.0, 2.0, 7.0)
    left = [[sum(row[r:]) for r in range(4)] for row in gains]
    for total in range(3, 10):
        ours = predicted(left, costs, spread(gains, total, costs))
        every = (ranks for ranks in itertools.product((1, 2, 3), repeat=3) if sum(ranks) == total)
        assert ours == pytest.approx(min(predicted(left, costs, ranks) for ranks in every))


def test_ladder():
    """From one rank a block to the widest; each about a fourth root of two times the last."""
    totals = ladder(30, 64)
    assert totals[0] == 30
    assert totals[-1] == 30 * 64
    ratios = np.array(totals[1:]) / totals[:-1]
    assert ratios.min() > 1
    assert ratios.max() < 1.21
    assert ladder(2, 1) == [2]
