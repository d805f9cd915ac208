"""The table ``spectrum``: how concentrated the delta is."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    LAYER_LABEL,
    LOCATION_STYLE,
    LOCATIONS,
    by_location,
    draw_line,
    finish,
    house_style,
    log_scale,
    make_panels,
)
from toolkit.tables.series import add_noise_band
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import NOTHING, UNMEASURED


@house_style("How concentrated and how large the deltas are")
def plot(frame: pd.DataFrame, noise: pd.DataFrame | None = None) -> Figure:
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
        add_noise_band(size, noise, "noise_relative")
    finish(size, LAYER_LABEL, "rms of delta / rms of state", layers=True, modes=modes)
    return figure


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    rows = frame.query("location == 'post_block' and mode == 'free'").dropna(subset=["rms"])
    if rows.empty:
        return UNMEASURED
    if not rows.rms.any():
        return NOTHING
    return (
        f"After the block the delta is {rows.relative_rms.min():.3g} to "
        f"{rows.relative_rms.max():.3g} of the state's size; 90% of its energy lies in "
        f"{rows.k90.min():.0f} to {rows.k90.max():.0f} dimensions (median {rows.k90.median():.0f}),"
        f" and a fixed vector could explain {rows.mean_share.median():.0%} (median)."
    )


SPEC = TableSpec(
    name="spectrum",
    title="How concentrated the delta is",
    reading=(
        "k90: the fewest directions that hold 90% of E‖δ‖². Few directions do not make δ a "
        "linear function of the state. The free delta contains every change upstream, the forced "
        "one what the block alone contributes."
    ),
    columns={
        "layer": "the block",
        "location": "where",
        "mode": "free or forced",
        "n_tokens": "counted tokens",
        "rms": "`sqrt(Σλ)`: the root mean square of ‖δ‖",
        "relative_rms": "`rms / sqrt(E‖h_base‖²)`, beside the base model's state in that mode",
        "mean_share": "`‖Eδ‖² / E‖δ‖²`: what a fixed vector could explain",
        "participation_ratio": "`(Σλ)² / Σλ²`, an effective number of dimensions",
        "entropy_rank": "`exp(−Σ p log p)`, `p = λ/Σλ`, another, kinder to small eigenvalues",
        "k50": "fewest eigenvalues whose sum reaches 50 % of all",
        "k90": "fewest eigenvalues whose sum reaches 90 % of all",
        "k95": "fewest eigenvalues whose sum reaches 95 % of all",
        "k99": "fewest eigenvalues whose sum reaches 99 % of all",
    },
    plot=plot,
    finding=finding,
    place=3,
    draws_noise=True,
)
