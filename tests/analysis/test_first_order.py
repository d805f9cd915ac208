"""First-order terms of an MLP's change: exact where the change is linear, small remainder else."""

import dataclasses

import pytest
import torch

from tests.support.properties import assert_reducible
from toolkit.analysis.first_order import FirstOrderSums, first_order_terms
from toolkit.blocks.mlp import MLP, Change, MLPChange

D, D_FF = 6, 10


def make_mlp(seed=0, gated=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    up = (draw(D_FF, D), draw(D_FF)) if gated else (None, None)
    return MLP(torch.nn.functional.silu, draw(D_FF, D), draw(D_FF), draw(D, D_FF), draw(D), *up)


def changed(mlp, size=0.1, seed=9, only=None):
    """`mlp` with all its matrices, or `only` one, changed."""
    generator = torch.Generator().manual_seed(seed)
    names = [only] if only else [k for k, v in vars(mlp).items() if isinstance(v, torch.Tensor)]
    change = {
        n: getattr(mlp, n)
        + size * torch.randn(getattr(mlp, n).shape, generator=generator, dtype=torch.float64)
        for n in names
    }
    return dataclasses.replace(mlp, **change)


def minus(tuned, base):
    """What was changed of `base`."""
    names = ("gate", "down") if base.up is None else ("gate", "down", "up")
    parts = {}
    for n in names:
        dW, db = (getattr(tuned, k) - getattr(base, k) for k in (n, f"{n}_bias"))
        parts[n] = Change((dW,), db)
    return MLPChange(**parts)


def tokens(n=50, seed=1):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shares(base, tuned, h=None):
    sums = FirstOrderSums(base, minus(tuned, base))
    sums.update(tokens() if h is None else h)
    return sums.result()


@pytest.mark.parametrize("gated", [True, False])
def test_keeps_the_contract_of_accumulators(gated):
    base = make_mlp(gated=gated)
    tuned = changed(base)
    updates = [(tokens(n, seed=n),) for n in (5, 1, 30, 2, 8)]
    assert_reducible(lambda: FirstOrderSums(base, minus(tuned, base)), updates)


@pytest.mark.parametrize("name", ["down", "down_bias", "up", "up_bias"])
def test_a_change_in_which_the_mlp_is_linear_is_explained_whole(name):
    """ΔW_d and ΔW_u (biases with them) enter linearly: share 1, no remainder."""
    base = make_mlp()
    result = shares(base, changed(base, only=name))
    term = name.removesuffix("_bias")
    for other in ("down", "gate", "up"):
        assert getattr(result, other) == pytest.approx(float(other == term), abs=1e-12)
    assert result.remainder < 1e-20


@pytest.mark.parametrize("name", ["gate", "gate_bias"])
def test_a_small_change_of_the_gate_is_explained_to_second_order(name):
    """The remainder, an energy, falls by 10⁴ where the change falls by 10² in energy."""
    base = make_mlp()
    small, large = (shares(base, changed(base, size, only=name)) for size in (1e-4, 1e-3))
    assert small.gate == pytest.approx(1, abs=1e-3)
    assert small.remainder == pytest.approx(large.remainder / 100, rel=0.05)
    assert small.relative_change == pytest.approx(large.relative_change / 10, rel=0.01)


def test_without_a_gate_the_inner_projection_is_called_up():
    base = make_mlp(gated=False)
    result = shares(base, changed(base, 1e-4, only="gate"))
    assert result.up == pytest.approx(1, abs=1e-3)
    assert result.gate == result.down == 0


def test_nothing_changed_is_zero():
    base = make_mlp()
    assert set(vars(shares(base, base)).values()) == {0.0}


@pytest.mark.parametrize("gated", [True, False])
def test_terms_are_derivatives_of_the_output(gated):
    """``exact`` is the difference of outputs, ``y`` the base's; each term what autograd says."""
    base = make_mlp(gated=gated)
    tuned = changed(base)
    terms = first_order_terms(base, minus(tuned, base), tokens())
    assert torch.allclose(terms.exact, tuned(tokens()) - base(tokens()), atol=1e-12)
    assert torch.allclose(terms.y, base(tokens()), atol=1e-12)
    inner = ("gate", "up") if gated else ("up",)
    for term in ("down", *inner):
        module = term if gated or term == "down" else "gate"
        names = module, f"{module}_bias"
        weights, others = (tuple(getattr(m, name) for name in names) for m in (base, tuned))

        def output(*parts, names=names):
            return dataclasses.replace(base, **dict(zip(names, parts, strict=True)))(tokens())

        steps = tuple(theirs - ours for ours, theirs in zip(weights, others, strict=True))
        expected = torch.func.jvp(output, weights, steps)[1]
        assert torch.allclose(getattr(terms, term), expected, atol=1e-12)
    assert gated or not terms.gate.any()


def test_a_tiny_update_is_not_lost_in_float32():
    """A change of 10⁻⁷ of the weights is below y's rounding and is still explained."""
    base = make_mlp(dtype=torch.float32)
    left, right = torch.randn(D, 1), torch.randn(1, D_FF)
    tuned = dataclasses.replace(base, down=base.down + 1e-6 * left @ right)
    result = shares(base, tuned, tokens().float())
    assert result.down == pytest.approx(1, abs=1e-5)
    assert result.remainder < 1e-5
