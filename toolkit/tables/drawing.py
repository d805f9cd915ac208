"""What all plots share: the house's style, panels, axes, legends, and files."""

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from io import BytesIO, StringIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from toolkit.tables.frames import cleaned
from toolkit.tables.words import NOT_APPLICABLE

WIDTH, PANEL_HEIGHT = 6.5, 3.5  # inches; panels are stacked, so that a phone can show them
LOWEST = -1.0  # shares below this are drawn at the edge, with their value
EDGE = -1.12  # where they are drawn

# Okabe and Ito's colours, which the colour-blind tell apart; markers and dashes serve grey print.
BLACK, GREY, BLUE, ORANGE = "#000000", "#767676", "#0072B2", "#E69F00"
GREEN, VERMILLION, SKY, PURPLE = "#009E73", "#D55E00", "#56B4E9", "#CC79A7"

STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 11.5,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelsize": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "legend.columnspacing": 1.4,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "oracle-toolkit",
}

LOCATIONS = {"pre_mlp": "pre-MLP", "post_mlp": "post-MLP", "post_block": "post-block"}
LOCATION_STYLE: dict[str, dict[str, Any]] = {
    "pre_mlp": {"color": GREEN, "marker": "^"},
    "post_mlp": {"color": ORANGE, "marker": "s"},
    "post_block": {"color": BLUE, "marker": "o"},
}
FIT_STYLE: dict[str, dict[str, Any]] = {
    "free": {"color": VERMILLION, "linestyle": ":"},
    "forced": {"color": BLUE, "linestyle": "--"},
    "sequential": {"color": GREEN, "linestyle": "-"},
    "distilled": {"color": PURPLE, "linestyle": "-."},
}
REFERENCE = "_reference"  # the label of lines that are no data; no legend shows it
LAYER_LABEL = "layer (block number, from 0)"


class Plot(Figure):
    """A figure that belongs to no window, and that a notebook shows as a cell's value."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def svg(figure: Figure) -> str:
    """Return `figure` as SVG text, the same every time."""
    file = StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def save(figure: Figure, path_without_suffix: str | Path) -> list[Path]:
    """Write `figure` as .svg and .png, the same bytes every time; return both paths."""
    base = Path(path_without_suffix)
    paths = [base.with_name(base.name + suffix) for suffix in (".svg", ".png")]
    paths[0].write_text(svg(figure), encoding="utf-8")
    with matplotlib.rc_context(STYLE):
        figure.savefig(paths[1], dpi=150, metadata={"Software": None})
    return paths


# The frame of every figure


def house_style(title: str) -> Callable[[Callable[..., Figure]], Any]:
    """Draw in the house's style, on cleaned frames; a first frame without rows gives `empty`."""

    def decorate(draw: Callable[..., Figure]) -> Callable[..., Figure]:
        @wraps(draw)
        def styled(
            frame: pd.DataFrame, empty: str = NOT_APPLICABLE, **others: pd.DataFrame
        ) -> Figure:
            with matplotlib.rc_context(STYLE):
                if not frame.empty:
                    return draw(
                        cleaned(frame), **{n: cleaned(other) for n, other in others.items()}
                    )
                figure, (axes,) = make_panels(1, 1.8)
                axes.set_title(title)
                say_empty(axes, empty)
                return figure

        return styled

    return decorate


def make_panels(n: int, height: float = PANEL_HEIGHT) -> tuple[Plot, list[Axes]]:
    figure = Plot(figsize=(WIDTH, n * height), layout="constrained")
    layout: Any = figure.get_layout_engine()
    layout.set(h_pad=0.1, hspace=0.04)
    return figure, list(figure.subplots(n, 1, squeeze=False)[:, 0])


def say_empty(axes: Axes, words: str = NOT_APPLICABLE) -> None:
    axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes)


def data_lines(axes: Axes) -> list[Line2D]:
    """All lines but the references."""
    return [line for line in axes.lines if line.get_label() != REFERENCE]


def drawn_heights(axes: Axes) -> np.ndarray:
    """Return the finite y of all data."""
    drawn = [np.asarray(line.get_ydata(), float) for line in data_lines(axes)]
    values = np.concatenate([*drawn, np.empty(0)])
    return values[np.isfinite(values)]


