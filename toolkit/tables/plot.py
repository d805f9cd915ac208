"""Plots: one for each table. They draw results, compute no more than layout, and open no model.

Each takes a tidy frame (in memory or read back from its CSV) and returns a figure that nobody has
to close. What a family lacks is left out; a frame without rows says so in words.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import NullLocator

from toolkit.tables.drawing import (
    BLACK,
    BLUE,
    EDGE,
    FIT_STYLE,
    GREEN,
    GREY,
    LAYER_LABEL,
    LOCATION_STYLE,
    LOCATIONS,
    LOWEST,
    ORANGE,
    PURPLE,
    REFERENCE,
    SKY,
    VERMILLION,
    add_band,
    add_reference,
    by_location,
    clip_shares,
    data_lines,
    draw_line,
    drawn_heights,
    finish,
    house_style,
    log_scale,
    make_panels,
)
from toolkit.tables.plot_inside import INSIDE_PLOTS


@house_style("What each branch adds")
def norms(frame: pd.DataFrame, noise: pd.DataFrame | None = None) -> Figure:
    """The MLP's share of the two branches by layer, and mean norms of state and change.

    With `noise`, the table of that name, the norm of the free deltas' rounding.
    """
    figure, (share, size) = make_panels(2)
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
        draw_line(share, rows.assign(percent=100 * rows.mlp_share), "layer", "percent", **style)
    share.set_title("How much of the two branches' norm the MLP supplies")
    share.set_ylim(0, 100)
    finish(share, LAYER_LABEL, "MLP / (MLP + attention)  (%)", 2, layers=True)
    modes: dict[str, dict[str, Any]] = {
        "base state": {"linestyle": "-"},
        "free delta": {"linestyle": ":", "fillstyle": "none"},
    }
    for location, name in LOCATIONS.items():
        for of, mode in zip(("base", "delta_free"), modes.values(), strict=True):
            style = LOCATION_STYLE[location] | mode | {"label": name}
            draw_line(size, frame[frame.of == of], "layer", location, **style)
    size.set_title("Size of the states, and of what changed in them")
    log_scale(size)
    if noise is not None:
        _noise_band(size, noise[noise["mode"] == "free"], "noise_norm")
    finish(size, LAYER_LABEL, "mean L2 norm per token", 3, layers=True, modes=modes)
    return figure


@house_style("How concentrated and how large the deltas are")
def spectrum(frame: pd.DataFrame, noise: pd.DataFrame | None = None) -> Figure:
    """How many directions hold 90 % of the delta, and how large it is beside the state.

    With `noise`, the table of that name, the size of the deltas' rounding.
    """
    figure, (directions, size) = make_panels(2)
    modes: dict[str, dict[str, Any]] = {
        "forced delta": {"linestyle": "-"},
        "free delta": {"linestyle": ":", "fillstyle": "none"},
    }
    for location, rows in by_location(frame, "location"):
        for mode, dashes in zip(("forced", "free"), modes.values(), strict=True):
            style = LOCATION_STYLE[location] | dashes | {"label": LOCATIONS[location]}
            draw_line(directions, rows[rows["mode"] == mode], "layer", "k90", **style)
            draw_line(size, rows[rows["mode"] == mode], "layer", "relative_rms", **style)
    directions.set_title("Directions that hold 90 % of the delta's energy")
    directions.set_ylim(bottom=0)
    finish(directions, LAYER_LABEL, "directions (k90)", layers=True, modes=modes)
    size.set_title("Size of the delta beside the base model's state")
    log_scale(size)
    if noise is not None:
        _noise_band(size, noise, "noise_relative")
    finish(size, LAYER_LABEL, "rms of delta / rms of state", layers=True, modes=modes)
    return figure


def _noise_band(axes: Axes, noise: pd.DataFrame, column: str) -> None:
    """From the least to the most noise of each layer, over locations and modes.

    Noise far below everything drawn is said in words: a band would squeeze what is drawn.
    """
    low, high = (noise.groupby("layer")[column].agg(how) for how in ("min", "max"))
    most = float(high.max()) if len(high) else 0.0
    heights = drawn_heights(axes)
    lowest = float(heights[heights > 0].min(initial=np.inf))
    if most * FAR_BELOW < lowest:
        words = f"rounding noise: at most {most:.1g}" if most else ""
        axes.text(0.01, 0.03, words, color=GREY, transform=axes.transAxes, fontsize="small")
    elif most:
        add_band(axes, low.index, low, high, GREY, label="rounding noise")


@house_style("How large the noise of the precision is")
def noise(frame: pd.DataFrame) -> Figure:
    """Rounding of the base model's states by layer, beside the state and as a norm."""
    figure, panels = make_panels(2)
    drawn = {
        "noise_relative": ("Rounding beside the base model's state", "rms of noise / rms of state"),
        "noise_norm": ("The same as a norm", "mean L2 norm per token"),
    }
    modes: dict[str, dict[str, Any]] = {
        "forced: this block": {"linestyle": "-"},
        "free: all so far": {"linestyle": ":", "fillstyle": "none"},
    }
    for axes, (column, (title, label)) in zip(panels, drawn.items(), strict=True):
        for location, rows in by_location(frame, "location"):
            for mode, dashes in zip(("forced", "free"), modes.values(), strict=True):
                style = LOCATION_STYLE[location] | dashes | {"label": LOCATIONS[location]}
                draw_line(axes, rows[rows["mode"] == mode], "layer", column, **style)
        axes.set_title(title)
        log_scale(axes)
        finish(axes, LAYER_LABEL, label, 3, layers=True, modes=modes)
    return figure


