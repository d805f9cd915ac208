"""Each factor of the bound, against the 2-norm of a dense Jacobian in float64."""

import math

import pytest
import torch

from toolkit.analysis.gain_bounds import (
    AttentionSizes,
    attention_gain,
    block_gain,
    mlp_gain,
    norm_gain,
)

D, N = 6, 5


def _norm_of(function, x):
    """The 2-norm of the Jacobian of all tokens by all tokens."""
    jacobian = torch.func.jacrev(function)(x).reshape(x.numel(), -1)
    return float(torch.linalg.matrix_norm(jacobian, 2))


def _randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_norm():
    weight, x = _randn(D), _randn(N, D)
    rms = x.square().mean(-1).sqrt()

    def norm(x):
        return weight * x / x.square().mean(-1, keepdim=True).sqrt()

    bound = norm_gain(weight, rms)
    assert 0.3 * bound < _norm_of(norm, x) <= bound
    # The states are part of it: smaller ones are enlarged more.
    assert _norm_of(norm, x / 10) > bound


def test_mlp():
    gate, up, down, x = _randn(8, D), _randn(8, D), _randn(D, 8), _randn(N, D)
    silu = torch.nn.functional.silu

    def mlp(x):
        return (silu(x @ gate.T) * (x @ up.T)) @ down.T

    a_g = (x @ gate.T).requires_grad_()
    slope = torch.autograd.grad(silu(a_g).sum(), a_g)[0]
    by_gate, by_up = slope * (x @ up.T), silu(a_g.detach())
    norms = [float(torch.linalg.matrix_norm(w, 2)) for w in (down, gate, up)]
    bound = mlp_gain(*norms, by_gate, by_up)
    assert 0.01 * bound < _norm_of(mlp, x) <= bound
    assert mlp_gain(*norms, by_gate, None) < bound


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [0.3, 1.0, 3.0])
def test_attention(seed, size):
    """Four query heads on two key heads, causal; small scores and scores that pick one token."""
    torch.manual_seed(seed)
    width, groups = 3, 2
    query, out = _randn(4 * width, D), _randn(D, 4 * width)
    key, value = _randn(2 * width, D), _randn(2 * width, D)
    x = size * _randn(N, D)

    def heads(x, weight):
        found = (x @ weight.T).reshape(len(x), -1, width).transpose(0, 1)
        return found if len(found) == 4 else found.repeat_interleave(groups, 0)

    def attention(x):
        scores = heads(x, query) @ heads(x, key).mT / math.sqrt(width)
        scores = scores.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)
        mixed = scores.softmax(-1) @ heads(x, value)
        return mixed.transpose(0, 1).reshape(N, -1) @ out.T

    norms = {
        name: float(torch.linalg.matrix_norm(w, 2))
        for name, w in (("query", query), ("key", key), ("value", value), ("out", out))
    }
    largest = {
        f"largest_{name}": float(heads(x, w).norm(dim=-1).max())
        for name, w in (("query", query), ("key", key), ("value", value))
    }
    sizes = AttentionSizes(
        N, groups, 1 / math.sqrt(width), **norms, query_norm=1, key_norm=1, **largest
    )
    assert _norm_of(attention, x) <= attention_gain(sizes)


def test_the_two_skips():
    assert block_gain(0.0, 0.0) == 1.0
    assert block_gain(2.0, 3.0) == 12.0
