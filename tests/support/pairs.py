"""Moments of pairs of sources and targets."""

from toolkit.statistics import MomentSums

PAIRS = [("x", "x"), ("t", "x"), ("t", "t")]


def moments_of(x, t):
    sums = MomentSums(PAIRS)
    sums.update({"x": x, "t": t})
    return sums.result()