@house_style("How much of the block's own change a linear map supplies")
def linear_fit(frame: pd.DataFrame) -> Figure:
    """Held-out explained share of the block's forced delta, by rank and by layer."""
    figure, (by_rank, by_layer) = make_panels(2)
    frame = frame[(frame["mode"] == "forced") & (frame.target == "block")]
    places = {rank: place for place, rank in enumerate(_ranks(frame["rank"]))}
    modes: dict[str, dict[str, Any]] = {
        "rank 8": {"linestyle": "-"},
        "full rank": {"linestyle": ":", "fillstyle": "none"},
    }
    for location, rows in by_location(frame, "source"):
        style = LOCATION_STYLE[location] | {"label": f"from {LOCATIONS[location]}"}
        _quartiles(by_rank, rows, places, **style)
        for rank, mode in zip((8, "full"), modes.values(), strict=True):
            chosen = rows[rows["rank"] == rank]
            draw_line(by_layer, chosen, "layer", "explained_heldout", **style, **mode)
    by_rank.set_title("What a linear map explains of a block's own change")
    by_rank.set_xticks(list(places.values()), [str(rank) for rank in places])
    for axes in (by_rank, by_layer):
        _clip_lines(axes)
        clip_shares(axes)
        add_reference(axes, 1, "all of it")
    finish(by_rank, "rank of the map (0: a fixed vector)", "explained, held out")
    by_layer.set_title("The same by layer, for a small and for a full map")
    finish(by_layer, LAYER_LABEL, "explained, held out", layers=True, modes=modes)
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
    add_band(axes, table.index, table[0.25].clip(EDGE), table[0.75].clip(EDGE), style["color"])
    axes.plot(table.index, table[0.5], **style)


def _clip_lines(axes: Axes) -> None:
    """Draw what lies below LOWEST at the edge, and say that it is so."""
    if not (drawn_heights(axes) < LOWEST).any():
        return
    for line in data_lines(axes):
        heights = np.asarray(line.get_ydata(), float)
        line.set_ydata(np.where(heights < LOWEST, EDGE, heights))
    add_reference(axes, LOWEST, "below −1: drawn at the edge")


@house_style("First-order terms of the MLP's change")
def first_order(frame: pd.DataFrame) -> Figure:
    """Shares of the down, gate and up projections by layer, and what the linearisation leaves."""
    figure, (shares, rest) = make_panels(2)
    terms: dict[str, dict[str, Any]] = {
        "down": {"color": BLUE, "marker": "o", "linestyle": "-"},
        "gate": {"color": ORANGE, "marker": "s", "linestyle": "--"},
        "up": {"color": GREEN, "marker": "^", "linestyle": "-."},
    }
    for term, style in terms.items():
        percent = frame.assign(percent=100 * frame[term])
        draw_line(shares, percent, "layer", "percent", label=f"{term} projection", **style)
    shares.set_title("Which matrix's change makes the MLP's change")
    shares.axhline(0, color=GREY, linewidth=1, label=REFERENCE)
    finish(shares, LAYER_LABEL, "share of the exact change (%)", layers=True)
    draw_line(rest, frame, "layer", "remainder", color=VERMILLION, marker="v",
          label="remainder (share of energy)")  # fmt: skip
    draw_line(rest, frame, "layer", "relative_change", color=GREY, marker="D", linestyle="--",
          label="change / output (rms)")  # fmt: skip
    rest.set_title("What first order leaves out; how large the change is")
    log_scale(rest)
    finish(rest, LAYER_LABEL, "share (no unit)", 2, layers=True)
    return figure


