"""The table ``reachability``: what steering before the MLP could reach."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    BLACK,
    BLUE,
    GREEN,
    LAYER_LABEL,
    ORANGE,
    add_band,
    draw_line,
    finish,
    house_style,
    make_panels,
)
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import percent

BUDGET_STYLE: list[dict[str, Any]] = [
    {"color": "#a6a6a6", "marker": "D", "linestyle": ":"},
    {"color": ORANGE, "marker": "s", "linestyle": "--"},
    {"color": GREEN, "marker": "^", "linestyle": "-."},
    {"color": BLUE, "marker": "o", "linestyle": "-"},
    {"color": BLACK, "marker": "v", "linestyle": "-"},
]


@house_style("How much of the MLP's change steering before it can reach")
def plot(frame: pd.DataFrame) -> Figure:
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


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    rows = frame.query("target == 'down'").dropna(subset=["residual_median"])
    if rows.empty:
        return "Not applicable: no tokens were sampled, or no down projection changed."
    median = rows.groupby("budget").residual_median.median()
    real = rows.groupby("budget").nonlinear_residual_median.median()
    return (
        "A steering vector of 3% of the MLP input's norm leaves "
        f"{percent(median[0.03])} of the down projection's change, one of 30% leaves "
        f"{percent(median[0.3])} (medians over blocks, one free vector a token, to first order; "
        "through the real MLP "
        f"{percent(real[0.03])} and {percent(real[0.3])})."
    )


SPEC = TableSpec(
    name="reachability",
    title="What steering before the MLP could reach",
    reading=(
        "The least ‖v − A(h)Δ‖ / ‖v‖ over steering vectors Δ with ‖Δ‖ ≤ ρ‖h‖, a free vector for "
        "every token: a lower bound for what any map can leave. A(h) is the MLP's Jacobian."
    ),
    columns={
        "layer": "the block",
        "target": "`down` (ΔW_d m, the post's test) or `exact`",
        "budget": "ρ: ‖Δ‖ ≤ ρ‖h‖",
        "residual_q25": "lower quartile of `min ‖v − A(h)Δ‖ / ‖v‖` over tokens",
        "residual_median": "median of `min ‖v − A(h)Δ‖ / ‖v‖` over tokens",
        "residual_q75": "upper quartile of `min ‖v − A(h)Δ‖ / ‖v‖` over tokens",
        "nonlinear_residual_median": "median for the same Δ through the real MLP",
        "min_norm_median": "the smallest ρ whose residual is 0.01; infinite where none is",
        "rank_median": "numerical rank of `A(h)`, relative tolerance 1e-6",
        "n_tokens": "sampled tokens (`--sample`, 8 by default: few)",
    },
    plot=plot,
    finding=finding,
    place=7,
)
