"""A uniform sample that does not depend on order or sharding."""

import pytest
import torch

from tests.properties import assert_mergeable
from toolkit.statistics import Reservoir


def numbered(start, stop):
    """Tokens whose value is their number, and keys that a seed draws for them."""
    keys = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.arange(start, stop).double()[:, None], keys[start:stop]


def test_is_mergeable():
    updates = [numbered(i, j) for i, j in ((0, 30), (30, 31), (31, 31), (31, 60), (60, 80))]
    # A token seen twice would be sampled twice: the updates repeat some, which is what is compared.
    assert_mergeable(lambda: Reservoir(6), updates)


def test_keeps_the_smallest_keys():
    values, keys = numbered(0, 100)
    for parts in (1, 3, 100):
        reservoir = Reservoir(7)
        for v, k in zip(values.tensor_split(parts), keys.tensor_split(parts), strict=True):
            reservoir.update(v, k)
        assert torch.equal(reservoir.result()[:, 0], keys.argsort()[:7].double())


def test_keeps_all_of_few():
    reservoir = Reservoir(7)
    reservoir.update(*numbered(0, 4))
    assert sorted(reservoir.result()[:, 0].tolist()) == [0, 1, 2, 3]


def test_every_token_is_as_likely_as_another():
    """Over many draws of the keys each of 20 tokens is kept 5 times in 20, within 5σ."""
    generator = torch.Generator().manual_seed(1)
    hits, n_draws = torch.zeros(20), 2000
    for _ in range(n_draws):
        reservoir = Reservoir(5)
        reservoir.update(torch.arange(20)[:, None], torch.rand(20, generator=generator))
        hits[reservoir.result()[:, 0]] += 1
    sigma = (n_draws * 0.25 * 0.75) ** 0.5
    assert (hits - n_draws / 4).abs().max() < 5 * sigma


def test_nothing_counted_is_an_error():
    with pytest.raises(ValueError, match="no tokens"):
        Reservoir(3).result()
