"""How nearly a steer behind the block replaces one behind the MLP on SmolLM2.

By block of the base model: the dimensions and principal angles of what the skip term and the MLP's
output span, and how much of the MLP's output the block's gives back. Below, what adapters of rank 8
recover: A behind the MLP, A P* behind the block, and one fitted there; bars are standard errors
over prompts.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toolkit.draw import (
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

MADE_BY = ("python recipes/projection.py smollm2 --out data/theory/projection-smollm2",)
ADAPTERS: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("post-MLP A", ""): ("A, post-MLP", LOCATION_STYLE["post_mlp"]),
    ("post-block A P*", "base"): ("A P*, of the base model's states",
                                  {"color": PURPLE, "marker": "v"}),
    ("post-block A P*", "steered"): ("A P*, of A-steered states", {"color": SKY, "marker": "D"}),
    ("post-block A P*", "own"): ("A P*, of its own states", {"color": GREEN, "marker": "^"}),
    ("post-block fitted", ""): ("fitted post-block", LOCATION_STYLE["post_block"]),
}  # fmt: skip


def draw(data: Path) -> Figure:
    """Dimensions, angles, R² by block; then what the adapters recover."""
    blocks = pd.read_csv(data / "theory" / "projection-smollm2.csv")
    costs = pd.read_csv(data / "theory" / "projection-smollm2-cost.csv").fillna({"stream": ""})
    with rc_context(STYLE):
        figure, (dimensions, angles, r2, recovered) = make_panels(4)
        _dimensions(dimensions, blocks)
        _angles(angles, blocks)
        _r2(r2, blocks)
        _recovered(recovered, costs)
    return figure


def _dimensions(axes: Axes, blocks: pd.DataFrame) -> None:
    for share, style in (
        (90, {"color": BLUE, "marker": "o"}),
        (99, {"color": VERMILLION, "linestyle": "--", "marker": "s"}),
    ):
        both = blocks.assign(both=blocks[f"skip_{share}"] + blocks[f"mlp_{share}"])
        draw_line(axes, both, "layer", "both", label=f"{share} % of the energy of each", **style)
    add_reference(axes, blocks.d[0], "all dimensions: above, the two must meet")
    axes.set_title("Dimensions of the skip term's and the MLP's subspace together")
    axes.set_ylim(bottom=0)
    finish(axes, LAYER_LABEL, "dimensions", 2, layers=True)


def _angles(axes: Axes, blocks: pd.DataFrame) -> None:
    for share, color in ((90, BLUE), (99, VERMILLION)):
        for which, style in (
            ("smallest", {"marker": "v", "linestyle": "-"}),
            ("median", {"marker": "o", "linestyle": ":", "fillstyle": "none"}),
        ):
            label = f"{which}, {share} %"
            draw_line(axes, blocks, "layer", f"{which}_{share}", color=color, label=label, **style)
    axes.set_title("Principal angles between the two")
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


def _recovered(axes: Axes, costs: pd.DataFrame) -> None:
    fits = list(costs.fit.unique())
    for place, (key, (label, style)) in enumerate(ADAPTERS.items()):
        rows = costs[(costs.adapter == key[0]) & (costs.stream == key[1])].set_index("fit")
        x = [index + 0.13 * (place - 2) for index in range(len(fits))]
        rows = rows.loc[fits]
        axes.errorbar(x, rows.recovered, rows.recovered_sem, label=label, linestyle="", **style)
    axes.set_xticks(range(len(fits)), [f"A fitted {fit}" for fit in fits])
    axes.set_xlim(-0.5, len(fits) - 0.5)
    axes.set_title("What adapters of rank 8 in every block recover of the KL")
    finish(axes, "", "recovered", 2, drop=28)