def finish(
    axes: Axes,
    x: str,
    y: str,
    columns: int = 3,
    layers: bool = False,
    drop: int = 42,
    modes: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Labels and a legend `drop` points below the axes; words where nothing was drawn.

    `modes` are line styles that all colours share, by what they mean: each gets an entry.
    """
    if not len(drawn_heights(axes)):
        say_empty(axes)
        return
    axes.set(xlabel=x, ylabel=y)
    if layers:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    handles: dict[str, Any] = {}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        handles.setdefault(label, handle)  # a colour's first line stands for all its modes
    shared = [
        Line2D([], [], label=label, color=GREY, marker="o", **style)
        for label, style in (modes or {}).items()
    ]
    # A legend fills its columns first: colours in its first row, modes in its second.
    pairs = zip_longest(handles.values(), shared)
    add_legend(axes, [h for pair in pairs for h in pair if h is not None], columns, drop)


def add_legend(axes: Axes, handles: Sequence[Any], columns: int, drop: int = 42) -> None:
    if not handles:
        return
    figure = axes.get_figure(root=True)
    assert figure is not None
    below = axes.transAxes + ScaledTranslation(0, -drop / 72, figure.dpi_scale_trans)
    axes.legend(
        handles=handles, ncols=columns, loc="upper center", borderpad=0, bbox_to_anchor=(0.5, 0),
        bbox_transform=below,
    )  # fmt: skip


def log_scale(axes: Axes) -> None:
    """A logarithmic y; zeros are left out, and words say so where there is nothing else."""
    heights = drawn_heights(axes)
    positive = heights[heights > 0]
    if len(positive):
        axes.set_yscale("log", nonpositive="mask")
        plain_ticks(axes.yaxis, positive)
    elif len(heights):
        axes.text(0.5, 0.6, "zero everywhere", ha="center", transform=axes.transAxes)


def plain_ticks(axis: Axis, values: Any) -> None:
    """Number a logarithmic axis of `values` above 0, between powers of ten where these are few."""
    if max(values) < 50 * min(values):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_line(axes: Axes, frame: pd.DataFrame, x: str, y: str, **style: Any) -> None:
    """`y` over `x`, left out where it is not finite; nothing if it never is."""
    rows = frame.sort_values(x)
    values = rows[y].where(np.isfinite(rows[y]))
    if values.notna().any():
        dense = len(rows) > 40
        axes.plot(rows[x], values, markevery=4 if dense else 1, **style)


def add_band(axes: Axes, x: Any, low: Any, high: Any, color: str, **style: Any) -> None:
    axes.fill_between(
        np.asarray(x, float), np.asarray(low, float), np.asarray(high, float),
        **{"color": color, "alpha": 0.16, "linewidth": 0, **style},
    )  # fmt: skip


def add_reference(axes: Axes, y: float, words: str) -> None:
    """A thin level line with its meaning."""
    axes.axhline(y, color=GREY, linewidth=1, label=REFERENCE)
    axes.annotate(
        words, (1, y), xycoords=("axes fraction", "data"), xytext=(0, 3), ha="right",
        textcoords="offset points", color="#555555", fontsize=10.5,
    )  # fmt: skip


def by_location(frame: pd.DataFrame, column: str) -> Iterator[tuple[str, pd.DataFrame]]:
    for location in LOCATIONS:
        rows = frame[frame[column] == location]
        if len(rows):
            yield location, rows


def clip_shares(axes: Axes) -> None:
    """A y axis for shares: up to 1, down to the lowest value or to LOWEST."""
    heights = drawn_heights(axes)
    if len(heights):
        axes.set_ylim(max(EDGE - 0.13, min(0.0, heights.min()) - 0.06), 1.08)


def number_at_edge(axes: Axes, place: float, value: float, color: str) -> None:
    """The value above its arrow, and above the numbers that stand there already."""
    notes = [note for note in axes.texts if isinstance(note, Annotation) and note.xy[1] == EDGE]
    taken = sum(0.7 < (note.xy[0] + 1) / (place + 1) < 1.4 for note in notes)
    axes.annotate(
        f"{value:.1f}".replace("-", "−"), (place, EDGE), xytext=(0, 7 + 13 * taken),
        textcoords="offset points", ha="center", fontsize=10.5, color=color,
    )  # fmt: skip
