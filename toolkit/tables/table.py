"""A result as a tidy table that can draw itself and say what it shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from toolkit.runtime import html
from toolkit.tables.spec import specs
from toolkit.tables.words import NOT_APPLICABLE, NOT_IN_RUN, NOT_MEASURED

N_SHOWN = 5


@dataclass(frozen=True)
class Table:
    """One of the run's tables: its name and its `frame`, one row per observation.

    The run of one that was not `measured` was made before there was such a table.
    """

    name: str
    frame: pd.DataFrame
    measured: bool = True

    @classmethod
    def of(cls, name: str, rows: Sequence[dict[str, Any]]) -> "Table":
        """Make the table `name` of `rows`, with its columns in the contract's order."""
        return cls(name, pd.DataFrame(rows, columns=list(specs()[name].columns)))

    @classmethod
    def absent(cls, name: str) -> "Table":
        """Make the table `name` of a run that has none."""
        return cls(name, cls.of(name, []).frame, measured=False)

    def plot(self, noise: "Table | None" = None) -> Any:
        """Draw the table as a matplotlib figure; where it shows sizes of deltas, with `noise`."""
        spec = specs()[self.name]
        drawn = {"noise": noise.frame} if noise and spec.draws_noise else {}
        empty = NOT_APPLICABLE if self.measured else NOT_MEASURED
        return spec.plot(self.frame, empty=empty, **drawn)

    def finding(self) -> str:
        """Say what the table shows in one sentence, or that its run has none."""
        return specs()[self.name].finding(self.frame) if self.measured else NOT_IN_RUN

    def _repr_html_(self) -> str:
        first = self.frame.head(N_SHOWN)
        figure = self.plot()
        return html.card(
            self.finding(),
            html.picture(figure, specs()[self.name].title),
            html.grid(list(first.columns), first.astype(object).itertuples(index=False)),
            html.paragraph(f"{len(first)} of {len(self.frame):,} rows of the table {self.name}"),
        )
