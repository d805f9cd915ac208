"""Jacobian products: closed forms and ``torch.func`` agree with autograd of the real function."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, relu, silu

from toolkit.blocks.jacobian import Chain, FunctionJacobian, MLPJacobian, Skip, matrix_of
from toolkit.blocks.mlp import MLP
from toolkit.blocks.scaling_norm import MLPAfterNorm, ScalingNorm

N, D, D_FF = 4, 6, 10
ACTIVATIONS = {
    "silu": silu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
    "relu": relu,
    "gelu": gelu,
}


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_mlp(activation="silu", gated=True, biased=True, d_out=D):
    tensors = draw(D_FF, D), draw(D_FF, seed=1), draw(d_out, D_FF, seed=2), draw(d_out, seed=3)
    up = (draw(D_FF, D, seed=4), draw(D_FF, seed=5)) if gated else (None, None)
    mlp = MLP(ACTIVATIONS[activation], *tensors, *up)
    if biased:
        return mlp
    zero = {k: torch.zeros_like(v) for k, v in vars(mlp).items() if "bias" in k and v is not None}
    return dataclasses.replace(mlp, **zero)


def make_norm(kind="rms", seed=7):
    norm = (nn.RMSNorm(D, 1e-6) if kind == "rms" else nn.LayerNorm(D)).double()
    norm.weight.data = draw(D, seed=seed)
    return norm.requires_grad_(False)


def make_chain(x):
    """An MLP behind a norm and before another, as its parts and as one function."""
    mlp, norm, post = make_mlp(), make_norm("layer"), make_norm("rms", seed=8)
    inner = Chain(MLPJacobian.at(mlp, norm(x)), FunctionJacobian(norm, x))
    whole = Chain(FunctionJacobian(post, mlp(norm(x))), inner)
    return whole, lambda t: post(mlp(norm(t)))


def make_after_scaling(x, **options):
    """An MLP after a norm that only scales: maps of few columns go round the norm."""
    mlp, norm = make_mlp(**options), make_norm("rms")
    found = MLPAfterNorm(MLPJacobian.at(mlp, norm(x)), FunctionJacobian(norm, x))
    assert found.scaling is not None
    return found, lambda t: mlp(norm(t))


def make_after_centring(x):
    """An MLP after a norm that also centres."""
    mlp, norm = make_mlp(), make_norm("layer")
    found = MLPAfterNorm(MLPJacobian.at(mlp, norm(x)), FunctionJacobian(norm, x))
    assert found.scaling is None
    return found, lambda t: mlp(norm(t))


def make_wide(x):
    """From D to D + 3 dimensions: products each way have their own width."""
    mlp = make_mlp(d_out=D + 3)
    return MLPJacobian.at(mlp, x), mlp


def make_skip(x):
    branch, function = make_chain(x)
    return Skip(branch), lambda t: t + function(t)


def make_closed(x, **options):
    mlp = make_mlp(**options)
    return MLPJacobian.at(mlp, x), mlp


def make_general(x, **options):
    mlp = make_mlp(**options)
    return FunctionJacobian(mlp, x), mlp


def make_general_wide(x):
    mlp = make_mlp(d_out=D + 3)
    return FunctionJacobian(mlp, x), mlp


def make_map_of_norm(x):
    """A matrix after a function: the other way that a chain can be made dense."""
    norm, M = make_norm("rms"), draw(D + 2, D, seed=9)
    linear = FunctionJacobian(lambda t: t @ M.T, norm(x))
    return Chain(linear, FunctionJacobian(norm, x)), lambda t: norm(t) @ M.T


KINDS = {
    "chain": make_chain,
    "wide": make_wide,
    "skip": make_skip,
    "general wide": make_general_wide,
    "map of norm": make_map_of_norm,
    "after scaling": make_after_scaling,
    "after scaling, no gate": lambda x: make_after_scaling(x, gated=False),
    "after centring": make_after_centring,
    "norm": lambda x: (FunctionJacobian(make_norm("layer"), x), make_norm("layer")),
}
for activation in ACTIVATIONS:
    for gated in (True, False):
        for biased in (True, False):
            options = {"activation": activation, "gated": gated, "biased": biased}
            name = " ".join([activation, "gated" * gated, "biased" * biased])
            KINDS[name] = lambda x, options=options: make_closed(x, **options)
KINDS["general"] = lambda x: make_general(x, activation="gelu_tanh")
each_kind = pytest.mark.parametrize("kind", KINDS)


def by_autograd(function, x):
    """Each token's Jacobian, `[n, d_out, d_in]`, one token at a time."""
    return torch.stack([torch.func.jacrev(lambda t: function(t[None])[0])(token) for token in x])


