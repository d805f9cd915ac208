"""From a run to the files that the main command leaves, and back."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from toolkit.adapters.collection import Adapters
from toolkit.diagnosis.run import Run
from toolkit.diagnosis.survey import analyse
from toolkit.diagnosis.workspace import RUN, read_statistics, refuse_existing
from toolkit.errors import InputError
from toolkit.evaluation.rank_search import RankSearch
from toolkit.report import page as report
from toolkit.report.next_steps import moved
from toolkit.report.origin import origin
from toolkit.runtime.check import Check
from toolkit.runtime.output import made_whole
from toolkit.runtime.records import write_json
from toolkit.tables import drawing as draw
from toolkit.tables.store import read_tables, write_tables
from toolkit.tables.table import Table

RANK_SET = "rank_set"


def publish(run: Run, folder: Path) -> None:
    """Write tables, figures, adapters, ``run.json``, ``report.json`` and ``report.html``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(run.tables.values(), folder / "tables")
    if run.adapters:
        said = {**run.adapters.info, **origin(run)}
        replace(run.adapters, info=said).save_pretrained(folder / "adapters")
    if run.rank_search:
        save_rank_set(run.rank_search, folder / RANK_SET)
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    for table in run.tables.values():
        draw.save(table.plot(run.noise), figures / table.name)
    drawn = {name: (figures / f"{name}.svg").read_text("utf-8") for name in run.tables}
    (folder / "report.html").write_text(report.render(run, drawn), "utf-8")
    write_json({**report.summary(run), "run": _kept(run)}, folder / REPORT)
    write_json(run.info, folder / RUN)


def republish(run: Run, source: Path, out: Path, overwrite: bool) -> None:
    """Publish what `read_run` read from `source`: there anew, or in another folder.

    Raises InputError where the other folder is not empty, or, unless `overwrite`, holds a run.
    """
    source, out = source.resolve(), out.resolve()
    if source != out:
        refuse_existing(out, overwrite)
        if source.is_relative_to(out):
            raise InputError(f"{out} holds the run that is redone: give --out another name")
        if (out / RUN).is_file():
            shutil.rmtree(out)  # what is left of another run would pass for this one's
        if paths := run.info.get("paths"):
            run.info["paths"] = {name: moved(path, source, out) for name, path in paths.items()}
    with made_whole(out, RUN):
        publish(run, out)


def read_run(folder: Path) -> Run:
    """The run that `publish` wrote. Where its statistics were kept, they are analysed anew."""
    if not (folder / RUN).is_file():
        raise InputError(f"{folder} is not a finished run: it has no {RUN}")
    said = json.loads((folder / REPORT).read_text("utf-8"))
    kept = said["run"]
    adapters = (
        Adapters.from_pretrained(folder / "adapters") if (folder / "adapters").is_dir() else None
    )
    tables = read_tables(folder / "tables", said["tables"])
    return Run(
        tables={**tables, **_redone(folder)},
        recommendation=kept["recommendation"],
        adapters=adapters,
        samples=kept["samples"],
        checks=[Check(**fields) for fields in kept["checks"]],
        info=json.loads((folder / RUN).read_text("utf-8")),
        rank_search=load_rank_set(folder / RANK_SET) if (folder / RANK_SET).is_dir() else None,
    )


def save_rank_set(found: RankSearch, folder: Path) -> None:
    """Write ``ranks.json``, ``tried.csv`` and, where ranks were found, ``adapters``."""
    folder.mkdir(exist_ok=True)
    write_json({"max_kl": found.max_kl, "ranks": found.ranks}, folder / "ranks.json")
    found.tried.to_csv(folder / "tried.csv", index=False, lineterminator="\n")
    if found.adapters:
        found.adapters.save_pretrained(folder / "adapters")


def load_rank_set(folder: Path) -> RankSearch:
    """Return what `save_rank_set` wrote."""
    kept = json.loads((folder / "ranks.json").read_text("utf-8"))
    adapters = (
        Adapters.from_pretrained(folder / "adapters") if (folder / "adapters").is_dir() else None
    )
    tried = pd.read_csv(folder / "tried.csv", dtype={"ranks": str}).fillna({"ranks": ""})
    ranks = None if kept["ranks"] is None else tuple(kept["ranks"])
    return RankSearch(kept["max_kl"], ranks, adapters, tried)


def _redone(folder: Path) -> dict[str, Table]:
    """Return the tables that statistics alone give: norms, spectrum and linear fit."""
    blocks = [analyse(layer, sums) for layer, sums in read_statistics(folder).items()]
    names = blocks[0].rows if blocks else ()
    return {name: Table.of(name, [row for b in blocks for row in b.rows[name]]) for name in names}


def _kept(run: Run) -> dict:
    """Return what a run holds beside its tables, adapters and ``run.json``."""
    return {
        "recommendation": run.recommendation,
        "samples": run.samples,
        "checks": [asdict(check) for check in run.checks],
    }


REPORT = "report.json"
