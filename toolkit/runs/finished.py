"""Finished runs of one base, read from their folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.diagnosis.run import Run
from toolkit.diagnosis.workspace import REQUEST, RUN, Workspace
from toolkit.errors import InputError
from toolkit.report.folder import read_run


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its `name` in tables, its folder, and what it found."""

    name: str
    folder: Path
    run: Run

    @property
    def info(self) -> dict[str, Any]:
        """The content of its ``run.json``."""
        return self.run.info


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
    found = [
        FinishedRun(name, path, read_run(_finished(path), anew=False))
        for name, path in zip(names, paths, strict=True)
    ]
    for other in found[1:]:
        _require_same_base(found[0], other)
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """Name folders by their own names; where two share one, by as much of the path as it takes."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _finished(folder: Path) -> Path:
    """Return `folder`; raises InputError where its run is not finished."""
    partial = Workspace(folder, {}).folder
    if (folder / REQUEST).is_file() or (partial.is_dir() and not (folder / RUN).is_file()):
        raise InputError(
            f"the run in {folder} is not finished: the same oracle diagnose command goes on with it"
        )
    return folder


def _require_same_base(one: FinishedRun, other: FinishedRun) -> None:
    ours, theirs = (run.info["base"] for run in (one, other))
    if ours["sha256"] != theirs["sha256"]:
        raise InputError(
            f"{one.name} and {other.name} have other bases: {_base(ours)} and {_base(theirs)}; "
            "deltas are compared between fine-tunes of one base, read in one precision"
        )


def _base(model: dict[str, Any]) -> str:
    return f"{model['name']} ({model['dtype']}, sha256 {model['sha256'][:12]})"
