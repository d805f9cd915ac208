"""What steering before the MLP leaves of the MLP's change, by size of the vector.

A free vector for every token, to first order: the least that any map can leave. Median and
quartiles over tokens.
"""

from pathlib import Path

from matplotlib.figure import Figure

from toolkit.figures import MADE_BY_RUNS, shipped_plots

MADE_BY = MADE_BY_RUNS


def draw(data: Path) -> dict[str, Figure]:
    return shipped_plots(data, "reachability")
