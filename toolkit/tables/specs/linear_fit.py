"""The table ``linear_fit``: how much a linear map explains."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    EDGE,
    LAYER_LABEL,
    LOCATION_STYLE,
    LOCATIONS,
    LOWEST,
    add_band,
    add_reference,
    by_location,
    clip_shares,
    data_lines,
    draw_line,
    drawn_heights,
    finish,
    house_style,
    make_panels,
)
from toolkit.tables.series import sorted_ranks
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import NAMES, NOTHING, UNMEASURED


@house_style("How much of the block's own change a linear map supplies")
def plot(frame: pd.DataFrame) -> Figure:
    """Held-out explained share of the block's forced delta, by rank and by layer."""
    figure, (by_rank, by_layer) = make_panels(2)
    frame = frame[(frame["mode"] == "forced") & (frame.target == "block")]
    places = {rank: place for place, rank in enumerate(sorted_ranks(frame["rank"]))}
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


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    rows = frame[(frame["mode"] == "forced") & (frame.target == "block")]
    if not rows.explained_fit.notna().any():
        return UNMEASURED
    if not rows.explained_fit.any():
        return NOTHING
    parts = []
    for source in ("pre_mlp", "post_mlp", "post_block"):
        by_rank = rows[rows.source == source].groupby("rank").explained_heldout.median()
        shown = [f"{by_rank[r]:.0%} at rank {r}" for r in (0, 8, 32) if r in by_rank]
        if shown:
            full = f", {by_rank['full']:.0%} at full rank" if "full" in by_rank else ""
            parts.append(f"{NAMES[source]} {', '.join(shown)}{full}")
    return (
        "Of what a block must add to the stream, a linear map explains on held-out documents "
        f"(median over blocks) from {'; from '.join(parts)}."
    )


SPEC = TableSpec(
    name="linear_fit",
    title="How much a linear map explains",
    reading=(
        "1 − E‖δ − f(x)‖² / E‖δ‖² on held-out documents, f fitted on the others. Uncentred: rank "
        "0 is the fixed vector. All three locations are asked for the same: the forced delta of "
        "the block's output."
    ),
    columns={
        "layer": "the block",
        "source": "where x is read",
        "target": "`own`: the delta at that place; `block`: the forced delta of the block's output",
        "mode": "free or forced; free has the target `own` alone",
        "rank": "0 (the fixed vector `b = Et`), 1, 2, ... 64, `full`",
        "explained_fit": "`1 − E‖t − f(x)‖² / E‖t‖²` on fit documents",
        "explained_heldout": "the same on held-out ones: the number to quote",
    },
    plot=plot,
    finding=finding,
    place=2,
)
