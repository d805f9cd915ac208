"""What several runs give beside each other."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from toolkit.runs import overlap, recovery, transfer
from toolkit.runs.finished import FinishedRun
from toolkit.tables.spec import TableSpec

SPECS: tuple[TableSpec, ...] = (recovery.SPEC, overlap.SPEC, transfer.SPEC)


@dataclass(frozen=True)
class RunComparison:
    """Runs of one base beside each other.

    `recovery`, `overlap` and `transfer` are the frames of ``compare.csv``, ``overlap.csv`` and
    ``transfer.csv``; `transfer` has no rows unless it was asked for. `left_out` says what of which
    run is missing and why. `made` is where the numbers come from.
    """

    runs: list[FinishedRun]
    recovery: pd.DataFrame
    overlap: pd.DataFrame
    transfer: pd.DataFrame
    left_out: list[str]
    made: dict[str, Any]

    @property
    def tables(self) -> list[tuple[TableSpec, pd.DataFrame]]:
        """The tables that have rows, each with what it means."""
        frames = (self.recovery, self.overlap, self.transfer)
        return [(s, frame) for s, frame in zip(SPECS, frames, strict=True) if len(frame)]

    @property
    def findings(self) -> dict[str, str]:
        """What each table shows in a sentence, by its name."""
        return {spec.name: spec.finding(frame) for spec, frame in self.tables}
