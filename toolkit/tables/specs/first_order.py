"""The table ``first_order``: what changed inside the MLP."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    BLUE,
    GREEN,
    GREY,
    LAYER_LABEL,
    ORANGE,
    REFERENCE,
    VERMILLION,
    draw_line,
    finish,
    house_style,
    log_scale,
    make_panels,
)
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import UNMEASURED


@house_style("First-order terms of the MLP's change")
def plot(frame: pd.DataFrame) -> Figure:
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


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    if frame.empty:
        return "Not applicable: this family's MLP cannot be read as matrices."
    if not frame.relative_change.notna().any():
        return UNMEASURED
    if not frame.relative_change.any():
        return "Nothing changed in any MLP."
    rows = frame[frame.relative_change > 0]
    median = rows[["down", "gate", "up"]].median()
    return (
        f"Of the MLP's own change the down projection makes {median['down']:.0%}, the gate "
        f"{median['gate']:.0%} and the up projection {median['up']:.0%} (medians over blocks); "
        f"what the three first-order terms leave is at most {rows.remainder.max():.1e} of its "
        "energy."
    )


SPEC = TableSpec(
    name="first_order",
    title="What changed inside the MLP",
    reading=(
        "E⟨term, exact⟩ / E‖exact‖² of the first-order terms of ΔW_d, ΔW_g and ΔW_u at the base "
        "model's own MLP input; the remainder says whether first order may be trusted."
    ),
    columns={
        "layer": "the block",
        "down": "`E⟨term, exact⟩ / E‖exact‖²` of the first-order term of ΔW_d",
        "gate": "the same of ΔW_g",
        "up": "the same of ΔW_u",
        "remainder": "`E‖exact − down − gate − up‖² / E‖exact‖²`",
        "relative_change": "`rms‖exact‖ / rms‖y_base‖`",
    },
    plot=plot,
    finding=finding,
    place=6,
)
