"""Finished runs beside each other: what `oracle compare` finds and writes."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from toolkit.runs.comparison import SPECS, RunComparison
from toolkit.runs.finished import FinishedRun, read_runs
from toolkit.runs.overlap import overlap_rows
from toolkit.runs.page import render
from toolkit.runs.recovery import recovery_rows
from toolkit.runs.transfer import transfer_rows
from toolkit.runtime.output import made_whole, own_folder
from toolkit.runtime.provenance import stamp
from toolkit.runtime.records import write_json
from toolkit.tables import drawing as draw

RECORD, PAGE = "compare.json", "compare.html"


def compare_runs(
    folders: Sequence[str | Path],
    *,
    with_transfer: bool = False,
    device: str = "cpu",
    show_progress: bool = True,
) -> RunComparison:
    """Put the finished runs in `folders` beside each other; they must be of one base model.

    `with_transfer` also judges each run's adapters on every run's prompts, with the models on
    `device`. Raises InputError for fewer than two runs, unfinished ones, and ones of other bases.
    """
    started = time.perf_counter()
    runs = read_runs(folders)
    parts = [recovery_rows(runs), overlap_rows(runs, show_progress)]
    parts.append(transfer_rows(runs, device, show_progress) if with_transfer else ([], []))
    recovery, overlap, transfer = (
        pd.DataFrame(rows, columns=list(spec.columns))
        for spec, (rows, _) in zip(SPECS, parts, strict=True)
    )
    left_out = [reason for _, reasons in parts for reason in reasons]
    return RunComparison(runs, recovery, overlap, transfer, left_out, stamp(started))


def write_comparison(found: RunComparison, folder: str | Path) -> None:
    """Write tables, figures, ``compare.html`` and ``compare.json`` into `folder`.

    Raises InputError where the folder holds files that are not a comparison's.
    """
    folder = own_folder(Path(folder), RECORD)
    with made_whole(folder, RECORD):
        _write(found, folder)


def _write(found: RunComparison, folder: Path) -> None:
    figures_folder = folder / "figures"
    figures_folder.mkdir(exist_ok=True)
    figures = {}
    for spec in SPECS:  # of an earlier comparison that had more
        (folder / f"{spec.name}.csv").unlink(missing_ok=True)
        for suffix in (".svg", ".png"):
            (figures_folder / f"{spec.name}{suffix}").unlink(missing_ok=True)
    for spec, frame in found.tables:
        frame.to_csv(folder / f"{spec.name}.csv", index=False, lineterminator="\n")
        svg, _ = draw.save(spec.plot(frame), figures_folder / spec.name)
        figures[spec.name] = svg.read_text("utf-8")
    (folder / PAGE).write_text(render(found, figures), "utf-8")
    record = {
        "base": found.runs[0].info["base"],
        "runs": {run.name: _described(run) for run in found.runs},
        "tables": [f"{spec.name}.csv" for spec, _ in found.tables],
        "findings": found.findings,
        "left_out": found.left_out,
        "made": found.made,
    }
    write_json(record, folder / RECORD)


def _described(run: FinishedRun) -> dict[str, Any]:
    info = run.info
    return {
        "folder": str(run.folder),
        "tuned": info["tuned"],
        "data": {name: info["data"].get(name) for name in ("file", "sha256")},
        "options": info["options"],
        "versions": info["versions"],
        "commit": info["commit"],
    }
