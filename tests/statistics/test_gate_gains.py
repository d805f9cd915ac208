"""Histograms of sizes, and the gains of a gated MLP."""

import numpy as np
import pytest
import torch

from tests.support.properties import assert_reducible
from toolkit.blocks.mlp import MLP
from toolkit.statistics import SizeCounts
from toolkit.statistics.gate_gains import HIGHEST, LOWEST, PER_DECADE, gate_gains


def sizes(n, seed, spread=2.0):
    """Numbers of both signs over many powers of ten, some of them outside the range."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return draw.sign() * 10 ** (spread * draw - 1)


def counted(*updates):
    counts = SizeCounts()
    for values in updates:
        counts.update(values)
    return counts.result()


def test_keeps_the_contract_of_accumulators():
    assert_reducible(SizeCounts, [(sizes(n, seed=n),) for n in (4, 1, 0, 9, 30, 2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_are_numpys_of_the_logarithms(dtype):
    values = torch.cat([sizes(400, 1, spread=4.0).to(dtype), torch.zeros(5, 3, dtype=dtype)])
    result = counted(values[:100], values[100:])
    size = values.double().abs().numpy().ravel()
    inside, edges = np.histogram(
        np.log10(size[size > 0]), bins=(HIGHEST - LOWEST) * PER_DECADE, range=(LOWEST, HIGHEST)
    )
    assert result.counts[1:-1].tolist() == inside.tolist()
    np.testing.assert_allclose(result.edges, edges, atol=1e-12)
    assert result.counts[0] == (size < 10.0**LOWEST).sum() > 15
    assert result.counts[-1] == (size >= 10.0**HIGHEST).sum() > 0
    assert result.n == result.counts.sum() == size.size


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5, 0.9, 1.0])
def test_quantiles_are_right_to_a_bin(share):
    values = sizes(2000, 2, spread=1.0)
    exact = np.quantile(values.abs().numpy(), share, method="inverted_cdf")
    assert abs(np.log10(counted(values).quantile(share) / exact)) <= 1 / PER_DECADE + 1e-9


def test_quantiles_are_nearer_where_sizes_are_even_in_their_logarithm():
    """What interpolation is for: a hundredth of a bin, on a fine grid."""
    values = 10 ** torch.linspace(-2, 2, 40_001, dtype=torch.float64)
    for share in (0.123, 0.5, 0.777):
        assert np.log10(counted(values).quantile(share)) == pytest.approx(
            4 * share - 2, abs=0.01 / PER_DECADE
        )


def test_quantiles_outside_the_range_say_so():
    result = counted(torch.tensor([0.0, 0.0, 1.0, 10.0 ** (HIGHEST + 1)]))
    assert result.quantile(0.5) == 0
    assert 1 <= result.quantile(0.75) <= 1.001 * 10 ** (1 / PER_DECADE)
    assert result.quantile(0.9) == np.inf


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_a_share_that_is_none_is_an_error(share):
    with pytest.raises(ValueError, match="share in"):
        counted(torch.ones(2)).quantile(share)


def test_values_that_are_no_numbers_and_nothing_counted_are_errors():
    with pytest.raises(ValueError, match="finite"):
        SizeCounts().update(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="no tokens"):
        SizeCounts().result()


@pytest.mark.parametrize("activation", [torch.nn.SiLU(), torch.nn.GELU(approximate="tanh")])
def test_gains_are_what_an_mlp_multiplies_its_weights_by(activation):
    """autograd's derivatives of the product, by its two arguments."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    bias = torch.zeros((), dtype=torch.float64)
    mlp = MLP(activation, draw(7, 4), bias, draw(4, 7), bias, draw(7, 4), bias)
    a_g, a_u = mlp.inner(draw(5, 4))
    found = gate_gains(*mlp.slopes(a_g), a_u)
    by_gate, by_up = torch.autograd.functional.jacobian(
        lambda g, u: (activation(g) * u).sum(), (a_g, a_u)
    )
    torch.testing.assert_close(found["gate"], by_gate.abs())
    torch.testing.assert_close(found["up"], by_up.abs())
