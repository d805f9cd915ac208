"""The table ``inner_pair``: the other half of the post's condition."""

import pandas as pd
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    GREY,
    LAYER_LABEL,
    REFERENCE,
    clip_shares,
    finish,
    house_style,
    make_panels,
)
from toolkit.tables.series import RANK_STYLE, draw_with_error
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import NOTHING


@house_style("One change of the MLP's input for gate and up together")
def plot(frame: pd.DataFrame) -> Figure:
    """Held-out share of what gate and up received that a change of h could give both."""
    figure, (axes,) = make_panels(1, 3.8)
    for rank, style in RANK_STYLE.items():
        label = "full (and a vector a token)" if rank == "full" else style["label"]
        draw_with_error(axes, frame[frame["rank"] == rank], {**style, "label": label})
    axes.set_title("What one change of h gives of both (ΔW_g h, ΔW_u h)")
    clip_shares(axes)
    axes.axhline(0, color=GREY, linewidth=1, label=REFERENCE)
    finish(axes, LAYER_LABEL, "explained, held out", 3, layers=True)
    return figure


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    full = frame[frame["rank"] == "full"].explained_heldout
    if not full.notna().any():
        return "Not applicable: neither gate nor up projection changed."
    if not full.any():
        return NOTHING
    return (
        f"One change of the MLP's input gives gate and up {full.median():.0%} (median over blocks; "
        f"{full.min():.0%} to {full.max():.0%}) of what fine-tuning gave them, whether it is free "
        "for every token or one linear map: the two have far more rows than the input has "
        "dimensions."
    )


SPEC = TableSpec(
    name="inner_pair",
    title="The other half of the post's condition",
    reading=(
        "1 − E‖t − W̄Δh‖² / E‖t‖² with W̄ = [W_g; W_u] and t = ΔW̄ h: whether one change of the "
        "MLP's input could replace the changes of gate and up."
    ),
    columns={
        "layer": "the block",
        "rank": "of the map from h to Δh. `full` is also the best of free vectors",
        "explained_fit": "`1 − E‖t − W̄Δh‖² / E‖t‖²` on fit tokens",
        "explained_heldout": "the same on held-out tokens",
        "explained_heldout_sem": "its standard error, over tokens",
        "residual_q25": "lower quartile of `‖t − W̄Δh‖ / ‖t‖` over held-out tokens",
        "residual_median": "median of `‖t − W̄Δh‖ / ‖t‖` over held-out tokens",
        "residual_q75": "upper quartile of `‖t − W̄Δh‖ / ‖t‖` over held-out tokens",
        "size_median": "median of `‖Δh‖ / ‖h‖` over held-out tokens",
        "n_tokens": "held-out tokens",
    },
    plot=plot,
    finding=finding,
    place=10,
)
