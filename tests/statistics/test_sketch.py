"""Sketched moments: exact where the sketch has room for all directions, and where it is said."""

import pytest
import torch

from tests.support.properties import assert_close, assert_reducible
from toolkit.runtime.processes import ALONE
from toolkit.statistics import MomentSums, SketchedSums, frames_of

PAIRS = [("x", "x"), ("t", "x"), ("t", "t")]
D = 24


def tokens(rank, n=400, seed=0, tail=0.0, dtype=torch.float64):
    """x of `rank` directions, one of them large, and a little of all others; t is linear in x."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    basis[0] *= 30
    draw = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    x = 3 + draw @ basis + tail * torch.randn(n, D, generator=generator, dtype=torch.float64)
    return {"x": x.to(dtype), "t": (0.1 * x[:, :7]).to(dtype)}


def both(parts, width):
    exact, sketched = MomentSums(PAIRS), SketchedSums(PAIRS, width)
    for part in parts:
        exact.update(part)
        sketched.update(part)
    return exact.result(), sketched.result(), sketched


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_few_directions_are_seen_whole(dtype, rtol):
    parts = [tokens(4, seed=s, dtype=dtype) for s in range(3)]
    exact, found, sums = both(parts, width=9)
    for pair in PAIRS:
        assert_close(found.covariance[pair], exact.covariance[pair], rtol)
    assert sums.share("x") == pytest.approx(1, abs=rtol)


def test_means_variances_and_energies_are_exact_whatever_is_left_out():
    exact, found, sums = both([tokens(20, seed=s, tail=0.3) for s in range(2)], width=3)
    for name in ("x", "t"):
        assert_close(found.mean[name], exact.mean[name])
        variances = (m.covariance[name, name].diagonal() for m in (found, exact))
        assert_close(*variances, 1e-10)
        assert found.energy(name) == pytest.approx(exact.energy(name), rel=1e-12)
    assert not torch.allclose(found.covariance["t", "x"], exact.covariance["t", "x"], rtol=1e-3)
    assert 0.5 < sums.share("x") < 0.999


def test_the_error_falls_with_the_width():
    parts = [tokens(6, seed=s, tail=0.3) for s in range(3)]
    errors, shares = [], []
    for width in (2, 6, 12, D):
        exact, found, sums = both(parts, width)
        gap = found.covariance["x", "x"] - exact.covariance["x", "x"]
        errors.append(float(gap.norm() / exact.covariance["x", "x"].norm()))
        shares.append(sums.share("x"))
    assert errors == sorted(errors, reverse=True)
    assert shares == sorted(shares)
    assert errors[-1] < 1e-9 < errors[-2] < 0.01


def test_order_changes_no_bit():
    parts = [tokens(5, n=100 + s, seed=s, tail=0.1, dtype=torch.float32) for s in range(5)]
    results = []
    for order in (parts, parts[::-1]):
        sums = SketchedSums(PAIRS, 8, frames_of(parts[0]))
        for part in order:
            sums.update(part)
        sums.reduce(ALONE)
        results.append(sums.result())
    for pair in PAIRS:
        assert torch.equal(results[0].covariance[pair], results[1].covariance[pair])


def test_nothing_counted_is_an_error():
    with pytest.raises(ValueError, match="no tokens"):
        SketchedSums(PAIRS, 2).result()


def test_keeps_the_contract_of_accumulators():
    updates = [(tokens(6, n=n, seed=n, tail=0.1),) for n in (40, 3, 17, 8)]
    frames = frames_of(updates[0][0])
    assert_reducible(lambda: SketchedSums(PAIRS, 12, frames), updates, rtol=1e-9)
