"""A diagnosis' divergences and what steering recovers equal the textbook's, in several families."""

import functools

import numpy as np
import pytest
import torch

from tests.support import textbook
from tests.support.diagnosed import (
    NONE,
    assert_tables_equal,
    case,
    each_case,
    every_candidate,
    kl_tolerance,
    n_numbers,
    of_candidate,
)


@each_case
def test_sequential_kl(family, dtype):
    """KL at every generated token index, of no steering, the oracle and every candidate."""
    c = case(family, dtype)
    frame = c.run.sequential_kl.frame
    for candidate, nats in every_candidate(family, dtype):
        for forcing in nats:
            found = of_candidate(frame, candidate).query("forcing == @forcing")
            if not nats[forcing] or (candidate["layers"] != "all" and forcing == "own"):
                continue
            rtol, atol = kl_tolerance(c)
            rows = textbook.curve(nats[forcing])
            columns = ["token_index", "kl_mean", "kl_sem", "n_prompts"]
            assert_tables_equal(found[columns], rows, ["token_index"], rtol, atol)


@each_case
def test_steerability(family, dtype):
    """Mean KL over all generated tokens, what it recovers of no steering's, and the cost."""
    c = case(family, dtype)
    candidates = list(every_candidate(family, dtype))
    assert len(candidates) == (c.run.steerability.frame.target != "block").sum()
    none = candidates[0][1]["tuned"]
    per_prompt = np.array([n.sum() for n in none])
    for candidate, nats in candidates:
        (row,) = of_candidate(c.run.steerability.frame, candidate).to_dict("records")
        rtol, atol = kl_tolerance(c)
        scale = textbook.mean_nats(none)
        expected = textbook.mean_nats(nats["tuned"])
        sums = np.array([n.sum() for n in nats["tuned"]])
        lengths = np.array([len(n) for n in nats["tuned"]])
        near = functools.partial(pytest.approx, rel=10 * rtol, abs=10 * atol / scale)
        assert row["kl"] == pytest.approx(expected, rel=rtol, abs=atol)
        assert row["kl_sem"] == near(textbook.ratio_sem(sums, lengths))
        assert row["recovered"] == near(1 - expected / scale)
        assert row["recovered_sem"] == near(textbook.ratio_sem(sums, per_prompt))
        assert row["parameters"] == n_numbers(candidate)
        percent = 100 * row["parameters"] / c.parameters
        assert row["parameters_percent"] == pytest.approx(percent, rel=1e-12)


def test_prompts_end_at_different_tokens():
    """The exactness above covers prompts of different lengths that end at different indices."""
    c = case("llama", torch.float64)
    assert len({len(p) for p in c.prompts}) > 2
    counts = of_candidate(c.run.sequential_kl.frame, NONE).query("forcing == 'tuned'").n_prompts
    assert counts.iloc[-1] < counts.iloc[0]


def test_recommendation_is_the_smallest_within_one_standard_error():
    """It recovers something, none of those tied with it is smaller, and its adapters are there."""
    c = case("llama", torch.float64)
    chosen = c.run.recommendation
    assert chosen["recovered"] > 0
    assert chosen["recovered"] <= chosen["best"]["recovered"]
    assert chosen["parameters"] == c.run.adapters.parameters
    assert chosen["parameters"] <= min(
        (tied["parameters"] for tied in chosen["tied"]), default=chosen["parameters"]
    )
    assert chosen["best"]["recovered"] == c.run.steerability.frame.recovered.iloc[2:].max()
