"""First and second moments, to float64 accuracy whatever comes in, in any number of processes."""

import numpy as np
import pytest
import torch

from tests.support.members import reduced
from tests.support.properties import assert_close, assert_reducible
from toolkit.statistics import MomentSums, frames_of

PAIRS = [("x", "x"), ("t", "x"), ("t", "t")]


def tokens(n, seed=0, d_x=7, d_t=3, mean=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = mean + torch.randn(n, d_x, generator=generator, dtype=torch.float64)
    t = x[:, :d_t] ** 2 + torch.randn(n, d_t, generator=generator, dtype=torch.float64)
    return {"x": x.to(dtype), "t": t.to(dtype)}


def test_keeps_the_contract_of_accumulators():
    updates = [(tokens(n, seed=n),) for n in (40, 1, 13, 0, 25, 7)]
    frames = frames_of(updates[0][0])
    assert_reducible(lambda: MomentSums(PAIRS, frames), updates, state=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_numpys(dtype):
    """n, means, covariances of every pair, second moments and energies."""
    shards = [tokens(n, seed=n, dtype=dtype) for n in (50, 3, 20)]
    sums = MomentSums(PAIRS)
    for shard in shards:
        sums.update(shard)
    moments = sums.result()
    whole = {k: np.concatenate([s[k].double().numpy() for s in shards]) for k in ("x", "t")}
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    assert moments.n == 73
    for name, values in whole.items():
        assert_close(moments.mean[name], values.mean(0), rtol)
        assert moments.energy(name) == pytest.approx(np.mean(np.sum(values**2, 1)), rel=rtol)
    for a, b in PAIRS:
        left, right = (whole[name] - whole[name].mean(0) for name in (a, b))
        assert_close(moments.covariance[a, b], left.T @ right / 73, rtol)
        assert_close(moments.second_moment(a, b), whole[a].T @ whole[b] / 73, rtol)
    assert all(value.dtype == torch.float64 for value in moments.covariance.values())


def test_a_mean_far_above_the_spread_costs_no_digits():
    """float32 tokens whose mean is 10⁴ times their spread: float32's own accuracy is kept.

    Uncentred float32 products would be wrong by 10⁸ · 10⁻⁷, ten times the covariance.
    """
    shards = [tokens(200, seed=s, mean=1e4, d_t=1, dtype=torch.float32) for s in range(4)]
    frames = frames_of(shards[0])
    halves = [MomentSums([("x", "x")], frames) for _ in range(2)]
    for index, shard in enumerate(shards):
        halves[index % 2].update(shard)
    moments = reduced(halves)[0].result()
    x = np.concatenate([s["x"].double().numpy() for s in shards])
    centred = x - x.mean(0)
    assert_close(moments.covariance["x", "x"], centred.T @ centred / len(x), 1e-5)
    assert_close(moments.mean["x"], x.mean(0), 1e-11)
    naive = sum((s["x"].T @ s["x"]).double() for s in shards) / len(x)
    naive = naive.numpy() - np.outer(x.mean(0), x.mean(0))
    assert np.abs(naive - centred.T @ centred / len(x)).max() > 0.1


def test_a_covariance_is_symmetric_and_of_any_width():
    """The product is computed by stripes of rows: every width gives the whole matrix."""
    for d in (1, 2, 3, 5, 8, 9):
        sums = MomentSums([("x", "x")])
        x = tokens(30, d_x=d, d_t=1)["x"]
        sums.update({"x": x})
        covariance = sums.result().covariance["x", "x"]
        assert torch.equal(covariance, covariance.T)
        assert_close(covariance, np.cov(x.numpy().T, bias=True).reshape(d, d))


def test_pooled_moments_are_those_of_all_tokens():
    """For the pairs that are asked for, whatever the means of the two sides."""
    sides = [MomentSums(PAIRS) for _ in range(2)]
    both = MomentSums(PAIRS)
    for index, (side, mean) in enumerate(zip(sides, (1.0, -30.0), strict=True)):
        shard = tokens(20 + index, seed=index, mean=mean)
        side.update(shard)
        both.update(shard)
    pooled, whole = sides[0].result().pooled(sides[1].result(), [("x", "x")]), both.result()
    assert pooled.n == whole.n
    assert_close(pooled.mean["x"], whole.mean["x"])
    assert_close(pooled.covariance["x", "x"], whole.covariance["x", "x"])
    assert pooled.covariance.keys() == {("x", "x")}


def test_nothing_counted_is_an_error():
    with pytest.raises(ValueError, match="no tokens"):
        MomentSums(PAIRS).result()
