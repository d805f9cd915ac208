"""The table ``mlp_fit``: what an edit of the MLP's output could do."""

import pandas as pd
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    LAYER_LABEL,
    VERMILLION,
    clip_shares,
    draw_line,
    finish,
    house_style,
    make_panels,
)
from toolkit.tables.series import RANK_STYLE
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import UNMEASURED


@house_style("What an edit of the MLP's output can do")
def plot(frame: pd.DataFrame) -> Figure:
    """The best ReFT of each rank on the down projection's change; how linear the MLP is."""
    figure, (bound, linear) = make_panels(2, 3.4)
    for rank, style in RANK_STYLE.items():
        label = {0: "one vector", "full": "full rank"}.get(rank, f"rank {rank}")
        rows = frame[(frame.target == "down") & (frame["rank"] == rank)]
        draw_line(bound, rows, "layer", "explained_heldout", **{**style, "label": label})
    bound.set_title("The most that a ReFT after the MLP explains of ΔW_d m")
    clip_shares(bound)
    finish(bound, LAYER_LABEL, "explained, held out", 3, layers=True)
    rows = frame[frame.target == "mlp_out"]
    draw_line(linear, rows, "layer", "explained_heldout", color=VERMILLION, marker="o",
          label="best affine map of the MLP's input")  # fmt: skip
    linear.set_title("How linear the base model's MLP is on these tokens")
    clip_shares(linear)
    finish(linear, LAYER_LABEL, "R², held out", 1, layers=True)
    return figure


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    frame = frame.dropna(subset=["explained_heldout"])
    bound = frame[frame.target == "down"].groupby("rank").explained_heldout.median()
    linear = frame[frame.target == "mlp_out"].explained_heldout
    if linear.empty:
        return UNMEASURED
    shown = [f"{bound[rank]:.0%} at rank {rank}" for rank in (1, 8, 32) if rank in bound]
    reft = f"A ReFT on the MLP's output explains at most {', '.join(shown)} of ΔW_d m. "
    return (
        f"{reft if shown else ''}The best affine map of the MLP's input has a held-out R² of "
        f"{linear.median():.2f} (median over blocks, {linear.min():.2f} to {linear.max():.2f}): "
        "the nearer to 1, the more linear the MLP is on these tokens."
    )


SPEC = TableSpec(
    name="mlp_fit",
    title="What an edit of the MLP's output could do",
    reading=(
        "The best reduced-rank map of the MLP's output on ΔW_d m, which is the most that a ReFT "
        "there explains; and R² of the best affine map of the MLP's input on its output."
    ),
    columns={
        "layer": "the block",
        "source": "`mlp_out`, for the target `down`; `mlp_in`, for the target `mlp_out`",
        "target": (
            "`down`: the most a ReFT of that rank explains of ΔW_d m; "
            "`mlp_out`: how linear the MLP is"
        ),
        "rank": "0, 1, 8, 32, `full`",
        "explained_fit": "of `down` the uncentred share; of `mlp_out` R² about the mean",
        "explained_heldout": "of `down` the uncentred share; of `mlp_out` R² about the mean",
    },
    plot=plot,
    finding=finding,
    place=13,
)
