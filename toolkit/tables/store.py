"""Tables on disk: one CSV file a table, floats exact."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from toolkit.errors import InputError
from toolkit.tables.table import COLUMNS, Table


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
    return {n: read_table(folder, n) if n in must else Table.absent(n) for n in COLUMNS}


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
