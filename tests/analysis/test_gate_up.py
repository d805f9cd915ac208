"""Gate and up at once: least squares token by token, and the best map of every rank."""

import dataclasses

import numpy as np
import pytest
import torch

from toolkit.analysis.gate_up import inner_pair
from toolkit.blocks.mlp import MLP, Change, MLPChange

D, D_FF = 10, 14


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make(gated=True, dW=None, db=None, seed=0):
    """An MLP and a change of gate and up: `dW` and `db` of the two stacked."""
    up = (draw(D_FF, D, seed=1), draw(D_FF, seed=2)) if gated else (None, None)
    mlp = MLP(torch.relu, draw(D_FF, D), draw(D_FF, seed=3), draw(D, D_FF), draw(D), *up)
    n = 2 if gated else 1
    dW = 0.1 * draw(n * D_FF, D, seed=4 + seed) if dW is None else dW
    db = torch.zeros(n * D_FF).double() if db is None else db
    parts = [Change((W,), b) for W, b in zip(dW.chunk(n), db.chunk(n), strict=True)]
    down = Change((torch.zeros(D, D_FF).double(),), torch.zeros(D).double())
    return mlp, MLPChange(parts[0], down, parts[1] if gated else None)


def stacked(mlp, change):
    """W̄ and t(h), in numpy."""
    names = ("gate",) if mlp.up is None else ("gate", "up")
    W = np.vstack([getattr(mlp, name) for name in names])
    dW = np.vstack([getattr(change, name).factors[0] for name in names])
    db = np.concatenate([getattr(change, name).bias for name in names])
    return W, lambda h: h.numpy() @ dW.T + db


def rows_of(mlp, change, fit, held_out):
    return {row.rank: row for row in inner_pair(mlp, change, fit, held_out)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_full_rank_is_as_good_as_a_free_vector_for_every_token(gated, biased, dtype):
    db = draw((1 + gated) * D_FF, seed=9) if biased else None
    mlp, change = make(gated, db=db)
    fit, held_out = draw(60, D, seed=10) + 1, draw(40, D, seed=11) + 1
    W, t = stacked(mlp, change)
    single = mlp.to(dtype), change.to(dtype), fit.to(dtype), held_out.to(dtype)
    row = rows_of(*single)["full"]
    steps = [np.linalg.lstsq(W, v, rcond=None)[0] for v in t(held_out)]
    left = t(held_out) - np.stack(steps) @ W.T
    residual = np.linalg.norm(left, axis=1) / np.linalg.norm(t(held_out), axis=1)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    found = row.residual_q25, row.residual_median, row.residual_q75
    assert found == pytest.approx(np.quantile(residual, [0.25, 0.5, 0.75]), abs=tolerance)
    share = 1 - np.sum(left**2) / np.sum(t(held_out) ** 2)
    assert row.explained_heldout == pytest.approx(share, abs=tolerance)
    sizes = np.linalg.norm(steps, axis=1) / np.linalg.norm(held_out, axis=1)
    assert row.size_median == pytest.approx(np.median(sizes), rel=10 * tolerance)
    assert row.n_tokens == 40
    assert 0.05 < share < 0.95 or not gated


def test_what_lies_in_the_columns_is_reached_whole():
    """ΔW̄ = W̄ D: Δh = D h. Of D's rank if it is one; a rank less leaves something."""
    mlp, _ = make()
    W = torch.cat([mlp.gate, mlp.up])
    step = torch.outer(draw(D, seed=5), draw(D, seed=6))
    mlp, change = make(dW=W @ step)
    fit, held_out = draw(60, D, seed=10), draw(40, D, seed=11)
    rows = rows_of(mlp, change, fit, held_out)
    for rank in (1, 8, "full"):
        assert rows[rank].explained_fit == pytest.approx(1, abs=1e-9)
        assert rows[rank].explained_heldout == pytest.approx(1, abs=1e-9)
        assert rows[rank].residual_q75 < 1e-5
        sizes = (held_out @ step.T).norm(dim=1) / held_out.norm(dim=1)
        assert rows[rank].size_median == pytest.approx(np.median(sizes), rel=1e-5)
    assert rows[0].explained_fit < 0.3


def test_a_change_of_biases_in_the_columns_is_one_vector():
    mlp, _ = make()
    W = torch.cat([mlp.gate, mlp.up])
    mlp, change = make(dW=torch.zeros(2 * D_FF, D).double(), db=W @ draw(D, seed=5))
    rows = rows_of(mlp, change, draw(60, D, seed=10), draw(40, D, seed=11))
    assert all(row.explained_heldout == pytest.approx(1, abs=1e-9) for row in rows.values())


def error(W, t, h, B, c):
    return np.sum((t(h) - (h.numpy() @ B.T + c) @ W.T) ** 2) / np.sum(t(h) ** 2)


@pytest.mark.parametrize("rank", [0, 1, 8])
@pytest.mark.parametrize("gated", [True, False])
def test_a_rank_is_the_best_of_its_rank(gated, rank):
    """Reduced-rank regression by numpy; no step away from it at the same rank is better."""
    mlp, change = make(gated)
    fit = draw(60, D, seed=10) @ draw(D, D, seed=12) + 1
    W, t = stacked(mlp, change)
    share = rows_of(mlp, change, fit, fit)[rank].explained_fit
    h = fit.numpy()
    X, T = h - h.mean(0), t(fit) - t(fit).mean(0)
    root = np.linalg.qr(W)[1]  # ‖W̄ Δ‖ = ‖R Δ‖
    aims = T @ np.linalg.qr(W)[0]
    full = np.linalg.lstsq(X, aims, rcond=None)[0].T
    U = np.linalg.svd(full @ X.T, full_matrices=False)[0][:, :rank]
    left, right = np.linalg.solve(root, U), U.T @ full
    c = np.linalg.lstsq(W, t(fit).mean(0), rcond=None)[0]
    best = error(W, t, fit, left @ right, c - left @ right @ h.mean(0))
    assert share == pytest.approx(1 - best, abs=1e-9)
    rng = np.random.default_rng(0)
    for _ in range(20):
        nearby = [m + 1e-3 * rng.standard_normal(m.shape) for m in (left, right, c)]
        B = nearby[0] @ nearby[1]
        assert error(W, t, fit, B, nearby[2] - B @ h.mean(0)) >= best


def test_what_did_not_change_has_no_rows():
    """Neither gate nor up, whatever the down projection did."""
    mlp, change = make()
    nothing = dataclasses.replace(change.scaled(0.0), down=Change((draw(D, D_FF),), draw(D)))
    assert inner_pair(mlp, nothing, draw(20, D), draw(10, D)) == []


def test_ranks_are_those_below_the_width():
    mlp, change = make()
    rows = rows_of(mlp, change, draw(40, D), draw(20, D, seed=1))
    assert list(rows) == [0, 1, 8, "full"]
    shares = [row.explained_fit for row in rows.values()]
    assert (np.diff(shares) > -1e-12).all()
