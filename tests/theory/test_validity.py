"""The statistics of the study of predictions, on small cases worked out by hand; and its page."""

import numpy as np
import pandas as pd
import pytest

from tests.support.recipes import load_recipe
from toolkit.theory.validity import (
    PREDICTORS,
    across,
    correlations,
    elsewhere,
    finished,
    mean_interval,
    place_ranges,
    rank_correlation,
    regrets,
    thresholds,
)

page = load_recipe("validity_page")
PLACES = ("heads", "pre_mlp", "post_mlp", "post_block")


def make_cells(name="one", **columns):
    """Two sizes at four places; training is best at rank 8 after the MLP."""
    frame = pd.DataFrame(
        {
            "fine_tune": name,
            "rank": np.repeat([1, 8], 4),
            "location": PLACES * 2,
            "trained": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9, 0.8],
        }
    )
    known = dict.fromkeys(PREDICTORS, frame["rank"] / 8)
    return frame.assign(**{**known, **columns})


def test_rank_correlation_without_ties_is_the_textbooks():
    rng = np.random.default_rng(0)
    x, y = rng.permutation(9), rng.permutation(9)
    assert rank_correlation(x, y) == pytest.approx(1 - 6 * ((x - y) ** 2).sum() / (9 * 80))


def test_what_orders_nothing_has_correlation_0():
    assert rank_correlation([2, 2, 2], [1, 2, 3]) == 0


def test_correlations_over_all_cells_and_over_places():
    cells = make_cells(closed_form=[4, 3, 2, 1, 5, 6, 8, 7], norm_share=[np.nan, 1, 2, 3] * 2)
    found = correlations(cells).set_index(["predictor", "over"])
    # One size is turned round (-1), the other right (1).
    assert found.rho["closed_form", "places"] == pytest.approx(0)
    # Differences of ranks: 3, 1, 1, 3 among the eight.
    assert found.rho["closed_form", "all"] == pytest.approx(1 - 6 * 20 / (8 * 63))
    # Without heads; the places of rank 8 are in the order 1, 3, 2.
    assert found.rho["norm_share", "places"] == pytest.approx((1 + 0.5) / 2)
    assert found.baseline["norm_share", "places"] == 0
    expected = rank_correlation([1, 1, 1, 8, 8, 8], [2, 3, 4, 6, 9, 8])
    assert found.baseline["norm_share", "all"] == pytest.approx(expected)


def test_regrets():
    cells = make_cells(closed_form=[4, 3, 2, 1, 5, 6, 7, 8], k90=[np.nan] * 8)
    found = regrets(cells).set_index(["chooser", "over"]).lost
    assert found["closed_form", "all"] == pytest.approx(0.1)
    assert found["closed_form", "places"] == pytest.approx((0.3 + 0.1) / 2)
    assert found["post_block", "places"] == pytest.approx((0 + 0.1) / 2)
    assert found["random", "all"] == pytest.approx(0.9 - cells.trained.mean())
    assert "k90" not in found.index.get_level_values("chooser")


def test_fine_tunes_beside_each_other():
    """Training is better from one fine-tune to the next; a predictor says so at rank 8 alone."""
    cells = pd.concat(
        [make_cells(name).assign(closed_form=[-i] * 4 + [i] * 4) for i, name in enumerate("abc")],
        ignore_index=True,
    )
    cells.trained += cells.fine_tune.map({"a": 0, "b": 0.1, "c": 0.3})
    assert across(cells, "closed_form") == pytest.approx(0)
    assert across(cells[cells["rank"] == 8], "closed_form") == pytest.approx(1)
    # The first cell of "a" has .1, the same one of the others .2 and .4.
    assert elsewhere(cells)[0] == pytest.approx(0.3)


def test_place_ranges():
    found = place_ranges(make_cells()).set_index(["rank", "heads"])["range"]
    assert found.to_dict() == pytest.approx(
        {(1, True): 0.3, (1, False): 0.2, (8, True): 0.4, (8, False): 0.3}
    )


def test_only_whole_fine_tunes_that_changed_something_count_as_many_of_each_base():
    names = ["a1", "a2", "a3", "b1", "b2", "b3"]
    tunes = pd.DataFrame({"fine_tune": names, "base": ["a"] * 3 + ["b"] * 3})
    tunes["kl"] = [1, 1, 1, 1, 0.001, 1]
    cells = pd.concat([make_cells(name) for name in names]).iloc[:-1]
    # b2 changed nothing, b3 lacks a cell: one of each base is left.
    assert set(finished(tunes, cells, 8).fine_tune) == {"a1", "b1"}


def test_thresholds():
    cells = make_cells(closed_form=[0, 0.1, 0.2, 0.3, 0.6, 0.7, 0.95, 0.9])
    found = {row["bound"]: row for row in thresholds(cells)}
    assert found["at least 0.9"]["cells"] == 2
    assert found["at least 0.9"]["least"] == 0.8
    assert found["at least 0.9"]["at_nine_tenths"] == 0.5
    assert found["below 0.6"]["median"] == pytest.approx(0.25)


def test_intervals_cover_the_mean():
    """Of 200 samples of 16 from a normal distribution, about 93 in 100."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        _, low, high = mean_interval(rng.normal(size=16))
        covered.append(low <= 0 <= high)
    assert 0.88 < np.mean(covered) < 0.98


def test_the_page_shows_what_the_rows_make():
    text = page.PAGE.read_text("utf-8")
    assert page.with_tables(text) == text
    assert {found[2] for found in page.MARKED.finditer(text)} == page.TABLES.keys()


def test_the_verdicts_figures_are_those_of_the_rows():
    cells = page.Rows().cells
    at_nine, at_half = (cells[cells.closed_form >= bound].trained for bound in (0.9, 0.5))
    below = cells[cells.closed_form < 0.5].trained
    assert (len(at_nine), (at_nine >= 0.9).sum()) == (16, 15)
    assert at_nine.min() >= 0.89
    assert (len(at_half), len(below)) == (80, 74)
    assert at_half.min() >= 0.66
    assert [round(x, 2) for x in (below.min(), below.max(), (below >= 0.5).mean())] == [
        0.16,
        0.92,
        0.74,
    ]
    assert (cells.trained >= cells.closed_form - page.FLOOR).sum() == 148
