"""What steering behind an MLP of rank k learns: the post's W_d = 0, and the family up to full rank.

Random models of one block, whose task is to say a fixed permutation of each token. At rank 0 any
post-MLP steer is one constant vector and learns what a fixed vector learns; each restored direction
of W_d lets it see more. Lines are means over three seeds, shades their range.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    GREY,
    LOCATION_STYLE,
    STYLE,
    add_band,
    add_reference,
    finish,
    make_panels,
)

MADE_BY = ("python data/recipes/deficient_mlp.py --out data/theory/deficient-mlp",)
N_TOKENS = 32
DASHED = {"linestyle": "--", "fillstyle": "none"}
LINES: dict[tuple[str, str], dict[str, Any]] = {
    ("post_block", "linear"): {**LOCATION_STYLE["post_block"], "label": "post-block, linear"},
    ("post_block", "nonlinear"): {
        **LOCATION_STYLE["post_block"], **DASHED, "label": "post-block, non-linear",
    },
    ("post_block", "vector"): {
        "color": GREY, "linestyle": ":", "marker": "v", "label": "fixed vector",
    },
    ("post_mlp", "linear"): {**LOCATION_STYLE["post_mlp"], "label": "post-MLP, linear"},
    ("post_mlp", "nonlinear"): {
        **LOCATION_STYLE["post_mlp"], **DASHED, "label": "post-MLP, non-linear",
    },
}  # fmt: skip


def draw(data: Path) -> Figure:
    """Held-out accuracy and loss by the rank of the down projection."""
    frame = pd.read_csv(data / "theory" / "deficient-mlp.csv")
    with rc_context(STYLE):
        figure, (right, loss) = make_panels(2)
        _lines(right, frame.assign(percent=100 * frame.accuracy), "percent")
        add_reference(right, 100 / N_TOKENS, "chance")
        right.set_title("Right answers, by the rank of the MLP's down projection")
        right.set_ylim(0, 104)
        right.set(xlabel="rank of W_d (full: 48)", ylabel="held-out accuracy (%)")
        _lines(loss, frame, "loss")
        loss.set_title("Loss on sequences that no adapter saw")
        loss.set_ylim(bottom=0)
        finish(loss, "rank of W_d (full: 48)", "cross entropy (nats)", 2)
    return figure


def _lines(axes: Axes, frame: pd.DataFrame, column: str) -> None:
    ranks = sorted(frame.down_rank.unique())
    for (location, kind), style in LINES.items():
        rows = frame[(frame.location == location) & (frame.kind == kind)]
        by_rank = rows.groupby("down_rank")[column].agg(["mean", "min", "max"]).loc[ranks]
        axes.plot(range(len(ranks)), by_rank["mean"], **style)
        add_band(axes, range(len(ranks)), by_rank["min"], by_rank["max"], style["color"])
    axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
