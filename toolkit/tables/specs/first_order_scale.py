"""The table ``first_order_scale``: how far first order holds."""

import pandas as pd
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    BLACK,
    GREEN,
    LAYER_LABEL,
    ORANGE,
    SKY,
    VERMILLION,
    draw_line,
    finish,
    house_style,
    log_scale,
    make_panels,
)
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import UNMEASURED


@house_style("How far first order holds")
def plot(frame: pd.DataFrame) -> Figure:
    """What first order leaves of the MLP's change when the update is scaled, by layer."""
    figure, (axes,) = make_panels(1, 4.0)
    styles = [
        {"color": SKY, "marker": "D", "linestyle": ":"},
        {"color": GREEN, "marker": "^", "linestyle": "-."},
        {"color": BLACK, "marker": "o", "linestyle": "-"},
        {"color": ORANGE, "marker": "s", "linestyle": "--"},
        {"color": VERMILLION, "marker": "v", "linestyle": ":"},
    ]
    scales = sorted(frame["scale"].dropna().unique())
    for scale, style in zip(scales, styles, strict=False):
        rows = frame[frame["scale"] == scale]
        draw_line(axes, rows, "layer", "remainder", label=f"ΔW × {scale:g}", **style)
    axes.set_title("What first order leaves of the MLP's change, by its size")
    log_scale(axes)
    finish(axes, LAYER_LABEL, "remainder (share of energy)", 3, layers=True)
    return figure


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    if not frame.relative_change.notna().any():
        return UNMEASURED
    if not frame.relative_change.any():
        return "Nothing changed in any MLP."
    worst = frame.groupby("scale").remainder.max()
    words = ", ".join(f"{value:.1e} at {scale:g}" for scale, value in worst.items())
    return (
        "What first order leaves of the MLP's change, in the worst block, at multiples of the "
        f"update: {words}. Above a few per cent the linear story misleads."
    )


SPEC = TableSpec(
    name="first_order_scale",
    title="How far first order holds",
    reading=(
        "The share of the MLP's exact change that the first-order terms leave, with all of the "
        "MLP's weight changes multiplied by one number."
    ),
    columns={
        "layer": "the block",
        "scale": "the multiple of the weight changes: 0.25, 0.5, 1, 2, 4",
        "down": "as in `first_order.csv`",
        "gate": "as in `first_order.csv`",
        "up": "as in `first_order.csv`",
        "remainder": "as in `first_order.csv`",
        "relative_change": "as in `first_order.csv`",
        "n_tokens": "sampled tokens",
    },
    plot=plot,
    finding=finding,
    place=12,
)
