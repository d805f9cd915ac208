"""How concentrated the oracle deltas are, and how large, by block and location.

Directions that hold 90 % of the delta's energy, and its size beside the state's; forced (what the
block contributes) and free (all changes so far). Few directions do not make a delta linear.
"""

from pathlib import Path

from matplotlib.figure import Figure

from toolkit.figures import MADE_BY_RUNS, shipped_plots

MADE_BY = MADE_BY_RUNS


def draw(data: Path) -> dict[str, Figure]:
    return shipped_plots(data, "spectrum")
