"""Rows of one block's inside: cases whose answer is known, on tiny models and by hand."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.support import textbook, tiny
from toolkit.analysis.first_order import FirstOrderSums
from toolkit.analysis.reachability import BUDGETS
from toolkit.blocks.jacobian import MLPJacobian
from toolkit.blocks.mlp import MLP, Change, MLPChange
from toolkit.blocks.parts import BlockParts, Sample
from toolkit.blocks.read import mlps, read_sublayers
from toolkit.blocks.sublayer import MLPSublayer
from toolkit.diagnosis.reach_rows import (
    SCALES,
    forced_reach_rows,
    mlp_targets,
    normalisation_rows,
    parts_tasks,
    reachability_rows,
    scale_rows,
    shared_reach_rows,
)
from toolkit.documents.batches import make_batches
from toolkit.documents.tokens import encode_all
from toolkit.models.locations import resolve
from toolkit.models.runner import BlockRunner

D, D_FF, LAYER = tiny.D_MODEL, tiny.D_FF, 1


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def read(family, dtype=torch.float64, **change):
    """One block's inside of a tiny pair."""
    base = tiny.make_model(family, dtype)
    (mlp, difference), sublayer = mlps(base, tiny.tune(base, **change))[LAYER], (None, None)
    if family not in ("neox", "opt"):
        batch = make_batches(encode_all(tiny.make_documents(6), tiny.make_tokenizer()))[0]
        matrices = [ours for ours, _ in mlps(base, base)]
        sublayer = read_sublayers(BlockRunner(base, resolve(base)), matrices, batch)[LAYER]
    return BlockParts(mlp, difference, *sublayer)


def sample(n=6, seed=3, n_z=32, dtype=torch.float64):
    """States of no model: all that the formulas take."""
    drawn = {name: draw(n, D, seed=seed + i) for i, name in enumerate(("h", "stream", "attended"))}
    drawn |= {"forced_delta": 0.1 * draw(n, D, seed=seed + 4), "heads": draw(n, n_z, seed=seed + 5)}
    return Sample(**{name: value.to(dtype) for name, value in drawn.items()})


def down_changed(mlp, dW):
    """A change of the down projection alone."""
    parts = {name: getattr(mlp, name) for name in ("gate", "up") if getattr(mlp, name) is not None}
    nothing = {
        name: Change((torch.zeros_like(w),), w.new_zeros(len(w))) for name, w in parts.items()
    }
    return MLPChange(**nothing, down=Change((dW,), dW.new_zeros(len(dW))))


def by_budget(rows, column="residual_median"):
    return {row["budget"]: row[column] for row in rows}


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_a_change_made_for_one_token_is_reached_there_and_not_elsewhere(family):
    """ΔW_d = W_d J(h₀) D: at h₀, Δ = D m reaches ``down`` whole; elsewhere it is no such step.

    D is such that ‖D m‖ = 0.2 ‖h₀‖: a budget of 0.3 suffices.
    """
    parts, h = read(family), draw(5, D, seed=1)
    mlp = parts.mlp
    a_g, a_u = mlp.inner(h[:1])
    D_matrix = draw(D, D_FF, seed=2)
    D_matrix *= 0.2 * h[0].norm() / (D_matrix @ (mlp.activation(a_g) * a_u)[0]).norm()
    change = down_changed(mlp, MLPJacobian.at(mlp, h[:1]).dense()[0] @ D_matrix)
    made = dataclasses.replace(parts, change=change)
    for target in ("down", "exact"):
        here, *others = (
            [row for row in reachability_rows(made, token[None]) if row["target"] == target]
            for token in h
        )
        assert by_budget(here)[0.3] < 1e-6 > by_budget(here)[1.0]
        assert by_budget(here)[0.1] > 0.1
        assert here[0]["min_norm_median"] <= 0.2
        assert np.median([by_budget(rows)[0.3] for rows in others]) > 0.05


