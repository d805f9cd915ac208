"""Plots: every one on full, empty and partial frames, in memory and read back from CSV."""

import re

import pytest

from tests.support.blank import blanked
from tests.support.plausible import frames, reread
from toolkit.tables import drawing as draw
from toolkit.tables.spec import specs
from toolkit.tables.table import Table

FULL = frames()


def words(figure):
    return " ".join(text.get_text() for axes in figure.axes for text in axes.texts)


def n_marks(figure):
    """Lines that show data: reference lines are named as such."""
    return sum(line.get_label() != draw.REFERENCE for axes in figure.axes for line in axes.lines)


@pytest.mark.parametrize("name", specs())
def test_a_full_frame_is_drawn_alike_in_memory_and_from_its_file(name):
    ours, theirs = specs()[name].plot(FULL[name]), specs()[name].plot(reread(FULL[name]))
    assert n_marks(ours) == n_marks(theirs) > 0
    for figure in (ours, theirs):
        assert all(axes.get_title(loc="left") or axes.get_title() for axes in figure.axes)


@pytest.mark.parametrize("name", specs())
def test_an_empty_frame_says_so(name):
    assert draw.NOT_APPLICABLE in words(Table.of(name, []).plot())


@pytest.mark.parametrize("name", ["norms", "spectrum", "linear_fit", "steerability"])
def test_a_family_without_branches_is_drawn_with_what_it_has(name):
    frame = FULL[name]
    if name == "norms":
        frame = frame.assign(pre_mlp=None, post_mlp=None, mlp_share=None)
    else:
        column = "source" if name == "linear_fit" else "location"
        frame = frame[~frame[column].isin(["pre_mlp", "post_mlp"])]
    assert n_marks(specs()[name].plot(frame)) > 0


@pytest.mark.parametrize("name", specs())
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_zeros_and_gaps_are_drawn_without_a_warning(name, value, tmp_path):
    draw.save(specs()[name].plot(blanked(FULL[name], value)), tmp_path / name)


@pytest.mark.parametrize("name", specs())
def test_nothing_is_cut_off(name):
    """Every title, label and legend lies within the figure."""
    figure = specs()[name].plot(FULL[name])
    figure.draw_without_rendering()
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box.x0 >= 2
        assert box.x1 <= figure.bbox.width - 2


@pytest.mark.parametrize("name", ["steerability", "linear_fit"])
def test_no_two_elements_of_a_figure_share_an_id(name, tmp_path):
    svg, _ = draw.save(specs()[name].plot(FULL[name]), tmp_path / name)
    ids = re.findall(r'\bid="([^"]+)"', svg.read_text("utf-8"))
    assert len(ids) == len(set(ids))


def test_values_off_the_axis_are_written_at_its_edge():
    assert "−10.5" in words(specs()["steerability"].plot(FULL["steerability"]))


def test_files_are_the_same_bytes_every_time(tmp_path):
    for place in ("a", "b"):
        draw.save(specs()["norms"].plot(FULL["norms"]), tmp_path / place)
    for suffix in (".svg", ".png"):
        ours, theirs = ((tmp_path / f"{place}{suffix}").read_bytes() for place in ("a", "b"))
        assert ours == theirs


@pytest.mark.parametrize("name", [spec.name for spec in specs().values() if spec.draws_noise])
def test_noise_is_a_band_below_what_is_drawn_or_words_if_it_is_far_below(name):
    figure = Table(name, FULL[name]).plot(Table("noise", FULL["noise"]))
    assert len(figure.axes[1].collections) == 1
    assert "rounding noise" not in words(figure)
    columns = ["noise_rms", "noise_relative", "noise_norm"]
    little = FULL["noise"].assign(**{column: FULL["noise"][column] / 1e4 for column in columns})
    figure = Table(name, FULL[name]).plot(Table("noise", little))
    assert not figure.axes[1].collections
    assert "rounding noise: at most" in words(figure)
