"""A diagnosis' tables of reachability equal the textbook's, in several families."""

import numpy as np
import pandas as pd
import pytest
import torch

from tests.support import tiny
from tests.support.diagnosed import (
    FAMILIES,
    INSIDE,
    WITH_A_TAIL,
    assert_tables_equal,
    book_of_few,
    case,
    each_case,
    few,
)
from toolkit import Options, diagnose
from toolkit.tables.spec import specs


@pytest.mark.parametrize("family", FAMILIES)
def test_reachability(family):
    """Budgeted residuals by damped least squares, on every counted token of few documents.

    A budget that suffices leaves a residual of rounding, 1e-16 or 1e-15: a residual's scale is 1.
    """
    frame = few(family, torch.float64).reachability.frame
    keys = ["layer", "target", "budget"]
    assert_tables_equal(frame, book_of_few(family).reachability(), keys, 1e-6, 1e-9)


@pytest.mark.parametrize("family", WITH_A_TAIL)
def test_reachability_in_float32_is_that_in_float64(family):
    """A float32 pair's residuals are within 10⁻³ of the float64 textbook at every budget."""
    frame = few(family, torch.float32).reachability.frame
    rows = pd.DataFrame(book_of_few(family).reachability())
    keys = ["layer", "target", "budget"]
    shown = [*keys, "residual_q25", "residual_median", "residual_q75", "n_tokens"]
    assert_tables_equal(frame[shown], rows[shown], keys, 0, 1e-3)
    norms = [*keys, "min_norm_median"]  # a step along directions that float32 hardly holds
    assert_tables_equal(frame[norms], rows[norms], keys, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", WITH_A_TAIL)
def test_forced_reach(family, dtype):
    """Every location and head, by dense Jacobians of the real modules and their singular values.

    Most families' norms compute in float32 even in a float64 model.
    """
    frame = few(family, dtype).forced_reach.frame
    assert set(frame.location) == {"pre_mlp", "heads", "post_mlp", "post_block"}
    keys = ["layer", "location", "head", "target", "budget"]
    tolerance = 1e-4 if dtype == torch.float64 else 1e-3
    rows = pd.DataFrame(book_of_few(family).forced_reach())
    shown = [name for name in rows if name != "nonlinear_residual_median"]
    assert_tables_equal(frame[shown], rows[shown], keys, 0, tolerance)
    # A budget that suffices is spent along directions that the map annihilates: any step will do.
    rows = rows[rows.budget < 0.3]
    assert {"pre_mlp", "heads", "post_mlp", "post_block"} == set(rows.location)
    shown = [*keys, "nonlinear_residual_median"]
    frame = frame[shown].merge(rows[keys], on=keys)
    assert_tables_equal(frame, rows[shown], keys, 5 * tolerance, 5 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", [*WITH_A_TAIL, "olmo2"])
def test_normalisation(family, dtype):
    """Medians of gains that dense Jacobians of the norms have; 1 where there is no norm."""
    rows = list(book_of_few(family).normalisation())
    frame = few(family, dtype).normalisation.frame
    assert_tables_equal(frame, rows, ["layer"], 1e-4, 1e-5)
    if family == "olmo2":
        assert set(frame.norm_gain) == set(frame.radial_gain) == {1.0}
    assert (frame.post_gain == 1).all() == (family in ("llama", "phi3", "gpt2"))


@pytest.mark.parametrize("family", FAMILIES)
def test_places_are_compared_on_the_same_tokens(family):
    """After the MLP whatever is added arrives: the shares are those of `linear_fit`."""
    c = case(family, torch.float64)
    keys = ["layer", "location", "target", "rank"]
    ours = c.run.shared_reach.frame.query("target == 'block'")
    assert len(set(ours.n_fit)) == len(set(ours.n_heldout)) == 1
    arriving = ours.query("location in ('post_mlp', 'post_block') or @family == 'neox'")
    theirs = c.run.linear_fit.frame.query("mode == 'forced' and target == 'block'")
    theirs = theirs[theirs["rank"].isin([0, 8, "full"])].drop(columns="mode")
    theirs = theirs.rename(columns={"source": "location"})
    theirs = theirs[theirs.location.isin(arriving.location)]
    shown = [*keys, "explained_fit", "explained_heldout"]
    # The sample's tokens are in another order, in another frame.
    assert_tables_equal(arriving[shown], theirs[shown], keys, 1e-6, 1e-9)
    assert (arriving.nonlinear_heldout == arriving.explained_heldout).all()


@each_case
def test_shared_reach_before_the_mlp(family, dtype):
    """Rows of every layer, target and rank; no map explains more than a vector for every token.

    On the tokens that it was fitted on, more ranks explain as much or more (up to where the fits
    are stopped), and something where there is something.
    """
    c = case(family, dtype)
    frame = c.run.shared_reach.frame.query("location in ('mlp_in', 'pre_mlp')")
    aims = [("mlp_in", "down"), ("mlp_in", "exact")]
    inside = family in WITH_A_TAIL or family == "qwen3"
    aims += [("pre_mlp", "block")] if inside or family == "neox" else []
    expected = {(layer, *aim) for layer in range(tiny.N_LAYERS) for aim in aims}
    groups = dict(list(frame.groupby(["layer", "location", "target"])))
    assert groups.keys() == expected
    for group in groups.values():
        place = group.location.iloc[0] == "pre_mlp"
        assert group["rank"].tolist() == ([0, 8, "full"] if place else [0, 1, 8, "full"])
        shares = group.explained_fit.to_numpy()
        assert (np.diff(shares) > -0.02).all()
        assert 0 < shares[-1] <= 1
        assert (group.explained_heldout <= 1).all()
        assert np.isfinite(group.drop(columns=["location", "target", "rank"]).to_numpy(float)).all()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_insides_tables_are_complete(family):
    """Every block in every table, with finite numbers; only rows that have no head lack one."""
    run = case(family, torch.float32).run
    for name in INSIDE:
        frame = getattr(run, name).frame
        assert sorted(set(frame.layer)) == list(range(tiny.N_LAYERS)), name
        assert list(frame) == list(specs()[name].columns)
        numbers = frame.select_dtypes("number").drop(columns="head", errors="ignore")
        assert np.isfinite(numbers.to_numpy(float)).all(), name
    heads = run.forced_reach.frame
    assert (heads["head"].notna() == (heads.location == "heads")).all()
    assert set(heads["head"].dropna()) == set(range(4))


def test_no_shared_sample_leaves_the_shared_tables_empty(llama_pair):
    """Leave out what is fitted before the MLP; single tokens and moments' tables are the same."""
    documents = tiny.make_documents(24)
    runs = [
        diagnose(llama_pair, documents, Options(new_tokens=2, shared_sample=n), show_progress=False)
        for n in (0, 64)
    ]
    without, with_one = runs
    assert without.inner_pair.frame.empty
    assert without.first_order_scale.frame.empty
    assert without.shared_reach.frame.empty
    assert len(with_one.shared_reach.frame)
    assert "block" in set(with_one.steerability.frame.target)
    assert "block" not in set(without.steerability.frame.target)
    for name in ("reachability", "forced_reach", "normalisation", "mlp_fit", "weights"):
        frames = [getattr(run, name).frame for run in runs]
        pd.testing.assert_frame_equal(*frames)
        assert len(frames[0])
