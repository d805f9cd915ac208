"""A transformer block, and the four places where it can be steered.

Read from the bottom: each branch takes the stream through a norm and adds its contribution to what
skips it. pre-MLP and post-MLP change one contribution before it is added; post-block changes the
sum, and so can also answer to what skipped the MLP. Gemma norms each contribution once more.
"""

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from toolkit.tables.drawing import BLACK, GREY, LOCATION_STYLE, PURPLE, STYLE, WIDTH, Plot

MADE_BY = ()
HEIGHT = 8.6  # inches; the drawing's units are about as large
STREAM, BRANCH, GATE, UP = 1.1, 3.7, 2.75, 4.65  # x of the vertical wires
TAPS, SUMS = (0.7, 5.0), (4.4, 8.75)  # y where the two branches leave the stream and come back
HEADS: dict[str, Any] = {"color": PURPLE, "marker": "D"}
# Where each location is marked, and what is steered there.
MARKS = {
    "heads": (BRANCH, 2.61, "heads: their outputs"),
    "pre_mlp": (1.9, SUMS[0], "pre-MLP: what attention adds"),
    "post_mlp": (1.9, SUMS[1], "post-MLP: what the MLP adds"),
    "post_block": (STREAM, 9.3, "post-block: the sum with the skip term"),
}


def draw(data: Path) -> Figure:
    with rc_context(STYLE):
        figure = Plot(figsize=(WIDTH, HEIGHT))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(0, 10.1))
        axes.axis("off")
        for middle, height, name in ((2.57, 1.95, "attention"), (6.87, 2.2, "MLP")):
            _box(axes, BRANCH, middle, "", 4.5, height, fc="#f1f1f1", ec="none")
            axes.text(5.9, middle - height / 2 + 0.06, name, ha="right", color=GREY, size=13)
        _stream(axes)
        _attention(axes)
        _mlp(axes)
        for name, (x, y, words) in MARKS.items():
            style = LOCATION_STYLE.get(name, HEADS)
            axes.plot(x, y, markersize=11, markeredgecolor=BLACK, zorder=4, **style)
            axes.text(x + 0.25, y + 0.08, words, weight="bold")
    return figure


def _stream(axes: Axes) -> None:
    """The wire that skips both branches, where they leave it, and where they are added."""
    _wire(axes, [STREAM, STREAM], [0.25, 9.95], arrow=True)
    axes.text(STREAM + 0.25, 0.2, "block input")
    axes.text(STREAM + 0.25, 9.8, "block output")
    for y, words in ((2.57, "skip"), (6.87, "skip term")):
        axes.text(STREAM - 0.15, y, words, rotation=90, ha="right", va="center")
    for tap, back in zip(TAPS, SUMS, strict=True):
        _wire(axes, [STREAM, BRANCH, BRANCH], [tap, tap, tap + 0.3])
        _wire(axes, [BRANCH, BRANCH, STREAM + 0.17], [back - 0.5, back, back], arrow=True)
        _node(axes, STREAM, back, "+")
        _box(axes, BRANCH, tap + 0.45, "norm")
        _box(axes, BRANCH, back - 0.47, "norm (Gemma only)", linestyle=":")


def _attention(axes: Axes) -> None:
    _wire(axes, [BRANCH, BRANCH], [1.3, SUMS[0] - 0.5])
    _box(axes, BRANCH, 2.02, "attention heads ($q$, $k$, $v$)")
    _box(axes, BRANCH, 3.12, "output projection $W_o$")


def _mlp(axes: Axes) -> None:
    _wire(axes, [BRANCH, BRANCH], [TAPS[1] + 0.5, 5.88])
    for x, words in ((GATE, "gate: $\\sigma(W_g h)$"), (UP, "up: $W_u h$")):
        _wire(axes, [BRANCH, x, x, BRANCH], [5.88, 5.88, 6.95, 6.95])
        _box(axes, x, 6.37, words, 1.7)
    _wire(axes, [BRANCH, BRANCH], [6.95, SUMS[1] - 0.5])
    _node(axes, BRANCH, 6.95, "×")
    _box(axes, BRANCH, 7.58, "down: $W_d$")


def _box(
    axes: Axes, x: float, y: float, words: str, width: float = 2.7, high: float = 0.4, **style: Any
) -> None:
    style = {"fc": "white", "ec": BLACK, "lw": 1.2, "zorder": 2 if words else 0, **style}
    corner = (x - width / 2, y - high / 2)
    axes.add_patch(FancyBboxPatch(corner, width, high, "round,pad=0,rounding_size=0.1", **style))
    axes.text(x, y, words, ha="center", va="center")


def _node(axes: Axes, x: float, y: float, sign: str) -> None:
    axes.plot(x, y, "o", color="white", markeredgecolor=BLACK, markersize=18, zorder=3)
    axes.text(x, y, sign, ha="center", va="center_baseline", size=14, zorder=4)


def _wire(axes: Axes, x: list[float], y: list[float], arrow: bool = False) -> None:
    axes.plot(x, y, color=BLACK, zorder=1, solid_capstyle="butt")
    if arrow:
        props = {"arrowstyle": "-|>", "color": BLACK, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (x[-1], y[-1]), (x[-2], y[-2]), arrowprops=props, zorder=1)
