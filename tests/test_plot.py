"""Plots: every one on full, empty and partial frames, in memory and read back from CSV."""

import pytest

from tests.plausible import frames, reread
from toolkit import plot
from toolkit.table import COLUMNS, Table

FULL = frames()


def words(figure):
    return " ".join(text.get_text() for axes in figure.axes for text in axes.texts)


def n_marks(figure):
    """Lines that show data: reference lines are named as such."""
    return sum(line.get_gid() != "ref" for axes in figure.axes for line in axes.lines)


@pytest.mark.parametrize("name", COLUMNS)
def test_a_full_frame_is_drawn_alike_in_memory_and_from_its_file(name):
    ours, theirs = plot.PLOTS[name](FULL[name]), plot.PLOTS[name](reread(FULL[name]))
    assert n_marks(ours) == n_marks(theirs) > 0
    for figure in (ours, theirs):
        assert all(axes.get_title(loc="left") or axes.get_title() for axes in figure.axes)


@pytest.mark.parametrize("name", COLUMNS)
def test_an_empty_frame_says_so(name):
    assert plot.NOT_APPLICABLE in words(Table.of(name, []).plot())


@pytest.mark.parametrize("name", ["norms", "spectrum", "linear_fit", "steerability"])
def test_a_family_without_branches_is_drawn_with_what_it_has(name):
    frame = FULL[name]
    if name == "norms":
        frame = frame.assign(pre_mlp=None, post_mlp=None, mlp_share=None)
    else:
        column = "source" if name == "linear_fit" else "location"
        frame = frame[~frame[column].isin(["pre_mlp", "post_mlp"])]
    assert n_marks(plot.PLOTS[name](frame)) > 0


def test_values_off_the_axis_are_written_at_its_edge():
    assert "−10.5" in words(plot.steerability(FULL["steerability"]))


def test_files_are_the_same_bytes_every_time(tmp_path):
    for place in ("a", "b"):
        plot.save(plot.norms(FULL["norms"]), tmp_path / place)
    for suffix in (".svg", ".png"):
        ours, theirs = ((tmp_path / f"{place}{suffix}").read_bytes() for place in ("a", "b"))
        assert ours == theirs
