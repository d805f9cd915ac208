"""Finished runs on disk: tables, JSON, and statistics that were kept for later analyses."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import safe_open
from safetensors.torch import load_file

from toolkit.block_sums import BlockSums
from toolkit.errors import InputError
from toolkit.table import COLUMNS, Table

RUN, REPORT = "run.json", "report.json"


def read_statistics(folder: Path) -> dict[int, BlockSums]:
    """Each block's sums that a run with ``--keep-statistics`` left, by layer; empty without."""
    found = {}
    for path in sorted((folder / "statistics").glob("block-*.safetensors")):
        with safe_open(path, "pt") as file:
            branches = tuple(file.metadata()["branches"].split(","))
        found[int(path.stem.split("-")[1])] = BlockSums.from_state(branches, load_file(path))
    return found


def write_tables(tables: list[Table], folder: Path) -> None:
    """One CSV file a table that was measured, UTF-8, floats exact."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        if table.measured:
            table.frame.to_csv(folder / f"{table.name}.csv", index=False, lineterminator="\n")


def read_tables(folder: str | Path, written: Iterable[str] = ()) -> dict[str, Table]:
    """The tables of a run's ``tables`` folder.

    Those that came into being after the run are empty and not `measured`. `written` names tables
    that the run is known to have had: they must be there.
    """
    there = {name for name in COLUMNS if (Path(folder) / f"{name}.csv").is_file()}
    must = there | set(written) or set(COLUMNS)
    return {n: read_table(folder, n) if n in must else Table.missing(n) for n in COLUMNS}


def read_table(folder: str | Path, name: str) -> Table:
    """One table of a run's ``tables`` folder."""
    path = Path(folder) / f"{name}.csv"
    if not path.is_file():
        raise InputError(f"{folder} has no {name}.csv: expected the tables of a finished run")
    return Table(name, _read_csv(path))


def _read_csv(path: Path) -> pd.DataFrame:
    frame = pd.read_csv(path, keep_default_na=False, na_values=[""], float_precision="round_trip")
    for name in ("rank", "layers"):  # numbers beside "full" and "all"
        if name in frame:
            frame[name] = frame[name].map(_number).astype(object)
    for name in ("location", "fit"):
        if name in frame:
            frame[name] = frame[name].fillna("")
    return frame


def _number(value: Any) -> Any:
    try:
        return int(float(value))
    except (TypeError, ValueError):
        return None if isinstance(value, float) else value


def write_json(content: Any, path: Path) -> None:
    """Indented UTF-8 JSON, written whole or not at all; numbers that are not finite are null."""
    unfinished = path.with_name(f"{path.name}.new")
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    unfinished.write_text(text + "\n", "utf-8")
    os.replace(unfinished, path)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
