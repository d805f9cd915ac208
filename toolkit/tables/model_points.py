"""Figures by model: base, tuned, recommended and runner-up side by side, with their intervals."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from toolkit.tables.drawing import BLACK, BLUE, ORANGE, SKY

MODEL_STYLE: dict[str, dict[str, Any]] = {
    "base": {"color": BLACK, "marker": "s"},
    "tuned": {"color": SKY, "marker": "D"},
    "recommended": {"color": BLUE, "marker": "o"},
    "runner-up": {"color": ORANGE, "marker": "^"},
}


def draw_points(axes: Axes, x: Any, y: Any, below: Any, above: Any, **style: Any) -> None:
    """Draw `y` over `x` with bars that reach `below` and `above` it; what is NaN is left out."""
    x, y, below, above = (np.asarray(values, float) for values in (x, y, below, above))
    seen = np.isfinite(y)
    if not seen.any():
        return
    bars = np.clip(np.nan_to_num(np.stack([below, above])), 0, None)[:, seen]
    look = {"linestyle": "", "markersize": 7, **style}
    axes.plot(x[seen], y[seen], **look)
    axes.errorbar(x[seen], y[seen], bars, fmt="none", ecolor=look["color"], elinewidth=1.2)


def draw_models(axes: Axes, frame: pd.DataFrame, column: str, low: str, high: str) -> None:
    """Draw `column` of each model with its interval from `low` to `high`, one tick a model."""
    for place, row in enumerate(frame.to_dict("records")):
        value = row[column]
        style = MODEL_STYLE[row["model"]]
        draw_points(axes, [place], [value], [value - row[low]], [row[high] - value], **style)
    name_ticks(axes, frame.model)


def name_ticks(axes: Axes, names: Any) -> None:
    """Name the places 0, 1, ... of the x axis."""
    axes.set_xticks(range(len(names)), list(names))
    axes.set_xlim(-0.5, len(names) - 0.5)
