"""When a steer behind the block can do what one behind the MLP does, and when it cannot.

A drawing, no data. Above, the skip term s and the MLP's output y lie in subspaces S and Y that
share only 0: the oblique projection P, along S onto Y, finds y in h = s + y, and A P h = A y, of
no larger rank. Below, Y holds S: one h is several sums, and no map of h alone gives A y for each.
"""

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toolkit.tables.drawing import BLACK, GREY, LOCATION_STYLE, STYLE, WIDTH, Plot

MADE_BY = ()
SKIP, MLP = GREY, LOCATION_STYLE["post_mlp"]["color"]
BLOCK = LOCATION_STYLE["post_block"]["color"]
S, Y = np.array([1.0, 0.22]), np.array([0.35, 1.0])  # directions of the two subspaces
ORIGIN, STEER = np.zeros(2), np.array([-0.55, 0.5])  # STEER: A y
HALF = "#fdf3df"  # a light shade of the MLP's colour

Point = np.ndarray


def draw(data: Path) -> Figure:
    with rc_context(STYLE):
        figure = Plot(figsize=(WIDTH, 9.6), layout="constrained")
        apart, overlap = figure.subplots(2, 1)
        _apart(apart)
        _overlap(overlap)
        for axes in (apart, overlap):
            axes.set(xlim=(-0.75, 5.35), ylim=(-1.15, 3.4), aspect="equal")
            axes.set_axis_off()
    return figure


def _apart(axes: Axes) -> None:
    """Two lines that cross in 0: from h along S one meets Y in y, whatever s is."""
    axes.set_title("S and Y share only 0: P exists")
    s, y = 2.6 * S, 2.0 * Y
    h = s + y
    _line(axes, -0.5 * S, 4.7 * S, SKIP, "S")
    _line(axes, -0.5 * Y, 2.9 * Y, MLP, "Y")
    for end, color, name, shift in (
        (s, SKIP, "skip term $s$", (0.0, -0.28)),
        (y, MLP, "MLP output\n$y = P h$", (0.04, -0.72)),
        (h, BLOCK, "block output $h = s + y$", (0.12, -0.2)),
    ):
        _arrow(axes, ORIGIN, end, color)
        axes.text(*(end + shift), name)
    _dashed(axes, h, y)
    middle = (h + y) / 2
    axes.text(*middle, "P: along S, onto Y", rotation=12.4, ha="center", va="bottom", color=GREY)
    _dashed(axes, h, s)
    for start, name in ((y, "$A y$"), (h, "$A P h$")):
        _arrow(axes, start, start + STEER, BLACK)
        axes.text(*(start + STEER + (0.0, 0.12)), name, ha="center")
    axes.text(2.3, -0.85, "the same steer behind the MLP and behind the block", ha="center")


def _overlap(axes: Axes) -> None:
    """A line in a plane: h less any s is in Y."""
    axes.set_title("S lies in Y: one h is several sums, and no P exists")
    axes.fill([-0.7, 4.7, 5.3, -0.1], [-0.5, -0.5, 3.2, 3.2], color=HALF)
    axes.text(4.95, 2.9, "Y: the plane", ha="right", color=BLACK)
    _line(axes, -0.5 * S, 4.7 * S, SKIP, "S")
    h = 2.6 * S + 2.0 * Y
    _arrow(axes, ORIGIN, h, BLOCK)
    axes.text(h[0] + 0.12, h[1] - 0.1, "$h$")
    for share, index in ((1.2, 1), (3.6, 2)):
        s = share * S
        _arrow(axes, ORIGIN, s, SKIP)
        _arrow(axes, s, h, MLP)
        axes.text(s[0], s[1] - 0.3, f"$s_{index}$", ha="center")
        axes.text(*((s + h) / 2 + (0.15, 0)), f"$y_{index}$")
    axes.text(
        2.3, -0.85, "$h = s_1 + y_1 = s_2 + y_2$: $h$ alone does not tell $A y_1$ from $A y_2$",
        ha="center",
    )  # fmt: skip


def _line(axes: Axes, start: Point, end: Point, color: str, name: str) -> None:
    axes.plot(*zip(start, end, strict=True), color=color, linewidth=1, zorder=1)
    axes.text(end[0] + 0.1, end[1], name, size=13, va="center")


def _dashed(axes: Axes, start: Point, end: Point) -> None:
    axes.plot(*zip(start, end, strict=True), "--", color=GREY, linewidth=1.1, zorder=1)


def _arrow(axes: Axes, start: Point, end: Point, color: str) -> None:
    props = {"arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 0, "linewidth": 2.2,
             "mutation_scale": 16}  # fmt: skip
    axes.annotate("", end, start, arrowprops=props, zorder=2)
