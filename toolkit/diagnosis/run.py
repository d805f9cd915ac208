"""What a run found."""

from dataclasses import dataclass
from typing import Any

from toolkit.adapters.collection import Adapters
from toolkit.diagnosis.headline import headline
from toolkit.evaluation.rank_search import RankSearch
from toolkit.runtime import html
from toolkit.runtime.check import Check
from toolkit.tables.table import Table

N_SHOWN = 6
SHOWN = ("location", "kind", "rank", "fit", "layers", "parameters", "recovered", "recovered_sem")


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

    @property
    def headline(self) -> str:
        """The answer in a sentence or two."""
        changed = bool(self.spectrum.frame.rms.any())
        nothing = not changed and self.recommendation is None
        unsteered = self.steerability.frame.query("kind == 'none'").kl
        return headline(self.recommendation, nothing, float(unsteered.iloc[0]))

    def _repr_html_(self) -> str:
        failed = [check.name for check in self.checks if check.status == "failed"]
        found = {
            "pair": f"{self.info['base']['name']} → {self.info['tuned']['name']}",
            "adapters": f"{self.adapters.parameters:,} parameters" if self.adapters else "none",
            "held-out prompts": self.info["data"]["prompts"],
            "checks": f"failed: {', '.join(failed)}" if failed else "none failed",
            "tables": ", ".join(self.tables),
        }
        frame = self.steerability.frame.query("kind in ('vector', 'linear')")
        best = frame.sort_values("recovered", ascending=False).head(N_SHOWN)
        rows = best[list(SHOWN)].astype(object).itertuples(index=False)
        return html.card(self.headline, html.facts(found), html.grid(SHOWN, rows))
