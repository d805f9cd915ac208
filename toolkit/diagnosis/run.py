"""What a run found."""

from dataclasses import dataclass
from typing import Any

from toolkit.adapters.collection import Adapters
from toolkit.evaluation.rank_search import RankSearch
from toolkit.runtime.check import Check
from toolkit.tables.table import Table


@dataclass(frozen=True)
class Run:
    """All that a diagnosis found: its tables, the recommendation and what stands behind it.

    `adapters` are the recommended ones (None where steering recovers nothing). `samples` are
    held-out prompts with the answers of base, steered and tuned model. `info` is ``run.json``.
    `rank_search` are the smallest ranks within a KL, where they were asked for.
    """

    norms: Table
    spectrum: Table
    noise: Table
    linear_fit: Table
    first_order: Table
    reachability: Table
    shared_reach: Table
    forced_reach: Table
    normalisation: Table
    inner_pair: Table
    first_order_scale: Table
    mlp_fit: Table
    weights: Table
    sequential_kl: Table
    steerability: Table
    recommendation: dict[str, Any] | None
    adapters: Adapters | None
    samples: list[dict[str, str]]
    checks: list[Check]
    info: dict[str, Any]
    rank_search: RankSearch | None = None

    @property
    def tables(self) -> list[Table]:
        return [value for value in vars(self).values() if isinstance(value, Table)]
