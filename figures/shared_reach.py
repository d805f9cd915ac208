"""What one steering map for all tokens reaches before the MLP, by rank.

On held-out tokens; the honest companion of `reachability`, whose vectors are free at every token.
"""

from pathlib import Path

from matplotlib.figure import Figure

from toolkit.figures import MADE_BY_RUNS, shipped_plots

MADE_BY = MADE_BY_RUNS


def draw(data: Path) -> dict[str, Figure]:
    return shipped_plots(data, "shared_reach")
