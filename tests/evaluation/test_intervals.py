"""Intervals over prompts: the jackknife against leaving prompts out by hand, and their coverage."""

import numpy as np
import pytest
import torch
from scipy import stats

from toolkit.analysis.divergence import Divergences, recovered
from toolkit.evaluation.intervals import difference_interval, jackknife_sem, recovered_interval


def nats(values):
    values = torch.as_tensor(values, dtype=torch.float64)
    return Divergences(values, torch.ones_like(values).bool())


def drawn(rng, n, n_new=3):
    """Return base, two steered models: skewed sums, alike within a prompt."""
    hard = rng.lognormal(0, 0.4, (n, 1))
    base = hard * rng.lognormal(0, 0.3, (n, n_new))
    small, large = (base * rng.beta(4, k, (n, 1)) for k in (12, 36))
    return nats(base), nats(small), nats(large)


def test_the_jackknife_leaves_out_each_prompt_once():
    base, small, _ = drawn(np.random.default_rng(0), 7)
    interval = recovered_interval(small, base)
    rows = range(7)
    without = [
        recovered(small.of_prompts(kept), base.of_prompts(kept))[0]
        for kept in ([r for r in rows if r != left] for left in rows)
    ]
    sem = np.sqrt(6 / 7 * np.square(np.array(without) - np.mean(without)).sum())
    assert interval.estimate == pytest.approx(recovered(small, base)[0])
    assert interval.sem == pytest.approx(sem)
    assert interval.high - interval.estimate == pytest.approx(stats.t.ppf(0.975, 6) * sem)
    assert interval.half_width_with(28) == pytest.approx(stats.t.ppf(0.975, 27) * sem / 2)


def test_a_difference_is_paired():
    """A prompt that is hard for both adds nothing to the error of their difference."""
    base = nats([[1.0], [2.0], [9.0], [4.0]])
    a, b = nats(0.1 * base.nats), nats(0.3 * base.nats)
    found = difference_interval(a, b, base)
    assert found.estimate == pytest.approx(0.2)
    assert found.sem == pytest.approx(0, abs=1e-12)


def test_intervals_hold_as_often_as_they_say():
    """Of 400 draws of 8 and of 24 skewed prompts at least 93 in 100 hold the population's value."""
    rng = np.random.default_rng(1)
    everyone = drawn(rng, 20000)
    base, small, large = everyone
    true = recovered(small, base)[0], recovered(large, base)[0] - recovered(small, base)[0]
    for n in (8, 24):
        held = np.zeros(2)
        for _ in range(400):
            rows = rng.choice(20000, n, replace=False)
            b, s, x = (found.of_prompts(rows) for found in everyone)
            found = recovered_interval(s, b), difference_interval(x, s, b)
            held += [i.low <= value <= i.high for i, value in zip(found, true, strict=True)]
        assert (held / 400 >= 0.93).all(), (n, held)


def test_one_prompt_has_no_interval():
    base, small, _ = drawn(np.random.default_rng(0), 1)
    interval = recovered_interval(small, base)
    assert np.isnan([interval.low, interval.high, interval.sem]).all()
    assert np.isfinite(interval.estimate)


def test_errors_of_many_candidates_at_once():
    base, small, large = drawn(np.random.default_rng(2), 5)
    both = torch.stack([small.by_prompt[0], large.by_prompt[0]])
    each = [float(jackknife_sem(row, base.by_prompt[0])) for row in both]
    assert jackknife_sem(both, base.by_prompt[0]).tolist() == pytest.approx(each)