BUDGET_STYLE: list[dict[str, Any]] = [
    {"color": "#a6a6a6", "marker": "D", "linestyle": ":"},
    {"color": ORANGE, "marker": "s", "linestyle": "--"},
    {"color": GREEN, "marker": "^", "linestyle": "-."},
    {"color": BLUE, "marker": "o", "linestyle": "-"},
    {"color": BLACK, "marker": "v", "linestyle": "-"},
]


@house_style("How much of the MLP's change steering before it can reach")
def reachability(frame: pd.DataFrame) -> Figure:
    """What steering before the MLP leaves of its change, by layer and size of the vector."""
    figure, panels = make_panels(2)
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
        finish(axes, LAYER_LABEL, "left over (0: reached)", 5, layers=True)
        if legend := axes.get_legend():
            legend.set_title("size of the vector, of the MLP input's norm")
    return figure


def _budget(axes: Axes, rows: pd.DataFrame, budget: float, style: dict[str, Any]) -> None:
    rows = rows.sort_values("layer")
    add_band(axes, rows.layer, rows.residual_q25, rows.residual_q75, style["color"])
    draw_line(axes, rows, "layer", "residual_median", label=f"{100 * budget:g} %", **style)


@house_style("Divergence from the tuned model, token by token")
def sequential_kl(frame: pd.DataFrame) -> Figure:
    """KL from the tuned model by generated token, for none, oracle and fits in all blocks."""
    figure, panels = make_panels(2, 3.3)
    titles = {
        "tuned": "KL from the tuned model, on the tuned model's tokens",
        "own": "The same, on each model's own tokens",
    }
    frame = frame[(frame.layers == "all") & frame.location.isin(["", "post_block"])]
    for axes, (forcing, title) in zip(panels, titles.items(), strict=True):
        axes.set_title(title)
        for label, rows, style in _curves(frame[frame.forcing == forcing]):
            add_band(axes, rows.token_index, rows.kl_mean - rows.kl_sem, rows.kl_mean + rows.kl_sem,
                  style["color"])  # fmt: skip
            draw_line(axes, rows, "token_index", "kl_mean", label=label, **style)
        _nats_scale(axes)
        finish(axes, "generated token (from 0)", "nats per token", 2, layers=True)
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
    heights = drawn_heights(axes)
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


@house_style("What each fit recovers, and at what cost")
def steerability(frame: pd.DataFrame) -> Figure:
    """What each fit recovers by its size; and one block steered alone, by layer."""
    figure, (everywhere, single) = make_panels(2, 4.0)
    fitted = frame[frame.fit.isin(list(FIT_STYLE)) & np.isfinite(frame.recovered)]
    in_all = fitted[(fitted.layers == "all") & (fitted.parameters > 0)]
    everywhere.set_title("Recovered by a fit in all blocks, by its size")
    _everywhere(everywhere, in_all)
    finish(everywhere, "parameters of the adapters", "recovered (1: the tuned model)", 2, drop=84)
    alone = fitted[fitted.layers != "all"]
    alone = alone.assign(layer=pd.to_numeric(alone.layers, errors="coerce"))
    ranks = [_rank_words(rank) for rank in _ranks(alone["rank"])]
    single.set_title(f"Recovered by steering one block alone ({', '.join(ranks) or 'none'})")
    for location, rows in by_location(alone, "location"):
        style = LOCATION_STYLE[location] | {"label": f"{LOCATIONS[location]}, free"}
        _points(single, rows.sort_values("layer"), "layer", style)
    _share_frame(single)
    finish(single, LAYER_LABEL, "recovered (1: the tuned model)", 3, layers=True)
    return figure


def _everywhere(axes: Axes, frame: pd.DataFrame) -> None:
    series = [
        (f"{LOCATIONS[location]}, {fit}", rows[rows.fit == fit], location, fit)
        for location, rows in by_location(frame, "location")
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
    clip_shares(axes)
    if len(drawn_heights(axes)):
        add_reference(axes, 1, "the tuned model")
        add_reference(axes, 0, "no steering")


FAR_BELOW = 30.0  # noise that is that many times smaller than all else is not drawn to scale
WITH_NOISE = ("norms", "spectrum")  # plots that draw the table ``noise``, if they are given it
PLOTS: dict[str, Callable[..., Figure]] = {
    "norms": norms,
    "spectrum": spectrum,
    "noise": noise,
    "linear_fit": linear_fit,
    "first_order": first_order,
    "reachability": reachability,
    "sequential_kl": sequential_kl,
    "steerability": steerability,
    **INSIDE_PLOTS,
}
