"""The table ``norms``: which branch carries the change."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    BLACK,
    BLUE,
    LAYER_LABEL,
    LOCATION_STYLE,
    LOCATIONS,
    SKY,
    VERMILLION,
    draw_line,
    finish,
    house_style,
    log_scale,
    make_panels,
)
from toolkit.tables.series import add_noise_band
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import NOTHING


@house_style("What each branch adds")
def plot(frame: pd.DataFrame, noise: pd.DataFrame | None = None) -> Figure:
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
        add_noise_band(size, noise[noise["mode"].str.startswith("free")], "noise_norm")
    finish(size, LAYER_LABEL, "mean L2 norm per token", 3, layers=True, modes=modes)
    return figure


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    share = frame.dropna(subset=["mlp_share"]).groupby("of").mlp_share
    if not share.ngroups:
        return "Not applicable: this family's branches cannot be told apart."
    if not frame.query("of == 'delta_free'").post_block.any():
        return NOTHING
    low, high, median = share.min(), share.max(), share.median()
    return (
        f"In the base model the MLP supplies {low['base']:.0%} to {high['base']:.0%} of the two "
        f"branches' norms, depending on the block; of what fine-tuning changed in a block by "
        f"itself (the forced delta) {low['delta_forced']:.0%} to {high['delta_forced']:.0%} "
        f"(median {median['delta_forced']:.0%}), and that is what steering after the MLP covers."
    )


SPEC = TableSpec(
    name="norms",
    title="Which branch carries the change",
    reading="MLP/(MLP+Attn): the MLP's mean norm over the sum of both branches' mean norms.",
    columns={
        "layer": "the block",
        "of": "`base`, `tuned` (states), `delta_free`, `delta_forced` (changes)",
        "pre_mlp": "mean L2 norm per token, `E‖v‖`, in the units of the states",
        "post_mlp": "mean L2 norm per token, `E‖v‖`, in the units of the states",
        "post_block": "mean L2 norm per token, `E‖v‖`, in the units of the states",
        "mlp_share": "`post_mlp / (pre_mlp + post_mlp)` of those means: the post's MLP/(MLP+Attn)",
    },
    plot=plot,
    finding=finding,
    place=4,
    draws_noise=True,
)
