"""Intervals of what is recovered, over prompts.

Prompts are independent draws, and the tokens of one prompt are not: each prompt counts as one
cluster, by the sums of its tokens. The standard error is the jackknife's, and the interval
Student's t. Drawn from 4,000 prompts of the tiny pair, intervals of 4 to 50 prompts held in 93 to
96 of 100 draws; percentile bootstrap intervals in 76 at 4 prompts and 88 at 8, which is why they
are not used (``data/recipes/coverage.py``).
"""

from dataclasses import dataclass

from scipy import stats
from torch import Tensor

from toolkit.analysis.divergence import Divergences

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided 95 % interval over `n` prompts; NaN with a single one."""

    estimate: float
    low: float
    high: float
    n: int
    sem: float

    def half_width_with(self, n: int) -> float:
        """Return about how far the interval would reach to either side with `n` prompts."""
        return t_quantile(n) * self.sem * (self.n / n) ** 0.5


def recovered_interval(steered: Divergences, base: Divergences) -> Interval:
    """Return the share of the base's divergence that steering recovers, with its interval.

    Source: Quenouille and Tukey's jackknife of a ratio; see Efron and Tibshirani 1993, chapter 11.
    """
    base_total = base.by_prompt[0]
    return _interval(base_total - steered.by_prompt[0], base_total)


def difference_interval(a: Divergences, b: Divergences, base: Divergences) -> Interval:
    """Return what `a` recovers more than `b`, with its interval over the same prompts."""
    return _interval(b.by_prompt[0] - a.by_prompt[0], base.by_prompt[0])


def jackknife_sem(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the standard errors of ``Σ numerator / Σ denominator``, leaving out each prompt once.

    `numerator` `[..., n]`, `denominator` `[n]`; NaN with a single prompt.
    """
    n = denominator.shape[-1]
    if n < 2:
        return numerator.new_full(numerator.shape[:-1], float("nan"))
    without = numerator.sum(-1, keepdim=True) - numerator
    ratios = without / (denominator.sum() - denominator)
    spread = ratios - ratios.mean(-1, keepdim=True)
    return ((n - 1) / n * spread.square().sum(-1)).sqrt()


def _interval(numerator: Tensor, denominator: Tensor) -> Interval:
    n = len(denominator)
    if float(denominator.sum()) == 0:
        return Interval(0.0, 0.0, 0.0, n, 0.0)
    estimate = float(numerator.sum() / denominator.sum())
    sem = float(jackknife_sem(numerator, denominator))
    reach = t_quantile(n) * sem
    return Interval(estimate, estimate - reach, estimate + reach, n, sem)


def t_quantile(n: int) -> float:
    """Return how many standard errors an interval of `n` prompts reaches to either side."""
    return float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) if n > 1 else float("nan")
