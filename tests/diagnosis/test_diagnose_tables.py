"""The tables of norms, spectra, fits and matrices equal the textbook's, in several families."""

import pandas as pd

from tests.support.diagnosed import assert_tables_equal, case, each_case
from toolkit.diagnosis.reach_rows import SCALES


@each_case
def test_norms(family, dtype):
    """Mean norm per token of every branch, and the MLP's share of them."""
    c = case(family, dtype)
    assert_tables_equal(c.run.norms.frame, c.book.norms(), ["layer", "of"], c.tolerance)


@each_case
def test_spectrum(family, dtype):
    """Eigenvalues of E[δδᵀ], from singular values of the deltas."""
    c = case(family, dtype)
    keys = ["layer", "location", "mode"]
    assert_tables_equal(c.run.spectrum.frame, c.book.spectrum(), keys, c.tolerance)


@each_case
def test_linear_fit(family, dtype):
    """Least squares with a ridge and reduced-rank regression, for all sources, targets, ranks.

    `explained` is 1 less a quotient and may be near 0: its scale is 1.
    """
    c = case(family, dtype)
    keys = ["layer", "source", "target", "mode", "rank"]
    tolerance = {"rtol": 0.0, "atol": c.tolerance}
    assert_tables_equal(c.run.linear_fit.frame, c.book.linear_fit(), keys, **tolerance)


@each_case
def test_first_order(family, dtype):
    """Terms of the MLP's change, token by token; shares may be near 0: their scale is 1."""
    c = case(family, dtype)
    tolerance = {"rtol": 0.0, "atol": c.tolerance}
    assert_tables_equal(c.run.first_order.frame, c.book.first_order(), ["layer"], **tolerance)


@each_case
def test_inner_pair(family, dtype):
    """Least squares on [W_g; W_u] token by token, and reduced-rank regression of its answer."""
    c = case(family, dtype)
    tolerance = {"rtol": c.tolerance, "atol": c.tolerance}
    assert_tables_equal(c.run.inner_pair.frame, c.book.inner_pair(), ["layer", "rank"], **tolerance)


@each_case
def test_first_order_scale(family, dtype):
    """First order of the blocks whose parameters lie so far along the line from base to tuned."""
    c = case(family, dtype)
    rows = c.book.first_order_scale(SCALES)
    tolerance = {"rtol": c.tolerance, "atol": c.tolerance}
    assert_tables_equal(c.run.first_order_scale.frame, rows, ["layer", "scale"], **tolerance)


@each_case
def test_mlp_fit(family, dtype):
    """Compare the best ReFT at the MLP's output, and how linear the MLP is, with the textbook."""
    c = case(family, dtype)
    keys = ["layer", "source", "target", "rank"]
    assert_tables_equal(c.run.mlp_fit.frame, c.book.mlp_fit(), keys, 0, 2 * c.tolerance)


@each_case
def test_weights(family, dtype):
    """Singular values of every matrix's change, and what of it lies outside the matrix's columns.

    In float64 here: in float32 the change is a difference of rounded numbers.
    """
    c = case(family, dtype)
    frame = c.run.weights.frame.drop(columns="rank")
    rows = pd.DataFrame(c.book.weights()).drop(columns="rank")
    assert_tables_equal(frame, rows, ["layer", "module"], c.tolerance, c.tolerance)
    assert (c.run.weights.frame["rank"] == frame[["rows", "columns"]].min(axis=1)).all()
