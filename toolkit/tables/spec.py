"""Everything about one table in one place, and the registry of all tables.

A table is one file of ``toolkit/tables/specs``; its `SPEC` is found by the folder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

FOLDER = Path(__file__).parent / "specs"


@dataclass(frozen=True)
class TableSpec:
    """Hold what a table holds, how it is read, what it draws and what it says.

    `columns` gives each column's meaning with its unit, in the contract's order. `reading` says
    how to read the figure. `plot` takes the frame, `finding` turns it into a sentence. `place` is
    the table's place in the report. A plot that `draws_noise` also takes the table ``noise``.
    """

    name: str
    title: str
    reading: str
    columns: dict[str, str]
    plot: Callable[..., Any]
    finding: Callable[[pd.DataFrame], str]
    place: int
    draws_noise: bool = False


@cache
def specs() -> dict[str, TableSpec]:
    """Find every table's spec, by name, in the report's order."""
    names = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
    found = [import_module(f"toolkit.tables.specs.{name}").SPEC for name in names]
    return {spec.name: spec for spec in sorted(found, key=_order)}


def register(spec: TableSpec) -> None:
    """Add `spec` to the tables of every run, at its place in the report's order."""
    known = specs()
    ordered = sorted([*known.values(), spec], key=_order)
    known.clear()
    known.update({entry.name: entry for entry in ordered})


def unregister(name: str) -> None:
    """Take the spec of the table `name` out of the registry."""
    del specs()[name]


def _order(spec: TableSpec) -> tuple[int, str]:
    return spec.place, spec.name
