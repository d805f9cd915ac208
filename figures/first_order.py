"""Which matrix's change makes the MLP's change, and what first order leaves out.

Shares of the exact change of the MLP's output at the base model's own inputs, by block.
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
    return each_pair(lambda pair: specs()["first_order"].plot(pair.table(data, "first_order")))
