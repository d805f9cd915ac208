"""How nearly a steer behind the block replaces one behind the MLP on SmolLM2.

By block of the base model: the dimensions and principal angles of what the skip term and the MLP's
output span, and how much of the MLP's output the block's gives back. Below, what it costs to put
A P* behind the block, or an adapter fitted there, in place of A behind the MLP, all of rank 8; bars
are standard errors of the difference over prompts.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    BLACK,
    BLUE,
    GREEN,
    LAYER_LABEL,
    LOCATION_STYLE,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILLION,
    add_reference,
    clip_shares,
    draw_line,
    finish,
    make_panels,
)

MADE_BY = ("python data/recipes/projection.py smollm2 --out data/theory/projection-smollm2",)
ADAPTERS: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("post-block A P*", "base"): ("A P*, P* of the base model's states",
                                  {"color": PURPLE, "marker": "v"}),
    ("post-block A P*", "steered"): ("A P*, P* of states that A steers",
                                     {"color": SKY, "marker": "D"}),
    ("post-block A P*", "own"): ("A P*, P* of states that it steers",
                                 {"color": GREEN, "marker": "^"}),
    ("post-block fitted", ""): ("fitted behind the block", LOCATION_STYLE["post_block"]),
}  # fmt: skip


def draw(data: Path) -> Figure:
    """Dimensions, angles, R² by block; then the share of the KL that is lost."""
    blocks = pd.read_csv(data / "theory" / "projection-smollm2.csv")
    costs = pd.read_csv(data / "theory" / "projection-smollm2-cost.csv").fillna({"stream": ""})
    with rc_context(STYLE):
        figure, (dimensions, angles, r2, lost) = make_panels(4)
        _dimensions(dimensions, blocks)
        _angles(angles, blocks)
        _r2(r2, blocks)
        _lost(lost, costs)
    return figure


def _dimensions(axes: Axes, blocks: pd.DataFrame) -> None:
    for share, style in (
        (90, {"color": BLUE, "marker": "o"}),
        (99, {"color": VERMILLION, "linestyle": "--", "marker": "s"}),
    ):
        both = blocks.assign(both=blocks[f"skip_{share}"] + blocks[f"mlp_{share}"])
        draw_line(axes, both, "layer", "both", label=f"{share} % of the energy of each", **style)
    add_reference(axes, blocks.d[0], "all there are: above, the two must meet")
    axes.texts[-1].xy = (0.9, blocks.d[0])  # clear of the last block's points
    axes.set_title("Dimensions of both subspaces together")
    axes.set_ylim(bottom=0)
    finish(axes, LAYER_LABEL, "dimensions", 2, layers=True)


def _angles(axes: Axes, blocks: pd.DataFrame) -> None:
    for column, label, style in (
        ("median_90", "median, 90 % of the energy",
         {"color": BLUE, "linestyle": ":", "marker": "o", "fillstyle": "none"}),
        ("smallest_90", "smallest, 90 %", {"color": BLUE, "marker": "v"}),
        ("smallest_99", "smallest, 99 %",
         {"color": VERMILLION, "linestyle": "--", "marker": "s"}),
    ):  # fmt: skip
        draw_line(axes, blocks, "layer", column, label=label, **style)
    axes.set_title("Principal angles between skip term and MLP")
    axes.set_ylim(-3, 93)
    finish(axes, LAYER_LABEL, "degrees (90: orthogonal)", 2, layers=True)


def _r2(axes: Axes, blocks: pd.DataFrame) -> None:
    for column, label, style in (
        ("r2_fit", "best affine P*, fit documents", {"color": BLACK, "linestyle": ":"}),
        ("r2_heldout", "best affine P*, held out", {"color": BLUE, "marker": "o"}),
        ("r2_oblique_90", "P between the 90 % subspaces, held out",
         {"color": ORANGE, "linestyle": "--", "marker": "s"}),
    ):  # fmt: skip
        draw_line(axes, blocks, "layer", column, label=label, **style)
    axes.set_title("The MLP's output, guessed from the block's")
    clip_shares(axes)
    finish(axes, LAYER_LABEL, "R²", 1, layers=True)


def _lost(axes: Axes, costs: pd.DataFrame) -> None:
    reference = costs[costs.adapter == "post-MLP A"].set_index("fit").recovered
    for place, (key, (label, style)) in enumerate(ADAPTERS.items()):
        rows = costs[(costs.adapter == key[0]) & (costs.stream == key[1])].set_index("fit")
        rows = rows.loc[reference.index]
        x = [index + 0.15 * (place - 1.5) for index in range(len(rows))]
        axes.errorbar(x, rows.lost, rows.lost_sem, label=label, linestyle="", **style)
    words = [f"A fitted {fit}:\nrecovers {share:.3f}" for fit, share in reference.items()]
    axes.set_xticks(range(len(words)), words)
    axes.set_xlim(-0.5, len(words) - 0.5)
    add_reference(axes, 0, "as good as A")
    axes.texts[-1].xy = (0.6, 0)  # between the two groups
    axes.set_title("Share of the KL lost by steering behind the block, rank 8")
    finish(axes, "", "A's share less this one's", 1, drop=40)
