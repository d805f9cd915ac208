"""What one steering map for all tokens reaches before the MLP, by rank.

On held-out tokens; the honest companion of `reachability`, whose vectors are free at every token.
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
    return each_pair(lambda pair: specs()["shared_reach"].plot(pair.table(data, "shared_reach")))
