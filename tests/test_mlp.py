"""Every family's MLP as matrices: the same outputs, and the Jacobian that autograd gives."""

import pytest
import torch

from tests import tiny
from tests.textbook import mlp_output
from toolkit.mlp import Change, mlps

DENSE = ["llama", "gemma2", "gemma3", "qwen3", "olmo2", "phi3", "gpt2", "neox", "opt", "falcon"]


def tokens(n=4, d=tiny.D_MODEL):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("family", DENSE)
def test_matrices_compute_what_the_module_computes(family):
    model = tiny.make_model(family)
    pairs = mlps(model, tiny.tune(model))
    for block, (mlp, _) in zip(tiny.blocks_of(model), pairs, strict=True):
        expected = torch.from_numpy(mlp_output(block, tokens().numpy()))
        assert torch.allclose(mlp(tokens()), expected, atol=1e-12)


@pytest.mark.parametrize("family", DENSE)
def test_the_jacobian_is_automatic_differentiations(family):
    model = tiny.make_model(family)
    mlp, _ = mlps(model, model)[1]
    for token in tokens():
        expected = torch.autograd.functional.jacobian(lambda h: mlp(h[None])[0], token)
        assert torch.allclose(mlp.jacobian(token), expected, atol=1e-10)


@pytest.mark.parametrize("family", DENSE)
def test_a_change_is_the_difference_of_all_weights(family):
    """``x ↦ ΔW x + Δb`` for every projection, fused ones cut in two."""
    base = tiny.make_model(family)
    tuned = tiny.tune(base)
    for (ours, change), (theirs, _) in zip(mlps(base, tuned), mlps(tuned, tuned), strict=True):
        for name in ("gate", "down") if ours.up is None else ("gate", "up", "down"):
            dW = getattr(theirs, name) - getattr(ours, name)
            db = getattr(theirs, f"{name}_bias") - getattr(ours, f"{name}_bias")
            x = tokens(d=dW.shape[1])
            assert torch.allclose(getattr(change, name)(x), x @ dW.T + db, atol=1e-12)
        assert (change.up is None) == (ours.up is None)
        assert change.exact().down.bias.dtype == torch.float64


def test_factors_are_their_product():
    """``ΔW = B A``, whole or cut into the gate's and the up's rows."""
    B, A, b = tokens(8, 2), tokens(2, 5), tokens(1, 8)[0]
    factored, whole, x = Change((B, A), b), Change((B @ A,), b), tokens(3, 5)
    assert torch.allclose(factored(x), whole(x))
    for ours, theirs in zip(factored.halves(), whole.halves(), strict=True):
        assert torch.allclose(ours(x), theirs(x))
        assert ours(x).shape == (3, 4)


def test_experts_are_no_dense_mlp():
    model = tiny.make_model("mixtral", torch.float32)
    with pytest.raises(ValueError, match=r".{20}"):
        mlps(model, model)
