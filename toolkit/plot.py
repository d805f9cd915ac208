"""Plots: one for each table. They draw results, compute no more than layout, and open no model.

Each takes a tidy frame (in memory or read back from its CSV) and returns a figure that nobody has
to close. What a family lacks is left out; a frame without rows says so in words.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

NOT_APPLICABLE = "not applicable to this pair"
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


def tidied(frame: pd.DataFrame) -> pd.DataFrame:
    """The table as it was before it was written: ranks and layers numbers or words, gaps NaN.

    A rank is an int, "full" or None; `layers` an int or "all"; words that are missing are "".
    """
    frame = frame.copy()
    words = {"of", "location", "mode", "source", "target", "kind", "fit", "forcing"}
    for name in frame:
        if name in ("rank", "layers"):
            frame[name] = pd.Series(map(_number, frame[name]), index=frame.index, dtype=object)
        elif name in words:
            frame[name] = frame[name].astype(object).where(frame[name].notna(), "").astype(str)
        else:
            frame[name] = pd.to_numeric(frame[name], errors="coerce")
    return frame


def _number(value: Any) -> int | str | None:
    if value is None or value == "" or value != value:
        return None
    return str(value) if value in ("full", "all") else int(float(value))


def save(figure: Figure, path_without_suffix: str | Path) -> list[Path]:
    """Write `figure` as .svg and .png, the same bytes every time; return both paths."""
    base = Path(path_without_suffix)
    paths = [base.with_name(base.name + suffix) for suffix in (".svg", ".png")]
    with matplotlib.rc_context(STYLE):
        figure.savefig(paths[0], metadata={"Date": None, "Creator": None})
        figure.savefig(paths[1], dpi=150, metadata={"Software": None})
    return paths


# The frame of every figure


def _plot(title: str) -> Callable[[Callable[[pd.DataFrame], Figure]], Any]:
    """Draw in the house's style, on a tidied frame; a frame without rows gives words."""

    def decorate(draw: Callable[[pd.DataFrame], Figure]) -> Callable[[pd.DataFrame], Figure]:
        @wraps(draw)
        def styled(frame: pd.DataFrame) -> Figure:
            with matplotlib.rc_context(STYLE):
                if not frame.empty:
                    return draw(tidied(frame))
                figure, (axes,) = _panels(1, 1.8)
                axes.set_title(title)
                _say_empty(axes)
                return figure

        return styled

    return decorate


def _panels(n: int, height: float = PANEL_HEIGHT) -> tuple[Plot, list[Axes]]:
    figure = Plot(figsize=(WIDTH, n * height), layout="constrained")
    layout: Any = figure.get_layout_engine()
    layout.set(h_pad=0.1, hspace=0.04)
    return figure, list(figure.subplots(n, 1, squeeze=False)[:, 0])


