"""How concentrated the oracle deltas are, and how large, by block and location.

Directions that hold 90 % of the delta's energy, and its size beside the state's; forced (what the
block contributes) and free (all changes so far). Few directions do not make a delta linear.
"""

from pathlib import Path

from matplotlib.figure import Figure

from toolkit.jobs.figures import each_pair
from toolkit.tables.spec import specs

MADE_BY = (
    "python data/recipes/shipped_runs.py demo-run",
    "python data/recipes/shipped_runs.py gemma-run",
)


def draw(data: Path) -> dict[str, Figure]:
    return each_pair(lambda pair: specs()["spectrum"].plot(pair.table(data, "spectrum")))