def made(kind):
    jacobian, function = KINDS[kind](draw(N, D, seed=20))
    return jacobian, by_autograd(function, draw(N, D, seed=20))


@each_kind
def test_dense_is_autograds(kind):
    jacobian, expected = made(kind)
    torch.testing.assert_close(jacobian.dense(), expected, rtol=1e-10, atol=1e-10)


@each_kind
def test_a_tokens_matrix_can_be_had_by_itself(kind):
    jacobian, expected = made(kind)
    matrix = matrix_of(jacobian)
    for i in (2, 0):
        torch.testing.assert_close(matrix(i), expected[i], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            jacobian.tokens(slice(i, i + 1)).dense()[0], expected[i], atol=1e-10, rtol=0
        )


@each_kind
@pytest.mark.parametrize("k", [None, 1, 3, N])
def test_products_are_those_of_the_matrices(kind, k):
    """One vector a token, or k of them; k = n and k = 1 tell the axes apart."""
    jacobian, J = made(kind)
    among = () if k is None else (k,)
    v, u = draw(N, *among, J.shape[2], seed=21), draw(N, *among, J.shape[1], seed=22)
    pushed, pulled = torch.einsum("noi,n...i->n...o", J, v), torch.einsum("noi,n...o->n...i", J, u)
    torch.testing.assert_close(jacobian.push(v), pushed, atol=1e-10, rtol=0)
    torch.testing.assert_close(jacobian.pull(u), pulled, atol=1e-10, rtol=0)


@each_kind
@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_products_of_a_shared_map_are_those_of_its_vectors(kind, k):
    """Narrow maps (k of 0, 1, 2 here) and wide ones, a constant among them."""
    jacobian, J = made(kind)
    matrix, bias = draw(J.shape[2], k, seed=30), draw(J.shape[2], seed=31)
    z, u = draw(N, k, seed=32), draw(N, J.shape[1], seed=33)
    v, pulled = z @ matrix.T + bias, torch.einsum("noi,no->ni", J, u)
    pushed = torch.einsum("noi,ni->no", J, v)
    torch.testing.assert_close(jacobian.push_map(z, matrix, bias), pushed, atol=1e-10, rtol=0)
    by_matrix, by_bias = jacobian.pull_map(u, z)
    torch.testing.assert_close(by_matrix, pulled.T @ z, atol=1e-10, rtol=0)
    torch.testing.assert_close(by_bias, pulled.sum(0), atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_norms_that_scale_are_taken_for_such(dtype):
    x = draw(N, D, seed=34).to(dtype)
    norm, centring = (make_norm(kind).to(dtype) for kind in ("rms", "layer"))
    assert ScalingNorm.of(norm, x) is not None
    assert ScalingNorm.of(nn.Identity(), x) is not None
    for function in (
        centring,
        lambda t: norm(t) + 1e-3,
        lambda t: norm(t).tanh(),
        lambda t: norm(t) + t - t.detach(),  # equal values, another derivative
    ):
        assert ScalingNorm.of(function, x) is None


@each_kind
def test_push_and_pull_are_adjoint(kind):
    """⟨Jv, u⟩ = ⟨v, Jᵀu⟩ for every token."""
    jacobian, J = made(kind)
    v, u = draw(N, 2, J.shape[2], seed=23), draw(N, 2, J.shape[1], seed=24)
    left, right = (jacobian.push(v) * u).sum(-1), (v * jacobian.pull(u)).sum(-1)
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gated", [True, False])
def test_the_general_path_is_the_closed_form(gated):
    x, v = draw(N, D, seed=25), draw(N, 3, D, seed=26)
    closed, general = make_closed(x, gated=gated)[0], make_general(x, gated=gated)[0]
    for name in ("push", "pull"):
        ours, theirs = (getattr(j, name)(v) for j in (closed, general))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(closed.dense(), general.dense(), rtol=1e-10, atol=1e-10)


def test_products_are_what_a_small_step_does():
    """Finite differences of the real function, and J taken at the right token."""
    x, v = draw(N, D, seed=27), draw(N, D, seed=28)
    jacobian, function = make_skip(x)
    step = 1e-6
    difference = (function(x + step * v) - function(x - step * v)) / (2 * step)
    torch.testing.assert_close(jacobian.push(v), difference, rtol=1e-6, atol=1e-7)


def test_products_work_without_gradients_and_leave_none():
    """The march runs under no_grad; what comes out hangs on no graph."""
    x = draw(N, D, seed=29)
    expected = make_skip(x)[0].dense()
    with torch.no_grad():
        jacobian, _ = make_skip(x)
        for found in (jacobian.dense(), jacobian.push(x), jacobian.pull(x)):
            assert not found.requires_grad
        torch.testing.assert_close(jacobian.dense(), expected)
