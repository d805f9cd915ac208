"""Divergences: by softmax, over counted tokens, with their standard errors."""

import numpy as np
import pytest
import torch

from tests.support import textbook
from toolkit.analysis.divergence import (
    Divergences,
    Predictions,
    kl_divergence,
    likely,
    recovered,
    recovered_difference,
)

COUNTED = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()


def random_divergences(seed):
    generator = torch.Generator().manual_seed(seed)
    nats = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    return Divergences(nats, COUNTED)


def rows(divergences):
    return [n[c].numpy() for n, c in zip(divergences.nats, divergences.counted, strict=True)]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0])
def test_kl_is_its_definition(scale):
    """Σ p log(p/q), positive, 0 of a distribution from itself, blind to a shift of the logits."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 2, 3, 20, generator=generator, dtype=torch.float64)
    q = p + scale * q
    nats = kl_divergence(p, q)
    # Logarithms of about 3 are good to 5e-16 each: so is a divergence, however small.
    np.testing.assert_allclose(nats, textbook.kl(p.numpy(), q.numpy()), rtol=1e-9, atol=5e-15)
    assert (nats > -5e-15).all()
    assert not kl_divergence(p, p).any()
    assert torch.allclose(kl_divergence(p + 3, q - 2), nats, atol=1e-13)


def test_mean_and_curve_are_over_counted_tokens():
    d = random_divergences(0)
    assert d.mean == pytest.approx(textbook.mean_nats(rows(d)))
    for found, expected in zip(d.curve(), textbook.curve(rows(d)), strict=True):
        assert found == pytest.approx(tuple(expected.values()))


def test_what_does_not_count_changes_nothing():
    d, changed = random_divergences(0), random_divergences(0)
    changed.nats[~COUNTED] = 1e9
    assert changed.mean == d.mean
    assert changed.sem == d.sem
    assert changed.curve() == d.curve()


def test_recovered_is_one_less_the_quotient_of_means():
    steered, base = random_divergences(1), random_divergences(2)
    share, sem = recovered(steered, base)
    assert share == pytest.approx(1 - steered.mean / base.mean)
    sums = [np.array([r.sum() for r in rows(d)]) for d in (steered, base)]
    assert sem == pytest.approx(textbook.ratio_sem(*sums))
    assert recovered(base, base) == (0, 0)
    perfect = Divergences(torch.zeros(4, 3).double(), COUNTED)
    assert recovered(perfect, base) == (1, 0)


def test_recovered_of_nothing_is_nothing():
    zero = Divergences(torch.zeros(4, 3).double(), COUNTED)
    assert recovered(zero, zero) == (0, 0)
    assert recovered_difference(zero, zero, zero) == (0, 0)


def test_standard_errors_are_near_the_jackknifes():
    """The delta method agrees with leaving out one prompt at a time, to a tenth."""
    generator = torch.Generator().manual_seed(0)
    counted = torch.rand(300, 5, generator=generator) < 0.8
    counted[:, 0] = True
    nats = torch.rand(300, 5, generator=generator, dtype=torch.float64) ** 3
    d = Divergences(nats, counted)
    total, count = (x.numpy() for x in d.by_prompt)
    left_out = (total.sum() - total) / (count.sum() - count)
    jackknife = np.sqrt(299 / 300 * np.sum((left_out - left_out.mean()) ** 2))
    assert d.sem == pytest.approx(jackknife, rel=0.1)


def test_difference_of_two_is_paired():
    """Prompts that are hard for both leave no error in the difference."""
    base, a = random_divergences(0), random_divergences(1)
    b = Divergences(a.nats + 0.1 * base.nats, COUNTED)
    difference, sem = recovered_difference(a, b, base)
    assert difference == pytest.approx(recovered(a, base)[0] - recovered(b, base)[0])
    assert difference == pytest.approx(0.1)
    assert sem == pytest.approx(0, abs=1e-12)


def test_parts_join():
    a, b = random_divergences(1), random_divergences(2)
    both = Divergences.join([a, b])
    assert both.mean == pytest.approx(textbook.mean_nats([*rows(a), *rows(b)]))


def test_one_prompt_has_no_standard_error():
    one = Divergences(torch.ones(1, 2).double(), torch.ones(1, 2).bool())
    assert np.isnan(one.sem)
    assert np.isnan(one.curve()[0][2])


def test_total_variation_is_its_definition():
    p, q = torch.randn(2, 2, 3, 20, dtype=torch.float64)
    found = Predictions(p).total_variation(q)
    shares = [np.exp(textbook.log_softmax(logits.numpy())) for logits in (p, q)]
    np.testing.assert_allclose(found, abs(shares[0] - shares[1]).sum(-1) / 2, atol=1e-14)
    apart = torch.tensor([[[50.0, -np.inf]], [[-np.inf, 50.0]]])
    assert Predictions(apart).total_variation(apart.flip(0)).tolist() == [[1.0], [1.0]]


def test_the_most_likely_tokens_are_those_of_the_softmax():
    logits = torch.randn(2, 3, 4, dtype=torch.float64)
    ids, probabilities = likely(logits, 5)  # there are four
    order = np.argsort(-logits.numpy(), -1)
    assert ids.tolist() == order.tolist()
    shares = np.exp(textbook.log_softmax(logits.numpy()))
    np.testing.assert_allclose(probabilities, np.take_along_axis(shares, order, -1), atol=1e-14)


def test_sums_over_sequences_and_the_top_tenth():
    d = random_divergences(0)
    sums = np.array([r.sum() for r in rows(d)])
    sem = sums.std(ddof=1) / 2
    assert d.per_sequence == (pytest.approx(sums.mean()), pytest.approx(sem))
    every = np.sort(np.concatenate(rows(d)))  # nine tokens: the tenth of them is one
    assert d.top_tenth == pytest.approx(every[-1] / every.sum())
    twelve = Divergences(torch.arange(12.0).double()[None], torch.ones(1, 12).bool())
    assert twelve.top_tenth == pytest.approx((11 + 10) / 66)
    assert Divergences(torch.zeros(4, 3).double(), COUNTED).top_tenth == 0
    assert np.isnan(d.of_prompts([0]).per_sequence[1])
    first = torch.tensor([[True, False, False]] * 4)
    assert d.of_tokens(first).mean == pytest.approx(float(d.nats[:, 0].mean()))
