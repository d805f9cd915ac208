"""Adapters from fits: the same map, at every rank."""

import pytest
import torch

from tests.support.pairs import moments_of
from toolkit.adapters.linear import Linear
from toolkit.adapters.vector import FixedVector
from toolkit.analysis.linear_fit import fit_linear
from toolkit.fitting.from_moments import adapter_from


@pytest.mark.parametrize("rank", [0, 1, 3, "full"])
def test_an_adapter_is_its_fit(rank):
    """``Δ = A_r h + b``; its rank and its number of parameters are those of the factors."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    t = torch.randn(50, 6, generator=generator, dtype=torch.float64) + x
    fit = fit_linear(moments_of(x, t), "x", "t")
    adapter = adapter_from(fit, rank, torch.float64)
    assert isinstance(adapter, FixedVector if rank == 0 else Linear)
    assert adapter.rank == rank
    n_factors = 36 if rank == "full" else 12 * rank
    assert sum(p.numel() for p in adapter.parameters()) == n_factors + 6
    states = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    assert torch.allclose(adapter(states), states @ fit.matrix(rank).T + fit.bias(rank), atol=1e-12)
    assert not any(p.requires_grad for p in adapter.parameters())


def test_an_adapter_shares_no_memory_with_its_fit():
    x = torch.randn(20, 4, dtype=torch.float64)
    fit = fit_linear(moments_of(x, x + 1), "x", "t")
    for rank in (0, 2, "full"):
        before = fit.matrix(rank).clone(), fit.bias(rank).clone()
        for parameter in adapter_from(fit, rank, torch.float64).parameters():
            parameter.zero_()
        assert torch.equal(fit.matrix(rank), before[0])
        assert torch.equal(fit.bias(rank), before[1])
