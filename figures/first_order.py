"""Which matrix's change makes the MLP's change, and what first order leaves out.

Shares of the exact change of the MLP's output at the base model's own inputs, by block.
"""

from pathlib import Path

from matplotlib.figure import Figure

from toolkit.figures import MADE_BY_RUNS, shipped_plots

MADE_BY = MADE_BY_RUNS


def draw(data: Path) -> dict[str, Figure]:
    return shipped_plots(data, "first_order")
