"""The table ``noise``: how large rounding is."""

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
from toolkit.tables.spec import TableSpec


@house_style("How large the noise of the precision is")
def plot(frame: pd.DataFrame) -> Figure:
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
    names = ["forced", "free"]
    if frame["mode"].eq("free_quantised").any():
        modes["free: float8 weights"] = {"linestyle": "--", "fillstyle": "none"}
        names.append("free_quantised")
    for axes, (column, (title, label)) in zip(panels, drawn.items(), strict=True):
        for location, rows in by_location(frame, "location"):
            for mode, dashes in zip(names, modes.values(), strict=True):
                style = LOCATION_STYLE[location] | dashes | {"label": LOCATIONS[location]}
                draw_line(axes, rows[rows["mode"] == mode], "layer", column, **style)
        axes.set_title(title)
        log_scale(axes)
        finish(axes, LAYER_LABEL, label, 3, layers=True, modes=modes)
    return figure


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    rows = frame[frame.location == "post_block"].dropna(subset=["noise_relative"])
    if rows.empty:
        return "Not applicable: no noise can be measured (the check of the noise floor says why)."
    by_mode = {mode: found.noise_relative for mode, found in rows.groupby("mode")}
    said = []
    if "free" in by_mode:
        free, forced = by_mode["free"], by_mode["forced"]
        said.append(
            f"Rounding moves the base model's state after a block by {free.min():.1e} to "
            f"{free.max():.1e} of its size, all blocks so far taken together, and by "
            f"{forced.min():.1e} to {forced.max():.1e} within one block. A free or a forced delta "
            "of that size says nothing."
        )
    if "free_quantised" in by_mode:
        stored = by_mode["free_quantised"]
        said.append(
            f"That the base's weights were stored as float8 moves it by {stored.min():.1e} to "
            f"{stored.max():.1e}, all blocks taken together."
        )
    return " ".join(said)


SPEC = TableSpec(
    name="noise",
    title="How large rounding is",
    reading=(
        "The base model against itself in a higher precision, on a few documents: rms(state in "
        "the run's precision − state in the higher one) / rms(state). Free: rounding of all "
        "blocks so far, the noise of a free delta; forced: of this block alone, on one and the "
        "same input. A delta holds the rounding of two models, about √2 times this."
    ),
    columns={
        "layer": "the block",
        "location": "where",
        "mode": (
            "free or forced; for a base whose weights were float8 also `free_quantised` and "
            "`forced_quantised`: what moving each of these weights at random within the interval "
            "that was rounded to it does to the states"
        ),
        "n_tokens": "counted tokens",
        "noise_rms": (
            "root mean square of ‖e‖, e = state in the run's precision − state in the higher one"
        ),
        "noise_relative": "`noise_rms / sqrt(E‖h‖²)`: beside `relative_rms` of `spectrum.csv`",
        "noise_norm": "`E‖e‖`: beside the norms of `norms.csv`",
    },
    plot=plot,
    finding=finding,
    place=5,
)
