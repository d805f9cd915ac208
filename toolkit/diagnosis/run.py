"""What a run found."""

from dataclasses import dataclass
from typing import Any

from toolkit.adapters.collection import Adapters
from toolkit.evaluation.rank_search import RankSearch
from toolkit.runtime.check import Check
from toolkit.tables.table import Table


@dataclass(frozen=True)
class Run:
    """All that a diagnosis found: its tables, the recommendation and what stands after it.

    `tables` are all tables by name; ``run.spectrum`` is ``run.tables["spectrum"]``. `adapters`
    are the recommended ones (None where steering recovers nothing). `samples` are held-out prompts
    with the answers of base, steered and tuned model. `info` is ``run.json``. `rank_search` are the
    smallest ranks within a KL, where they were asked for.
    """

    tables: dict[str, Table]
    recommendation: dict[str, Any] | None
    adapters: Adapters | None
    samples: list[dict[str, str]]
    checks: list[Check]
    info: dict[str, Any]
    rank_search: RankSearch | None = None

    def __getattr__(self, name: str) -> Table:
        """Return the table `name`."""
        tables = vars(self).get("tables", {})  # a run that is being copied has none yet
        if name not in tables:
            raise AttributeError(f"a run has no {name!r}: its tables are {', '.join(tables)}")
        return tables[name]