def test_a_gate_that_closes_takes_directions_out_of_reach():
    """ReLU: only W_d's columns of open units are reached, whatever the budget.

    ΔW_d m lies along the one that is open at h₀ and closed at h₁.
    """
    eye = torch.eye(3, dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    mlp = MLP(torch.relu, eye, zero, eye, zero)
    dW = torch.zeros(3, 3, dtype=torch.float64)
    dW[0] = 0.01
    made = BlockParts(mlp, down_changed(mlp, dW))
    open_, closed = (torch.tensor([[s * 1.0, 2.0, 3.0]]).double() for s in (1, -1))
    reached = {b: max(0.0, 1 - b * 14**0.5 / 0.06) for b in BUDGETS}
    assert by_budget(reachability_rows(made, open_)) == pytest.approx(reached, abs=1e-9)
    rows = [row for row in reachability_rows(made, closed) if row["target"] == "down"]
    assert [row["residual_median"] for row in rows] == pytest.approx([1.0] * 5)
    assert rows[0]["min_norm_median"] == np.inf


def test_what_is_added_behind_the_mlp_arrives():
    """post_mlp and post_block: max(0, 1 − ρ‖x‖/‖δ‖), and the real block is as linear."""
    tokens = sample()
    rows = list(forced_reach_rows(read("llama"), dataclasses.replace(tokens, heads=tokens.h)))
    sizes = tokens.stream.norm(dim=1) / tokens.forced_delta.norm(dim=1)
    energy = tokens.forced_delta.square().sum(1)
    for location in ("post_mlp", "post_block"):
        found = [row for row in rows if row["location"] == location]
        assert [row["budget"] for row in found] == list(BUDGETS)
        for row in found:
            left = (1 - row["budget"] * sizes).clamp_min(0)
            expected = left.quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
            names = ("residual_q25", "residual_median", "residual_q75")
            assert [row[name] for name in names] == pytest.approx(expected, abs=1e-12)
            assert row["nonlinear_residual_median"] == row["residual_median"]
            share = 1 - float((left**2 * energy).sum() / energy.sum())
            assert row["explained"] == pytest.approx(share, abs=1e-12)


def test_without_mlp_the_skip_carries_everything():
    """W_d = 0: at pre_mlp the block is reached as behind the MLP, and there is nothing else."""
    mlp = read("llama").mlp
    silent = dataclasses.replace(mlp, down=torch.zeros_like(mlp.down))
    made = BlockParts(silent, down_changed(silent, torch.zeros_like(mlp.down)), MLPSublayer(silent))
    rows = list(forced_reach_rows(made, sample()))
    assert {(row["location"], row["target"]) for row in rows} == {
        (location, "block") for location in ("pre_mlp", "post_mlp", "post_block")
    }
    by_location = {
        location: [row["residual_median"] for row in rows if row["location"] == location]
        for location in ("pre_mlp", "post_block")
    }
    assert by_location["pre_mlp"] == pytest.approx(by_location["post_block"], abs=1e-9)


def test_a_head_reaches_no_more_than_all_of_the_stream():
    """Its directions are a subspace; all heads' budgets are those of the stream."""
    rows = list(forced_reach_rows(read("gemma3"), sample()))
    whole = [r for r in rows if (r["location"], r["target"]) == ("pre_mlp", "block")]
    for head in range(4):
        found = [row for row in rows if row.get("head") == head]
        assert len(found) == len(whole) == len(BUDGETS)
        for ours, theirs in zip(found, whole, strict=True):
            assert ours["residual_median"] >= theirs["residual_median"] - 1e-9
            assert ours["explained"] <= theirs["explained"] + 1e-9


@pytest.mark.parametrize("missing", ["tail", "states", "delta"])
def test_without_a_path_there_is_no_forced_reach(missing):
    parts, tokens = read("gemma3"), sample()
    if missing == "tail":
        parts = dataclasses.replace(parts, sublayer=None, heads=None)
    elif missing == "states":
        tokens = Sample(tokens.h)
    else:  # the block does what the tuned one does
        tokens = dataclasses.replace(tokens, forced_delta=torch.zeros_like(tokens.forced_delta))
    assert list(forced_reach_rows(parts, tokens)) == []
    assert len(list(reachability_rows(parts, tokens.h))) == 2 * len(BUDGETS)
    assert len(list(normalisation_rows(parts, tokens))) == (missing == "delta")


def test_targets_that_are_zero_are_left_out():
    """Only the gate changed: no ``down``; nothing changed: no target."""
    parts = read("llama")
    nothing = parts.change.scaled(0.0)
    gate_only = dataclasses.replace(nothing, gate=parts.change.gate)
    for change, names in (
        (parts.change, ["down", "exact"]),
        (gate_only, ["exact"]),
        (nothing, []),
    ):
        made = dataclasses.replace(parts, change=change)
        assert list(mlp_targets(made.mlp, made.change, sample().h)) == names
        assert {row["target"] for row in reachability_rows(made, sample().h)} == set(names)
        assert bool(list(shared_reach_rows(made, sample(20), sample(10)))) or not names


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scale_one_is_first_order(family):
    """And at other scales, that of the change so many times as large."""
    parts, h = read(family), draw(30, D, seed=5)
    rows = {row["scale"]: row for row in scale_rows(parts, h)}
    assert tuple(rows) == SCALES
    for scale, row in rows.items():
        sums = FirstOrderSums(parts.mlp, parts.change.scaled(scale))
        sums.update(h)
        assert row == {"scale": scale, **vars(sums.result()), "n_tokens": 30}
    assert rows[1.0]["remainder"] != rows[2.0]["remainder"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_remainder_of_a_small_update_grows_with_the_square_of_its_scale(family):
    """rest ∝ s², exact ∝ s: their energies' quotient ∝ s²."""
    rows = list(scale_rows(read(family, size=1e-4), draw(30, D, seed=5), (1.0, 2.0, 4.0)))
    one, two, four = (row["remainder"] for row in rows)
    assert two / one == pytest.approx(4, rel=0.02)
    assert four / one == pytest.approx(16, rel=0.02)
    shares = [row["relative_change"] for row in rows]
    assert shares[2] / shares[0] == pytest.approx(4, rel=0.01)


def test_a_linear_mlp_is_steered_whole_by_one_map():
    """No activation: J = W_d W_g for all tokens, what ΔW_d adds is a map of h, and stays so.

    ΔW_d of rank 1 needs a map of rank 1; the steps are as large as the map makes them.
    """
    W_g, W_d = (torch.linalg.qr(draw(D, D, seed=seed))[0] for seed in (6, 7))
    zero = torch.zeros(D, dtype=torch.float64)
    mlp = MLP(lambda x: x * 1.0, W_g, zero, W_d, zero)
    dW = torch.outer(draw(D, seed=8), draw(D, seed=9))
    made = BlockParts(mlp, down_changed(mlp, dW))
    fit, held_out = Sample(draw(200, D, seed=10)), Sample(draw(90, D, seed=11))
    rows = [r for r in shared_reach_rows(made, fit, held_out) if r["target"] == "down"]
    assert [row["rank"] for row in rows] == [0, 1, 8, "full"]
    for row in rows:
        shares = [row[name] for name in ("explained_fit", "explained_heldout")]
        assert shares[1] == pytest.approx(row["nonlinear_heldout"], abs=1e-9)
        assert (row["location"], row["n_fit"], row["n_heldout"]) == ("mlp_in", 200, 90)
        if row["rank"] != 0:
            assert shares == pytest.approx([1, 1], abs=0.02)
            exact = held_out.h @ torch.linalg.solve(W_d @ W_g, dW @ W_g).T
            size = float(exact.norm() / held_out.h.norm())
            assert row["size"] == pytest.approx(size, rel=0.1)
        else:
            assert abs(shares[1]) < 0.1


def test_a_small_sample_leaves_tables_out():
    """Too small a one those of shared maps, none at all those of single tokens."""
    parts, few, many = read("gemma3"), sample(4), sample(20)
    rows = parts_tasks(parts, few, many, few)
    tokens = {"reachability", "forced_reach", "normalisation"}
    shared = {"shared_reach", "inner_pair", "first_order_scale"}
    assert rows.keys() == tokens | shared
    assert all(isinstance(found(), list) for found in rows.values())
    nothing = Sample(few.h[:0])
    assert parts_tasks(parts, few, few, few).keys() == tokens
    assert parts_tasks(parts, nothing, many, few).keys() == shared
    assert parts_tasks(parts, few, many, nothing).keys() == tokens


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "phi3"])
def test_mlp_residuals_do_not_need_float64(family):
    """A float32 block's residuals, and its sample's, are within 10⁻³ at every budget."""
    h = draw(5, D, seed=12)
    ours, theirs = (
        [r["residual_median"] for r in reachability_rows(read(family, dtype), h.to(dtype))]
        for dtype in (torch.float32, torch.float64)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    block = tiny.blocks_of(tiny.make_model(family))[LAYER]
    tuned = tiny.blocks_of(tiny.tune(tiny.make_model(family)))[LAYER]
    book = [row["residual_median"] for row in textbook.reachability(block, tuned, h.numpy())]
    np.testing.assert_allclose(theirs, book, atol=1e-8)
