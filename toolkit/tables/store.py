"""Tables on disk: one CSV file a table, floats exact."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from toolkit.errors import InputError
from toolkit.tables.frames import WORDS, cleaned
from toolkit.tables.spec import specs
from toolkit.tables.table import Table


def write_tables(tables: Iterable[Table], folder: Path) -> None:
    """One CSV file a table that was measured, UTF-8, floats exact."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        if table.measured:
            table.frame.to_csv(folder / f"{table.name}.csv", index=False, lineterminator="\n")


def read_tables(folder: str | Path, written: Iterable[str] = ()) -> dict[str, Table]:
    """Return the tables of a run's ``tables`` folder.

    Those that came into being after the run are empty and not `measured`. `written` names tables
    that the run is known to have had: they must be there.
    """
    there = {name for name in specs() if (Path(folder) / f"{name}.csv").is_file()}
    must = there | set(written) or set(specs())
    return {n: read_table(folder, n) if n in must else Table.absent(n) for n in specs()}


def read_table(folder: str | Path, name: str) -> Table:
    """One table of a run's ``tables`` folder."""
    path = Path(folder) / f"{name}.csv"
    if not path.is_file():
        raise InputError(f"{folder} has no {name}.csv: expected the tables of a finished run")
    frame = cleaned(_parsed(path))
    for column in specs()[name].columns:
        if column in WORDS and column not in frame:  # that came into being after the run
            frame[column] = ""
    return Table(name, frame)


def _parsed(path: Path) -> pd.DataFrame:
    """Read numbers as Python does, to the last bit; not every version of pandas does so."""
    words = pd.read_csv(path, dtype=str, keep_default_na=False)
    return pd.DataFrame({name: _typed(words[name]) for name in words})


def _typed(words: pd.Series) -> pd.Series:
    """Return whole numbers, numbers (NaN where empty), or words (NaN where empty)."""
    for kind in (int, float):
        try:
            numbers = [kind(word) if word or kind is int else float("nan") for word in words]
        except ValueError:
            continue
        return pd.Series(numbers, words.index, dtype="int64" if kind is int else "float64")
    return words.where(words != "", float("nan")).astype(object)