def _say_empty(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
    axes.text(0.5, 0.5, NOT_APPLICABLE, ha="center", va="center", transform=axes.transAxes)


def _data_lines(axes: Axes) -> list[Line2D]:
    """All lines but the references."""
    return [line for line in axes.lines if line.get_label() != REFERENCE]


def _heights(axes: Axes) -> np.ndarray:
    """The finite y of all data."""
    drawn = [np.asarray(line.get_ydata(), float) for line in _data_lines(axes)]
    values = np.concatenate([*drawn, np.empty(0)])
    return values[np.isfinite(values)]


def _finish(
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
    if not len(_heights(axes)):
        _say_empty(axes)
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
    _legend(axes, [h for pair in pairs for h in pair if h is not None], columns, drop)


def _legend(axes: Axes, handles: Sequence[Any], columns: int, drop: int = 42) -> None:
    if not handles:
        return
    figure = axes.get_figure(root=True)
    assert figure is not None
    below = axes.transAxes + ScaledTranslation(0, -drop / 72, figure.dpi_scale_trans)
    axes.legend(
        handles=handles, ncols=columns, loc="upper center", borderpad=0, bbox_to_anchor=(0.5, 0),
        bbox_transform=below,
    )  # fmt: skip


def _log_scale(axes: Axes) -> None:
    """A logarithmic y; zeros are left out, and words say so where there is nothing else."""
    heights = _heights(axes)
    positive = heights[heights > 0]
    if len(positive):
        axes.set_yscale("log", nonpositive="mask")
        if positive.max() < 50 * positive.min():  # few powers of ten: figures between them
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif len(heights):
        axes.text(0.5, 0.6, "zero everywhere", ha="center", transform=axes.transAxes)


def _line(axes: Axes, frame: pd.DataFrame, x: str, y: str, **style: Any) -> None:
    """`y` over `x`, left out where it is not finite; nothing if it never is."""
    rows = frame.sort_values(x)
    values = rows[y].where(np.isfinite(rows[y]))
    if values.notna().any():
        dense = len(rows) > 40
        axes.plot(rows[x], values, markevery=4 if dense else 1, **style)


def _band(axes: Axes, x: Any, low: Any, high: Any, color: str) -> None:
    axes.fill_between(
        np.asarray(x, float), np.asarray(low, float), np.asarray(high, float),
        color=color, alpha=0.16, linewidth=0,
    )  # fmt: skip


def _reference(axes: Axes, y: float, words: str) -> None:
    """A thin level line with its meaning."""
    axes.axhline(y, color=GREY, linewidth=1, label=REFERENCE)
    axes.annotate(
        words, (1, y), xycoords=("axes fraction", "data"), xytext=(0, 3), ha="right",
        textcoords="offset points", color="#555555", fontsize=10.5,
    )  # fmt: skip


def _by_location(frame: pd.DataFrame, column: str) -> Iterator[tuple[str, pd.DataFrame]]:
    for location in LOCATIONS:
        rows = frame[frame[column] == location]
        if len(rows):
            yield location, rows


def _clipped_share_axis(axes: Axes) -> None:
    """A y axis for shares: up to 1, down to the lowest value or to LOWEST."""
    heights = _heights(axes)
    if len(heights):
        axes.set_ylim(max(EDGE - 0.13, min(0.0, heights.min()) - 0.06), 1.08)


# One function for each table


@_plot("What each branch adds")
def norms(frame: pd.DataFrame) -> Figure:
    """The MLP's share of the two branches by layer, and mean norms of state and change."""
    figure, (share, size) = _panels(2)
    styles: dict[str, dict[str, Any]] = {
        "base": {"color": BLACK, "linestyle": "-", "label": "base model", "linewidth": 3.2},
        "tuned": {"color": SKY, "linestyle": "--", "label": "tuned model"},
        "delta_free": {
            "color": VERMILLION, "linestyle": ":", "marker": "v",
            "label": "free delta (all changes so far)",
        },
        "delta_forced": {
            "color": BLUE, "linestyle": "-", "marker": "o",
            "label": "forced delta (this block's own change)",
        },
    }  # fmt: skip
    for of, style in styles.items():
        rows = frame[frame.of == of]
        _line(share, rows.assign(percent=100 * rows.mlp_share), "layer", "percent", **style)
    share.set_title("How much of the two branches' norm the MLP supplies")
    share.set_ylim(0, 100)
    _finish(share, LAYER_LABEL, "MLP / (MLP + attention)  (%)", 2, layers=True)
    modes: dict[str, dict[str, Any]] = {
        "base state": {"linestyle": "-"},
        "free delta": {"linestyle": ":", "fillstyle": "none"},
    }
    for location, name in LOCATIONS.items():
        for of, mode in zip(("base", "delta_free"), modes.values(), strict=True):
            style = LOCATION_STYLE[location] | mode | {"label": name}
            _line(size, frame[frame.of == of], "layer", location, **style)
    size.set_title("Size of the states, and of what changed in them")
    _log_scale(size)
    _finish(size, LAYER_LABEL, "mean L2 norm per token", 3, layers=True, modes=modes)
    return figure


@_plot("How concentrated and how large the deltas are")
def spectrum(frame: pd.DataFrame) -> Figure:
    """How many directions hold 90 % of the delta, and how large it is beside the state."""
    figure, (directions, size) = _panels(2)
    modes: dict[str, dict[str, Any]] = {
        "forced delta": {"linestyle": "-"},
        "free delta": {"linestyle": ":", "fillstyle": "none"},
    }
    for location, rows in _by_location(frame, "location"):
        for mode, dashes in zip(("forced", "free"), modes.values(), strict=True):
            style = LOCATION_STYLE[location] | dashes | {"label": LOCATIONS[location]}
            _line(directions, rows[rows["mode"] == mode], "layer", "k90", **style)
            _line(size, rows[rows["mode"] == mode], "layer", "relative_rms", **style)
    directions.set_title("Directions that hold 90 % of the delta's energy")
    directions.set_ylim(bottom=0)
    _finish(directions, LAYER_LABEL, "directions (k90)", layers=True, modes=modes)
    size.set_title("Size of the delta beside the base model's state")
    _log_scale(size)
    _finish(size, LAYER_LABEL, "rms of delta / rms of state", layers=True, modes=modes)
    return figure


@_plot("How much of the block's own change a linear map supplies")
def linear_fit(frame: pd.DataFrame) -> Figure:
    """Held-out explained share of the block's forced delta, by rank and by layer."""
    figure, (by_rank, by_layer) = _panels(2)
    frame = frame[(frame["mode"] == "forced") & (frame.target == "block")]
    places = {rank: place for place, rank in enumerate(_ranks(frame["rank"]))}
    modes: dict[str, dict[str, Any]] = {
        "rank 8": {"linestyle": "-"},
        "full rank": {"linestyle": ":", "fillstyle": "none"},
    }
    for location, rows in _by_location(frame, "source"):
        style = LOCATION_STYLE[location] | {"label": f"from {LOCATIONS[location]}"}
        _quartiles(by_rank, rows, places, **style)
        for rank, mode in zip((8, "full"), modes.values(), strict=True):
            chosen = rows[rows["rank"] == rank]
            _line(by_layer, chosen, "layer", "explained_heldout", **style, **mode)
    by_rank.set_title("What a linear map explains of a block's own change")
    by_rank.set_xticks(list(places.values()), [str(rank) for rank in places])
    for axes in (by_rank, by_layer):
        _clip_lines(axes)
        _clipped_share_axis(axes)
        _reference(axes, 1, "all of it")
    _finish(by_rank, "rank of the map (0: a fixed vector)", "explained, held out")
    by_layer.set_title("The same by layer, for a small and for a full map")
    _finish(by_layer, LAYER_LABEL, "explained, held out", layers=True, modes=modes)
    return figure


def _ranks(ranks: pd.Series) -> list[Any]:
    known = {rank for rank in ranks if rank is not None}
    return sorted(known, key=lambda rank: float("inf") if rank == "full" else rank)


def _rank_words(rank: Any) -> str:
    return {0: "fixed vector", "full": "full rank"}.get(rank, f"rank {rank}")


def _quartiles(axes: Axes, rows: pd.DataFrame, places: dict[Any, int], **style: Any) -> None:
    """Median over layers by rank, and the quartiles as a band."""
    rows = rows.assign(place=rows["rank"].map(places).astype(float))
    values = rows.explained_heldout.replace([np.inf, -np.inf], np.nan)
    table = values.groupby(rows.place).quantile([0.25, 0.5, 0.75]).unstack()
    _band(axes, table.index, table[0.25].clip(EDGE), table[0.75].clip(EDGE), style["color"])
    axes.plot(table.index, table[0.5], **style)


def _clip_lines(axes: Axes) -> None:
    """Draw what lies below LOWEST at the edge, and say that it is so."""
    if not (_heights(axes) < LOWEST).any():
        return
    for line in _data_lines(axes):
        heights = np.asarray(line.get_ydata(), float)
        line.set_ydata(np.where(heights < LOWEST, EDGE, heights))
    _reference(axes, LOWEST, "below −1: drawn at the edge")


@_plot("First-order terms of the MLP's change")
def first_order(frame: pd.DataFrame) -> Figure:
    """Shares of the down, gate and up projections by layer, and what the linearisation leaves."""
    figure, (shares, rest) = _panels(2)
    terms: dict[str, dict[str, Any]] = {
        "down": {"color": BLUE, "marker": "o", "linestyle": "-"},
        "gate": {"color": ORANGE, "marker": "s", "linestyle": "--"},
        "up": {"color": GREEN, "marker": "^", "linestyle": "-."},
    }
    for term, style in terms.items():
        percent = frame.assign(percent=100 * frame[term])
        _line(shares, percent, "layer", "percent", label=f"{term} projection", **style)
    shares.set_title("Which matrix's change makes the MLP's change")
    shares.axhline(0, color=GREY, linewidth=1, label=REFERENCE)
    _finish(shares, LAYER_LABEL, "share of the exact change (%)", layers=True)
    _line(rest, frame, "layer", "remainder", color=VERMILLION, marker="v",
          label="remainder (share of energy)")  # fmt: skip
    _line(rest, frame, "layer", "relative_change", color=GREY, marker="D", linestyle="--",
          label="change / output (rms)")  # fmt: skip
    rest.set_title("What first order leaves out; how large the change is")
    _log_scale(rest)
    _finish(rest, LAYER_LABEL, "share (no unit)", 2, layers=True)
    return figure


BUDGET_STYLE: list[dict[str, Any]] = [
    {"color": "#a6a6a6", "marker": "D", "linestyle": ":"},
    {"color": ORANGE, "marker": "s", "linestyle": "--"},
    {"color": GREEN, "marker": "^", "linestyle": "-."},
    {"color": BLUE, "marker": "o", "linestyle": "-"},
    {"color": BLACK, "marker": "v", "linestyle": "-"},
]


@_plot("How much of the MLP's change steering before it can reach")
def reachability(frame: pd.DataFrame) -> Figure:
    """What steering before the MLP leaves of its change, by layer and size of the vector."""
    figure, panels = _panels(2)
    titles = {
        "down": "What is left of the down projection's change",
        "exact": "What is left of the MLP's whole change",
    }
    for axes, (target, title) in zip(panels, titles.items(), strict=True):
        rows = frame[frame.target == target]
        budgets = sorted(rows.budget.dropna().unique())
        for budget, style in zip(budgets, BUDGET_STYLE, strict=False):
            _budget(axes, rows[rows.budget == budget], budget, style)
        axes.set_title(title + ",\nsteered before the MLP with a vector of limited size")
        axes.set_ylim(0, 1.05)
        _finish(axes, LAYER_LABEL, "left over (0: reached)", 5, layers=True)
        if legend := axes.get_legend():
            legend.set_title("size of the vector, of the MLP input's norm")
    return figure


def _budget(axes: Axes, rows: pd.DataFrame, budget: float, style: dict[str, Any]) -> None:
    rows = rows.sort_values("layer")
    _band(axes, rows.layer, rows.residual_q25, rows.residual_q75, style["color"])
    _line(axes, rows, "layer", "residual_median", label=f"{100 * budget:g} %", **style)


@_plot("Divergence from the tuned model, token by token")
def sequential_kl(frame: pd.DataFrame) -> Figure:
    """KL from the tuned model by generated token, for none, oracle and fits in all blocks."""
    figure, panels = _panels(2, 3.3)
    titles = {
        "tuned": "KL from the tuned model, on the tuned model's tokens",
        "own": "The same, on each model's own tokens",
    }
    frame = frame[(frame.layers == "all") & frame.location.isin(["", "post_block"])]
    for axes, (forcing, title) in zip(panels, titles.items(), strict=True):
        axes.set_title(title)
        for label, rows, style in _curves(frame[frame.forcing == forcing]):
            _band(axes, rows.token_index, rows.kl_mean - rows.kl_sem, rows.kl_mean + rows.kl_sem,
                  style["color"])  # fmt: skip
            _line(axes, rows, "token_index", "kl_mean", label=label, **style)
        _nats_scale(axes)
        _finish(axes, "generated token (from 0)", "nats per token", 2, layers=True)
    return figure


def _curves(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, dict[str, Any]]]:
    """(label, rows, style): no steering, the oracle, and each fit at one small rank."""
    for kind, label, style in (
        ("none", "no steering (base model)", {"color": BLACK, "linestyle": "-"}),
        ("oracle", "oracle (tuned states written in)", {"color": PURPLE, "linestyle": "-."}),
    ):
        rows = frame[frame.kind == kind].sort_values("token_index")
        if len(rows):
            yield label, rows, style
    linear = frame[frame.kind == "linear"]
    small = [rank for rank in _ranks(linear["rank"]) if rank != "full" and rank <= 8]
    wanted = [(fit, rank) for fit in FIT_STYLE for rank in small[-1:]]
    for fit, rank in [*wanted, ("free", "full")]:
        rows = linear[(linear.fit == fit) & (linear["rank"] == rank)].sort_values("token_index")
        if len(rows):
            apart = {"linestyle": (0, (5, 1, 1, 1)), "color": ORANGE} if rank == "full" else {}
            yield f"{fit}, {_rank_words(rank)}", rows, FIT_STYLE[fit] | apart


def _nats_scale(axes: Axes) -> None:
    """Logarithmic down to zero, so that huge and tiny values read; linear within a decade."""
    heights = _heights(axes)
    top = heights.max(initial=0.0)
    if top <= 0:
        return
    axes.set_ylim(bottom=0)
    shown = heights[heights > 1e-5 * top]  # the oracle's curve is 0 but for rounding
    if np.quantile(shown, 0.05) < 0.1 * top:
        floor = 10 ** np.floor(np.log10(np.quantile(shown, 0.02)))
        axes.set_yscale("symlog", linthresh=floor, linscale=0.5)
        axes.set_ylim(bottom=-0.1 * floor)
        axes.yaxis.set_minor_locator(NullLocator())


@_plot("What each fit recovers, and at what cost")
def steerability(frame: pd.DataFrame) -> Figure:
    """What each fit recovers by its size; and one block steered alone, by layer."""
    figure, (everywhere, single) = _panels(2, 4.0)
    fitted = frame[frame.fit.isin(list(FIT_STYLE)) & np.isfinite(frame.recovered)]
    in_all = fitted[(fitted.layers == "all") & (fitted.parameters > 0)]
    everywhere.set_title("Recovered by a fit in all blocks, by its size")
    _everywhere(everywhere, in_all)
    _finish(everywhere, "parameters of the adapters", "recovered (1: the tuned model)", 2, drop=84)
    alone = fitted[fitted.layers != "all"]
    alone = alone.assign(layer=pd.to_numeric(alone.layers, errors="coerce"))
    ranks = [_rank_words(rank) for rank in _ranks(alone["rank"])]
    single.set_title(f"Recovered by steering one block alone ({', '.join(ranks) or 'none'})")
    for location, rows in _by_location(alone, "location"):
        style = LOCATION_STYLE[location] | {"label": f"{LOCATIONS[location]}, free"}
        _points(single, rows.sort_values("layer"), "layer", style)
    _share_frame(single)
    _finish(single, LAYER_LABEL, "recovered (1: the tuned model)", 3, layers=True)
    return figure


def _everywhere(axes: Axes, frame: pd.DataFrame) -> None:
    series = [
        (f"{LOCATIONS[location]}, {fit}", rows[rows.fit == fit], location, fit)
        for location, rows in _by_location(frame, "location")
        for fit in FIT_STYLE
        if (rows.fit == fit).any()
    ]
    for place, (label, rows, location, fit) in enumerate(series):
        shift = 1.035 ** (place - (len(series) - 1) / 2)  # so that equal points are both seen
        marker = LOCATION_STYLE[location]["marker"]
        style = {**FIT_STYLE[fit], "marker": marker, "label": label, "markersize": 6}
        shifted = rows.assign(x=rows.parameters * shift).sort_values("x")
        _points(axes, shifted, "x", style)
    _share_frame(axes)
    if len(frame):
        _parameter_axis(axes, frame)


def _parameter_axis(axes: Axes, frame: pd.DataFrame) -> None:
    """A logarithmic x whose ticks are the sizes that were tried, with their ranks."""
    sizes = frame.groupby(frame["rank"].map(_rank_words), sort=False)[
        ["parameters", "parameters_percent"]
    ].median()
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    labels = [
        f"{name.removeprefix('fixed ')}\n{_short(row.parameters)}\n{row.parameters_percent:.2g} %"
        for name, row in zip(sizes.index, sizes.itertuples(), strict=True)
    ]
    axes.set_xticks(list(sizes.parameters), labels)
    axes.set_xlim(sizes.parameters.min() / 1.9, sizes.parameters.max() * 1.9)


def _short(number: float) -> str:
    """294912 as 295 k."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def _points(axes: Axes, rows: pd.DataFrame, x: str, style: dict[str, Any]) -> None:
    """`recovered` with its standard error; values below LOWEST at the edge, with their number."""
    if rows.empty:
        return
    low = rows.recovered < LOWEST
    heights = rows.recovered.where(~low, EDGE)
    axes.plot(rows[x], heights, **style)
    error = rows.recovered_sem.where(~low & np.isfinite(rows.recovered_sem), 0)
    axes.errorbar(rows[x], heights, error, fmt="none", ecolor=style["color"], elinewidth=1.2)
    arrow = {"marker": "v", "markersize": 8, "linestyle": "", "color": style["color"]}
    axes.plot(rows[x][low], heights[low], **arrow)
    if low.sum() <= 6:
        for place, value in zip(rows[x][low], rows.recovered[low], strict=True):
            _number_at_edge(axes, place, value, style["color"])


def _number_at_edge(axes: Axes, place: float, value: float, color: str) -> None:
    """The value above its arrow, and above the numbers that stand there already."""
    notes = [note for note in axes.texts if isinstance(note, Annotation) and note.xy[1] == EDGE]
    taken = sum(0.7 < (note.xy[0] + 1) / (place + 1) < 1.4 for note in notes)
    axes.annotate(
        f"{value:.1f}".replace("-", "−"), (place, EDGE), xytext=(0, 7 + 13 * taken),
        textcoords="offset points", ha="center", fontsize=10.5, color=color,
    )  # fmt: skip


def _share_frame(axes: Axes) -> None:
    _clipped_share_axis(axes)
    if len(_heights(axes)):
        _reference(axes, 1, "the tuned model")
        _reference(axes, 0, "no steering")


PLOTS: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "norms": norms,
    "spectrum": spectrum,
    "linear_fit": linear_fit,
    "first_order": first_order,
    "reachability": reachability,
    "sequential_kl": sequential_kl,
    "steerability": steerability,
}
