"""A uniform sample that does not depend on order or sharding."""

import pytest
import torch

from tests.support.properties import assert_reducible
from toolkit.statistics import Reservoir


def numbered(start, stop):
    """Tokens whose value is their number, and keys that a seed draws for them."""
    keys = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    numbers = torch.arange(start, stop).double()[:, None]
    return {"number": numbers, "pair": numbers * torch.tensor([1.0, -2.0])}, keys[start:stop]


def split(values, keys, parts):
    """`numbered`, in so many parts."""
    names = [{name: v.tensor_split(parts)[i] for name, v in values.items()} for i in range(parts)]
    return zip(names, keys.tensor_split(parts), strict=True)


def test_keeps_the_contract_of_accumulators():
    updates = [numbered(i, j) for i, j in ((0, 30), (30, 31), (31, 31), (31, 60), (60, 80))]
    # A token seen twice would be sampled twice: the updates repeat some, which is what is compared.
    assert_reducible(lambda: Reservoir(6), updates)


def test_keeps_the_smallest_keys():
    values, keys = numbered(0, 100)
    for parts in (1, 3, 100):
        reservoir = Reservoir(7)
        for v, k in split(values, keys, parts):
            reservoir.update(v, k)
        assert torch.equal(reservoir.result()["number"][:, 0], keys.argsort()[:7].double())


def test_a_tokens_vectors_stay_together():
    """Whatever is kept of one name is kept of the others, whose widths may differ."""
    reservoir = Reservoir(7)
    for v, k in split(*numbered(0, 100), 3):
        reservoir.update(v, k)
    kept = reservoir.result()
    assert list(kept) == ["number", "pair"]
    assert torch.equal(kept["pair"], kept["number"] * torch.tensor([1.0, -2.0]))
    assert kept["pair"].shape == (7, 2)


def test_a_reservoir_of_size_zero_keeps_no_token_of_any_name():
    reservoir = Reservoir(0)
    reservoir.update(*numbered(0, 4))
    assert {name: tuple(v.shape) for name, v in reservoir.result().items()} == {
        "number": (0, 1),
        "pair": (0, 2),
    }


def test_keeps_all_of_few():
    reservoir = Reservoir(7)
    reservoir.update(*numbered(0, 4))
    assert sorted(reservoir.result()["number"][:, 0].tolist()) == [0, 1, 2, 3]


def test_every_token_is_as_likely_as_another():
    """Over many draws of the keys each of 20 tokens is kept 5 times in 20, within 5σ."""
    generator = torch.Generator().manual_seed(1)
    hits, n_draws = torch.zeros(20), 2000
    for _ in range(n_draws):
        reservoir = Reservoir(5)
        numbers = {"number": torch.arange(20)[:, None]}
        reservoir.update(numbers, torch.rand(20, generator=generator))
        hits[reservoir.result()["number"][:, 0]] += 1
    sigma = (n_draws * 0.25 * 0.75) ** 0.5
    assert (hits - n_draws / 4).abs().max() < 5 * sigma


def test_nothing_counted_is_an_error():
    with pytest.raises(ValueError, match="no tokens"):
        Reservoir(3).result()
