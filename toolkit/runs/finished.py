"""Finished runs of one base, read from their folders."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.adapters.collection import Adapters
from toolkit.diagnosis.workspace import REQUEST, RUN, Workspace
from toolkit.errors import InputError, refused
from toolkit.report.folder import REPORT
from toolkit.tables.store import read_table
from toolkit.tables.table import Table


@dataclass(frozen=True)
class FinishedRun:
    """What is compared of a finished run: its `name` is its folder's, `info` its ``run.json``.

    `recommendation` is that of its report, and `adapters` are the recommended ones; None where
    there are none.
    """

    name: str
    folder: Path
    info: dict[str, Any]
    recommendation: dict[str, Any] | None
    adapters: Adapters | None

    @classmethod
    def read(cls, name: str, folder: Path) -> "FinishedRun":
        """Read the run in `folder`; raises InputError where it is not finished."""
        partial = Workspace(folder, {}).folder
        if (folder / REQUEST).is_file() or (partial.is_dir() and not (folder / RUN).is_file()):
            raise InputError(
                f"the run in {folder} is not finished: the same oracle diagnose command goes on "
                "with it"
            )
        for record in (RUN, REPORT):
            if not (folder / record).is_file():
                raise InputError(f"{folder} is not a finished run: it has no {record}")
        with refused(f"{folder} holds no records of a run that can be read"):
            info, said = (
                json.loads((folder / record).read_text("utf-8")) for record in (RUN, REPORT)
            )
            recommendation = said["run"]["recommendation"]
            for half in ("base", "tuned"):
                _described(info[half])
        kept = folder / "adapters"
        adapters = Adapters.from_pretrained(kept) if kept.is_dir() else None
        return cls(name, folder, info, recommendation, adapters)

    def table(self, name: str) -> Table:
        """Return one of its tables; one that it lacks is not `measured`."""
        folder = self.folder / "tables"
        there = (folder / f"{name}.csv").is_file()
        return read_table(folder, name) if there else Table.absent(name)


def read_runs(folders: Sequence[str | Path]) -> list[FinishedRun]:
    """Read finished runs of one base model; a run is named by its folder.

    Raises InputError for fewer than two, for an unfinished one, and for runs of other bases.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise InputError("a run is named twice: give different folders")
    if len(paths) < 2:
        raise InputError(f"{len(paths)} run(s): expected two or more, to be put beside each other")
    names = _names(paths)
    found = [FinishedRun.read(name, path) for name, path in zip(names, paths, strict=True)]
    for other in found[1:]:
        _require_same_base(found[0], other)
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """Name folders by their own names; where two share one, by as much of the path as it takes."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _require_same_base(one: FinishedRun, other: FinishedRun) -> None:
    ours, theirs = (run.info["base"] for run in (one, other))
    if ours["sha256"] != theirs["sha256"]:
        raise InputError(
            f"{one.name} and {other.name} have other bases: {_described(ours)} and "
            f"{_described(theirs)}; "
            "deltas are compared between fine-tunes of one base, read in one precision"
        )


def _described(model: dict[str, Any]) -> str:
    return f"{model['name']} ({model['dtype']}, sha256 {model['sha256'][:12]})"
