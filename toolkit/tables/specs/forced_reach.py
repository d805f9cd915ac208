"""The table ``forced_reach``: which location reaches the block's change."""

import pandas as pd
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    LAYER_LABEL,
    LOCATION_STYLE,
    PURPLE,
    draw_line,
    finish,
    house_style,
    make_panels,
)
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import NO_PATH, NOTHING, percent

SHOWN_BUDGETS = (0.03, 0.3)


@house_style("What share of the block's change each location reaches")
def plot(frame: pd.DataFrame) -> Figure:
    """Share of the block's forced delta that a free vector per token reaches, by location."""
    figure, panels = make_panels(len(SHOWN_BUDGETS), 3.6)
    block = frame[frame.target == "block"]
    for axes, budget in zip(panels, SHOWN_BUDGETS, strict=True):
        rows = block[block.budget == budget]
        for location in ("pre_mlp", "post_block"):
            label = {"pre_mlp": "pre-MLP", "post_block": "post-MLP and post-block"}[location]
            style = {**LOCATION_STYLE[location], "label": label}
            draw_line(axes, rows[rows.location == location], "layer", "explained", **style)
        heads = rows[rows.location == "heads"].groupby("layer", as_index=False).explained
        drawn = (("max", "best single head", "-."), ("median", "median head", ":"))
        for how, label, dashes in drawn:
            draw_line(axes, heads.agg(how), "layer", "explained", color=PURPLE, marker="D",
                  linestyle=dashes, label=label)  # fmt: skip
        axes.set_title(f"Reached by a vector a token of {100 * budget:g}% of the stream's norm")
        axes.set_ylim(0, 1.05)
        finish(axes, LAYER_LABEL, "share of the forced delta", 2, layers=True)
    return figure


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    rows = frame[frame.target == "block"].dropna(subset=["explained"])
    if rows.empty:
        return NO_PATH
    if not rows.explained.any():
        return NOTHING
    by_place = rows.groupby(["location", "budget"]).explained.median()
    parts = [
        f"{100 * budget:g}% of the stream's norm reaches {by_place['pre_mlp', budget]:.0%} from "
        f"before the MLP and {by_place['post_block', budget]:.0%} from after it"
        for budget in (0.03, 0.1, 0.3)
        if ("pre_mlp", budget) in by_place
    ]
    real = rows[(rows.location == "pre_mlp") & (rows.budget == 0.03)].nonlinear_residual_median
    heads = f" Through the real block the 3% before the MLP leave {percent(real.median())}."
    best = rows[(rows.location == "heads") & (rows.budget == 0.3)].groupby("layer").explained.max()
    if len(best):
        heads += f" The best single head reaches {best.median():.0%} with 30%."
    return (
        "Of the block's own change, a free vector a token of "
        f"{'; of '.join(parts)} (medians over blocks, first order).{heads}"
    )


SPEC = TableSpec(
    name="forced_reach",
    title="Which location reaches the block's change",
    reading=(
        "The share of the forced delta of the block's output that a free vector a token reaches, "
        "its size relative to the residual stream's. What is added after the MLP arrives as it "
        "is; before it, it passes through norm and MLP and round them."
    ),
    columns={
        "layer": "the block",
        "location": "`pre_mlp`, `heads` (one at a time), `post_mlp`, `post_block`",
        "head": "the head's number",
        "target": (
            "`block`: the forced delta of the block's output; `down`, `exact`: the MLP's change "
            "as the stream sees it"
        ),
        "budget": "ρ: ‖Δ‖ ≤ ρ‖x‖, x the stream after the first skip",
        "explained": "`1 − Σ‖v − MΔ‖² / Σ‖v‖²` over tokens",
        "residual_q25": "lower quartile of `‖v − MΔ‖ / ‖v‖` over tokens",
        "residual_median": "median of `‖v − MΔ‖ / ‖v‖` over tokens",
        "residual_q75": "upper quartile of `‖v − MΔ‖ / ‖v‖` over tokens",
        "nonlinear_residual_median": "median of the same through the real block",
        "n_tokens": "sampled tokens",
    },
    plot=plot,
    finding=finding,
    place=9,
)
