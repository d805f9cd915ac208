"""The recommendation: the smallest of those that cannot be told from the best, or nothing."""

import torch

from tests.support.steering import random_adapters
from toolkit.analysis.divergence import Divergences
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import Evaluation
from toolkit.evaluation.recommend import recommend

SMALL = Candidate.of(random_adapters("post_mlp", "vector"))
LARGE = Candidate.of(random_adapters("post_mlp", "full"))
HARD = torch.tensor([[1.0], [2.0], [3.0], [2.0]]).double()  # nats of no steering, by prompt


def of(small, large, none=HARD):
    parts = {NONE: none, SMALL: small, LARGE: large}
    counted = torch.ones(4, 1).bool()
    return recommend(
        [SMALL, LARGE],
        Evaluation({(c, "tuned"): Divergences(nats, counted) for c, nats in parts.items()}),
    )


def test_the_better_is_chosen_where_they_can_be_told_apart():
    """Half of the divergence against a tenth, on every prompt."""
    choice = of(0.5 * HARD, 0.1 * HARD)
    assert choice.chosen == choice.best == LARGE
    assert abs(choice.recovered - 0.9) < 1e-12
    assert choice.tied == ()


def test_the_smaller_is_chosen_where_they_cannot():
    """The large one is better by less than the standard error of the difference."""
    noise = torch.tensor([[0.3], [-0.3], [0.3], [-0.28]]).double()
    choice = of(0.5 * HARD, 0.5 * HARD - noise)
    assert (choice.chosen, choice.best, choice.tied) == (SMALL, LARGE, (LARGE,))
    assert choice.recovered < choice.best_recovered


def test_nothing_is_recommended_that_recovers_nothing():
    assert of(1.1 * HARD, 2 * HARD) is None
    assert of(0 * HARD, 0 * HARD, none=0 * HARD) is None
    assert of(1.1 * HARD, 0.9 * HARD).chosen == LARGE
