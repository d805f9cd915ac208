"""LoReFT: its authors' formula, its constraint, and its best fit in closed form."""

import pytest
import torch

from tests.support.pairs import moments_of
from toolkit.adapters.loreft import LoReFT
from toolkit.analysis.linear_fit import RELATIVE_RIDGE, fit_linear
from toolkit.fitting.from_moments import loreft_from

D = 8


def orthonormal(r, seed=0, dtype=torch.float32, d=D):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(d, r, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(draw).Q.T.to(dtype).contiguous()


def drawn(r, seed=0, d=D):
    """A LoReFT of rank `r` with random parts, and the parts."""
    generator = torch.Generator().manual_seed(seed + 100)
    rows = orthonormal(r, seed, d=d)
    target = torch.randn(r, d, generator=generator)
    bias = torch.randn(r, generator=generator)
    return LoReFT(rows, target, bias), rows, target, bias


@pytest.mark.parametrize("r", [1, 3, D])
def test_it_is_pyrefts_formula(r):
    """``base + (act(learned_source(base)) − base·rotate) · rotateᵀ``, act the identity.

    As pyreft defines it: `rotate` `[d, r]` with orthonormal columns, `learned_source` a
    ``Linear(d, r)``.
    """
    adapter, rows, target, bias = drawn(r)
    rotate = rows.T
    learned_source = torch.nn.Linear(D, r)
    learned_source.weight.data, learned_source.bias.data = target, bias
    base = torch.randn(5, 7, D, generator=torch.Generator().manual_seed(9))
    rotated_base = base @ rotate
    output = base + torch.matmul(learned_source(base) - rotated_base, rotate.T)
    assert torch.allclose(base + adapter(base), output, rtol=0, atol=5e-6)
    # Within the rows the state becomes W y + b; outside it stays.
    steered = base + adapter(base)
    assert torch.allclose(steered @ rotate, learned_source(base), atol=5e-6)
    outside = torch.eye(D) - rotate @ rotate.T
    assert torch.allclose(steered @ outside, base @ outside, atol=5e-6)


@pytest.mark.parametrize("optimiser", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("r", [1, 3, D])
def test_rows_stay_orthonormal_in_training(r, decay, optimiser):
    """Twenty steps, which move them; weight decay, too, must not pull them to zero."""
    adapter, rows, _, _ = drawn(r)
    adapter.requires_grad_(True)
    steps = optimiser(adapter.parameters(), 0.03, weight_decay=decay)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        steps.zero_grad()
        states, targets = torch.randn(2, 30, D, generator=generator)
        (adapter(states) - targets).square().mean().backward()
        steps.step()
    now = adapter.rows.detach()
    assert torch.allclose(now @ now.T, torch.eye(r), atol=1e-5)
    assert not torch.allclose(now, rows, atol=1e-2)


def data(seed=0, n=60):
    """States, and targets that depend on them, with means and more than noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64) * torch.linspace(0.5, 2, D) + 1
    mix = torch.randn(D, D, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, D, generator=generator, dtype=torch.float64)
    return x, x @ mix.T + 0.5 * noise - 2


def objective(x, t, rows, change, bias):
    """``E‖t − Rᵀ(C x + b)‖² + ridge ‖C‖²`` with C = W − R: the ridge is on what is added."""
    ridge = RELATIVE_RIDGE * float((x - x.mean(0)).square().sum(1).mean()) / D
    left = t - (x @ change.T + bias) @ rows
    return float(left.square().sum(1).mean() + ridge * change.square().sum())


def parts(adapter):
    rows = adapter.rows.detach()
    return rows, adapter.target - rows, adapter.bias


@pytest.mark.parametrize("r", [1, 3, 6])
def test_the_closed_form_is_the_best_of_its_kind(r):
    """No change of rows, target or bias, small or large, lowers the objective."""
    x, t = data()
    rows, change, bias = parts(loreft_from(moments_of(x, t), "x", "t", r, torch.float64))
    assert torch.allclose(rows @ rows.T, torch.eye(r, dtype=torch.float64), atol=1e-12)
    best = objective(x, t, rows, change, bias)
    generator = torch.Generator().manual_seed(5)
    noise = lambda like: torch.randn(like.shape, generator=generator, dtype=torch.float64)  # noqa: E731
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(30):
            other = torch.linalg.qr((rows + size * noise(rows)).T).Q.T
            other = (other @ rows.T).diagonal().sign()[:, None] * other
            for found in (
                objective(x, t, other, change, bias),
                objective(x, t, rows, change + size * noise(change), bias),
                objective(x, t, rows, change, bias + size * noise(bias)),
                objective(x, t, other, change + size * noise(change), bias + size * noise(bias)),
            ):
                assert found >= best - 1e-10


@pytest.mark.parametrize("r", [1, 3])
def test_no_other_rows_with_their_own_best_map_are_better(r):
    """Each set of random rows gets the ridge solution for it, by least squares."""
    x, t = data()
    best = objective(x, t, *parts(loreft_from(moments_of(x, t), "x", "t", r, torch.float64)))
    for seed in range(200):
        rows = orthonormal(r, seed, torch.float64)
        fit = fit_linear(moments_of(x, t @ rows.T), "x", "t")
        assert objective(x, t, rows, fit.full, fit.bias("full")) >= best - 1e-10


def test_at_full_rank_it_is_the_full_linear_fit():
    x, t = data()
    fit = fit_linear(moments_of(x, t), "x", "t")
    adapter = loreft_from(moments_of(x, t), "x", "t", "full", torch.float64)
    assert adapter.rank == "full"
    assert torch.allclose(adapter(x), x @ fit.full.T + fit.bias("full"), atol=1e-9)


def test_states_that_never_vary_are_given_the_mean():
    x, t = torch.ones(20, D, dtype=torch.float64), data(n=20)[1]
    adapter = loreft_from(moments_of(x, t), "x", "t", 1, torch.float64)
    assert torch.allclose(adapter(x), t.mean(0).expand_as(t), atol=1e-9)
