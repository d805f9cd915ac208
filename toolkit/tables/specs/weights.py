"""The table ``weights``: the weights' side."""

import pandas as pd
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    BLACK,
    BLUE,
    GREEN,
    LAYER_LABEL,
    ORANGE,
    PURPLE,
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


@house_style("How large and how concentrated each matrix's change is")
def plot(frame: pd.DataFrame) -> Figure:
    """2-norms and effective ranks of every matrix's change, by layer."""
    figure, (norms, ranks) = make_panels(2, 3.9)
    colors = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK)
    marks, dashes = "os^vD<>", ("-", "--", "-.", ":")
    for i, (module, rows) in enumerate(frame.groupby("module", sort=False)):
        style = {"color": colors[i % 7], "marker": marks[i % 7], "linestyle": dashes[i % 4]}
        name = str(module).split(".")[-1]
        draw_line(norms, rows, "layer", "norm_2", label=name, **style)
        draw_line(ranks, rows, "layer", "k90", label=name, **style)
    norms.set_title("The largest singular value of ΔW")
    log_scale(norms)
    finish(norms, LAYER_LABEL, "‖ΔW‖₂", 4, layers=True)
    ranks.set_title("Directions that hold 90% of ΔW")
    ranks.set_ylim(bottom=0)
    finish(ranks, LAYER_LABEL, "number of singular values", 4, layers=True)
    return figure


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    if not frame.norm_2.notna().any():
        return UNMEASURED
    rows = frame[frame.norm_2 > 0]
    if rows.empty:
        return "Nothing changed in any matrix (norms, biases and embeddings are not in this table)."
    largest = rows.loc[rows.norm_2.idxmax()]
    downs = rows[rows.module.str.contains("down|c_proj|4h_to_h|fc2")]
    share = f"At most {downs.outside.max():.1%} of a down projection's change"
    outside = f" {share} lies outside its column space." if len(downs) else ""
    return (
        f"{len(rows)} of {len(frame)} matrices changed, by {rows.relative.min():.2%} to "
        f"{rows.relative.max():.1%} of their norm; numerical ranks {rows['rank'].min():.0f} to "
        f"{rows['rank'].max():.0f}. The largest 2-norm, {largest.norm_2:.3g}, has {largest.module} "
        f"of block {largest.layer:.0f}.{outside}"
    )


SPEC = TableSpec(
    name="weights",
    title="The weights' side",
    reading="Singular values of every matrix's change; of a LoRA from its factors.",
    columns={
        "layer": "the block",
        "module": "which matrix",
        "rows": "number of rows of the matrix",
        "columns": "number of columns of the matrix",
        "norm_2": "the largest singular value of ΔW",
        "norm_fro": "`‖ΔW‖_F`",
        "relative": "`‖ΔW‖_F / ‖W‖_F`",
        "rank": "singular values above `max(rows, columns) · ε · σ₁`",
        "stable_rank": "`‖ΔW‖_F² / σ₁²`",
        "k90": "fewest σ² that hold 90 % of their sum",
        "outside": (
            "share of `‖ΔW‖_F²` outside col(W): unreachable from before the module, to first order"
        ),
    },
    plot=plot,
    finding=finding,
    place=14,
)
