"""What the plots of several tables draw alike: ranks, errors and noise."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from toolkit.tables.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    add_band,
    draw_line,
    drawn_heights,
)
from toolkit.tables.words import QUANTISED

FAR_BELOW = 30.0  # noise that is that many times smaller than all else is not drawn to scale
RANK_STYLE: dict[Any, dict[str, Any]] = {
    0: {"color": GREY, "marker": "D", "linestyle": ":", "label": "one vector"},
    1: {"color": ORANGE, "marker": "s", "linestyle": "--", "label": "rank 1"},
    8: {"color": BLUE, "marker": "o", "linestyle": "-", "label": "rank 8"},
    32: {"color": GREEN, "marker": "^", "linestyle": "-.", "label": "rank 32"},
    "full": {"color": BLACK, "marker": "v", "linestyle": "-", "label": "full rank"},
}


def add_noise_band(axes: Axes, noise: pd.DataFrame, column: str) -> None:
    """Draw a band from the least to the most noise of each layer, over locations and modes.

    What storing the base's weights as float8 did has a band of its own. Noise far below everything
    drawn is said in words: a band would squeeze what is drawn.
    """
    stored = noise["mode"].str.endswith(QUANTISED)
    _one_band(axes, noise[~stored], column, "rounding noise", GREY, 0.03)
    if stored.any():
        _one_band(axes, noise[stored], column, "noise of float8 weights", PURPLE, 0.09)


# many parameters: what is drawn, and how it looks
def _one_band(
    axes: Axes, noise: pd.DataFrame, column: str, name: str, color: str, height: float
) -> None:
    low, high = (noise.groupby("layer")[column].agg(how) for how in ("min", "max"))
    most = float(high.max()) if len(high) else 0.0
    heights = drawn_heights(axes)
    lowest = float(heights[heights > 0].min(initial=np.inf))
    if most * FAR_BELOW < lowest:
        words = f"{name}: at most {most:.1g}" if most else ""
        axes.text(0.01, height, words, color=color, transform=axes.transAxes, fontsize="small")
    elif most:
        add_band(axes, low.index, low, high, color, label=name)


def sorted_ranks(ranks: pd.Series) -> list[Any]:
    """Sort the ranks that occur, "full" last."""
    known = {rank for rank in ranks if rank is not None}
    return sorted(known, key=lambda rank: float("inf") if rank == "full" else rank)


def rank_words(rank: Any) -> str:
    """Name a rank for a legend."""
    return {0: "fixed vector", "full": "full rank"}.get(rank, f"rank {rank}")


def draw_with_error(axes: Axes, rows: pd.DataFrame, style: dict[str, Any]) -> None:
    """Draw the held-out share over the layers with its standard error as a band."""
    rows = rows.sort_values("layer")
    error = rows.explained_heldout_sem.fillna(0)
    low, high = rows.explained_heldout - error, rows.explained_heldout + error
    add_band(axes, rows.layer, low, high, style["color"])
    draw_line(axes, rows, "layer", "explained_heldout", **style)
