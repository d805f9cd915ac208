"""The answer: the smallest adapters that reach the target, with a bound that holds over all."""

import numpy as np
import pytest
import torch
from scipy import stats

from tests.support.steering import random_adapters
from toolkit.analysis.divergence import Divergences, recovered
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import Evaluation
from toolkit.evaluation.recommend import critical_value, recommend

SMALL = Candidate.of(random_adapters("post_mlp", "vector"))
LARGE = Candidate.of(random_adapters("post_mlp", "full"))
HARD = torch.tensor([[1.0], [2.0], [3.0], [2.0]]).double()  # nats of no steering, by prompt
NOISE = torch.tensor([[0.05], [-0.05], [0.06], [-0.02]]).double()


def nats(values):
    return Divergences(values, torch.ones_like(values).bool())


def of(small, large, none=HARD, target=0.9):
    parts = {NONE: none, SMALL: small, LARGE: large}
    found = Evaluation({(c, "tuned"): nats(values) for c, values in parts.items()})
    return recommend([SMALL, LARGE], found, target)


def test_the_smallest_that_reaches_the_target_is_chosen():
    """Both reach .4; only the large one reaches .8, and the small one is named beside it."""
    choice = of(0.5 * HARD, 0.1 * HARD, target=0.4)
    assert (choice.chosen, choice.best, choice.reached) == (SMALL, LARGE, True)
    assert choice.smaller is None
    choice = of(0.5 * HARD, 0.1 * HARD, target=0.8)
    assert (choice.chosen, choice.smaller, choice.reached) == (LARGE, SMALL, True)
    assert choice.recovered == pytest.approx(0.9)
    assert choice.lower == pytest.approx(0.9)  # every prompt says the same
    assert choice.n_candidates == 2


def test_none_reaches_it_and_the_nearest_is_named():
    choice = of(0.5 * HARD, 0.3 * HARD, target=0.9)
    assert (choice.chosen, choice.reached) == (LARGE, False)


def test_a_figure_above_the_target_whose_bound_is_below_does_not_reach_it():
    choice = of(0.2 * HARD + NOISE, 0.09 * HARD + NOISE, target=0.9)
    assert choice.recovered > 0.9 > choice.lower
    assert not choice.reached


def test_one_prompt_shows_nothing():
    one = slice(1)
    choice = of(0.1 * HARD[one], 0.05 * HARD[one], none=HARD[one], target=0.5)
    assert not choice.reached
    assert np.isnan(choice.lower)


def test_where_others_report_a_bound_of_its_own_chooses():
    """Five prompts: .93 less 2.78 standard errors reaches .9, less the width over both does not."""
    none = torch.ones(5, 1).double()
    small = none * 0.07 + torch.tensor([[0.02], [-0.02], [0.01], [-0.01], [0.0]]).double()
    large = none * 0.05 + torch.tensor([[-0.02], [0.01], [0.02], [-0.02], [0.01]]).double()
    found = Evaluation(
        {(c, "tuned"): nats(v) for c, v in ((NONE, none), (SMALL, small), (LARGE, large))}
    )
    own = recommend([SMALL, LARGE], found, 0.9, apart=True)
    assert (own.chosen, own.reached) == (SMALL, True)
    sem = float(small.std() / 5**0.5)
    assert own.lower == pytest.approx(0.93 - stats.t.ppf(0.975, 4) * sem)
    assert recommend([SMALL, LARGE], found, 0.9).lower < own.lower


def test_nothing_is_recommended_that_recovers_nothing():
    assert of(1.1 * HARD, 2 * HARD) is None
    assert of(0 * HARD, 0 * HARD, none=0 * HARD) is None
    assert of(1.1 * HARD, 0.9 * HARD).chosen == LARGE


def test_one_candidates_bound_is_students():
    """Errors of like size over prompts: the two-sided 95 % quantile of Student's t."""
    signs = torch.tensor([1.0, -1.0] * 4).double()[:, None]
    base = torch.ones(8, 1).double()
    found = critical_value([nats(0.3 + 0.1 * signs)], nats(base))
    assert found == pytest.approx(stats.t.ppf(0.975, 7), rel=0.06)


def test_more_candidates_need_more_and_twins_do_not():
    generator = torch.Generator().manual_seed(0)
    base = torch.ones(12, 1).double()
    draws = [0.3 + 0.1 * torch.randn(12, 1, generator=generator).double() for _ in range(20)]
    one = critical_value([nats(draws[0])], nats(base))
    twins = critical_value([nats(draws[0])] * 20, nats(base))
    many = critical_value([nats(d) for d in draws], nats(base))
    assert twins == pytest.approx(one)
    assert one + 0.5 < many < stats.t.ppf(1 - 0.05 / 40, 11) + 0.3


def test_many_prompts_need_little_memory_and_give_the_same_width():
    """On either side of 256 prompts the width is that of independent candidates, by Sidak."""
    generator = torch.Generator().manual_seed(2)
    for n in (120, 300):
        base = torch.ones(n, 1).double()
        draws = [0.3 + 0.1 * torch.randn(n, 1, generator=generator).double() for _ in range(20)]
        width = critical_value([nats(d) for d in draws], nats(base))
        assert width == pytest.approx(stats.norm.ppf(0.5 + 0.95 ** (1 / 20) / 2), rel=0.035)


def test_the_bounds_hold_over_all_candidates_in_95_of_100_draws():
    """Twenty candidates, ten prompts: no true recovery lies below its bound."""
    generator = torch.Generator().manual_seed(1)
    held, n_draws = 0, 200
    for _ in range(n_draws):
        base = 1 + 0.3 * torch.rand(10, 1, generator=generator).double()
        parts = [
            0.3 * base + 0.1 * torch.randn(10, 1, generator=generator).double() for _ in range(20)
        ]
        width = critical_value([nats(p) for p in parts], nats(base))
        scores = [recovered(nats(p), nats(base)) for p in parts]
        held += all(score - width * sem <= 0.7 for score, sem in scores)
    assert held / n_draws > 0.93
