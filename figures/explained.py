"""How much of a block's own change the best linear map explains, by rank and location.

On held-out documents. All three locations are asked for the same, the forced delta of the block's
output; the band holds the middle half of the blocks.
"""

from pathlib import Path

from matplotlib.figure import Figure

from toolkit.figures import MADE_BY_RUNS, shipped_plots

MADE_BY = MADE_BY_RUNS


def draw(data: Path) -> dict[str, Figure]:
    return shipped_plots(data, "linear_fit")
