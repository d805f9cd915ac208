"""How much of a block's own change the best linear map explains, by rank and location.

On held-out documents. All three locations are asked for the same, the forced delta of the block's
output; the band holds the middle half of the blocks.
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
    return each_pair(lambda pair: specs()["linear_fit"].plot(pair.table(data, "linear_fit")))
