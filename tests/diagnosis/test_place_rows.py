"""Places beside each other: the same tokens, and maps whose answer is known."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.diagnosis.test_reach_rows import D, draw, read
from tests.support import textbook
from toolkit.blocks.parts import PlaceSample
from toolkit.diagnosis.place_rows import PLACE_RANKS, places_tasks
from toolkit.fitting.spec import FitSpec

THROUGH = [FitSpec.linear("pre_mlp", rank, "forced", "block") for rank in (0, 8)]


def places(n, seed, delta=None):
    """States of no model; `delta` makes the block's delta of (stream, attended)."""
    drawn = [draw(n, D, seed=seed + i) for i in range(4)]
    sample = PlaceSample(*drawn)
    if delta is None:
        return sample
    return dataclasses.replace(sample, forced_delta=delta(sample.stream, sample.pre_mlp))


def joined(tasks):
    """The rows and the adapters of all tasks."""
    rows, adapters = [], {}
    for more, others in (task() for task in tasks):
        rows += more.get("shared_reach", [])
        adapters |= others
    return rows, adapters


def found(parts, delta=None, parallel=False, specs=THROUGH, n=300):
    sides = places(n, 1, delta), places(n // 2, 50, delta)
    rows, adapters = joined(places_tasks(parts, sides, specs, parallel, torch.float64))
    table = {(r["location"], r["rank"]): r for r in rows}
    return sides, table, adapters


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_what_a_small_map_before_the_mlp_does_is_supplied_from_there(family):
    """The block's delta made by adding B a + c before the MLP: found through the block."""
    parts = read(family)
    B, c = 1e-4 * draw(D, 8, seed=7) @ draw(8, D, seed=8), 1e-4 * draw(D, seed=9)

    def delta(stream, attended):
        return parts.sublayer(stream + attended @ B.T + c) - parts.sublayer(stream)

    sides, table, adapters = found(parts, delta, n=4000)
    assert table["pre_mlp", 8]["explained_heldout"] > 0.9
    assert table["pre_mlp", 8]["explained_heldout"] > table["pre_mlp", 0]["explained_heldout"]
    share = table["pre_mlp", 8]["nonlinear_heldout"]
    assert share == pytest.approx(table["pre_mlp", 8]["explained_heldout"], abs=1e-2)
    # The adapters are those maps.
    stream, attended = sides[1].stream, sides[1].pre_mlp
    with torch.no_grad():
        steered = parts.sublayer(stream + adapters[THROUGH[1]](attended)) - parts.sublayer(stream)
    left = (steered - sides[1].forced_delta).square().sum() / sides[1].forced_delta.square().sum()
    assert 1 - float(left) == pytest.approx(share, abs=1e-6)
    assert adapters[THROUGH[0]].kind == "vector"
    assert adapters[THROUGH[1]].rank == 8


@pytest.mark.parametrize("parallel", [False, True])
def test_what_arrives_is_least_squares_on_the_same_tokens(parallel):
    parts = read("neox" if parallel else "llama")
    sides, table, adapters = found(parts, parallel=parallel, specs=[] if parallel else THROUGH)
    assert {row["n_fit"] for row in table.values()} == {300}
    assert {row["n_heldout"] for row in table.values()} == {150}
    assert set(table) == {
        (p, r) for p in ("pre_mlp", "post_mlp", "post_block") for r in PLACE_RANKS
    }
    for location in ("pre_mlp", "post_mlp", "post_block")[not parallel :]:
        for rank in PLACE_RANKS:
            X, T = (getattr(sides[0], n).numpy() for n in (location, "forced_delta"))
            fitted = textbook.fit(X, T, rank)
            X, T = (getattr(sides[1], n).numpy() for n in (location, "forced_delta"))
            expected = textbook.explained(fitted, X, T)
            row = table[location, rank]
            assert row["explained_heldout"] == pytest.approx(expected, abs=1e-9)
            assert row["nonlinear_heldout"] == row["explained_heldout"]
            assert np.isfinite(row["explained_heldout_sem"])
    assert bool(adapters) != parallel


def test_nothing_changed_is_nothing_explained_and_adapters_that_add_nothing():
    parts = read("llama")
    nothing = dataclasses.replace(places(40, 1), forced_delta=torch.zeros(40, D).double())
    rows, adapters = joined(places_tasks(parts, (nothing, nothing), THROUGH, False, torch.float64))
    assert [row["explained_heldout"] for row in rows] == [0.0, 0.0]
    assert list(adapters) == THROUGH
    assert not any(bool(adapter(nothing.pre_mlp).any()) for adapter in adapters.values())
