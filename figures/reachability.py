"""What steering before the MLP leaves of the MLP's change, by size of the vector.

A free vector for every token, to first order: the least that any map can leave. Median and
quartiles over tokens.
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
    return each_pair(lambda pair: specs()["reachability"].plot(pair.table(data, "reachability")))
