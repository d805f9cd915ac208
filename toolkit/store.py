"""Runs on disk: tables, what an interrupted run left, and statistics kept for later analyses.

A run is built in ``DIR.partial``, which becomes ``DIR`` when it is complete; so no directory looks
finished that is not. In ``DIR.partial/march`` stands what a second start goes on from.
"""

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from toolkit.errors import InputError
from toolkit.lockstep import March
from toolkit.steering import Adapter, FixedVector, Linear
from toolkit.survey import BlockSums, BlockSurvey, Recipe
from toolkit.table import COLUMNS, Table

REQUEST, RUN, REPORT = "request.json", "run.json", "report.json"


@dataclass
class Workspace:
    """The folder in which one run grows. `request` identifies it: the same one goes on."""

    out: Path
    request: dict[str, Any]
    keep_statistics: bool = False

    @property
    def folder(self) -> Path:
        return self.out.with_name(f"{self.out.name}.partial")

    @property
    def _march(self) -> Path:
        return self.folder / "march"

    def open(self) -> bool:
        """Make the folder, or go on in one that the same request left; true if there was one."""
        known = self.folder / REQUEST
        if known.is_file() and json.loads(known.read_text()) == _jsonable(self.request):
            return (self._march / "streams.safetensors").is_file()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._march.mkdir(parents=True)
        write_json(self.request, known)
        return False

    def finished(self, survey: BlockSurvey, march: March) -> None:
        """Keep a block and the streams behind it: the run can go on from here."""
        stem = self._march / f"block-{survey.layer:04}"
        adapters = [asdict(recipe) for recipe in survey.adapters]
        write_json({"rows": survey.rows, "adapters": adapters}, stem.with_suffix(".json"))
        tensors = {
            f"{recipe.name}|{name}": parameter.detach().contiguous()
            for recipe, adapter in survey.adapters.items()
            for name, parameter in adapter.named_parameters()
        }
        save_file(tensors, stem.with_suffix(".safetensors"))
        streams = self._march / "streams.safetensors"
        unfinished = streams.with_suffix(".new")
        save_file(march.state(), unfinished, {"next_layer": str(survey.layer + 1)})
        os.replace(unfinished, streams)

    def resume(self, march: March) -> list[BlockSurvey]:
        """Set `march` to where the interrupted run stopped; the blocks passed so far."""
        path = self._march / "streams.safetensors"
        if not path.is_file():
            return []
        with safe_open(path, "pt") as file:
            next_layer = int(file.metadata()["next_layer"])
        march.restore(next_layer, load_file(path))
        return [self._block(layer) for layer in range(next_layer)]

    def keep(self, layer: int, sums: BlockSums) -> None:
        """Keep a block's statistics, where the run is to."""
        if self.keep_statistics:
            folder = self.folder / "statistics"
            folder.mkdir(exist_ok=True)
            branches = {"branches": ",".join(sums.branches)}
            save_file(sums.state(), folder / f"block-{layer:04}.safetensors", branches)

    def close(self) -> None:
        """The run is complete: give the folder its name, in place of an earlier run's."""
        shutil.rmtree(self._march)
        (self.folder / REQUEST).unlink()
        if self.out.exists():
            shutil.rmtree(self.out)
        self.folder.rename(self.out)

    def abandon(self) -> None:
        """Remove the folder: the input was bad."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _block(self, layer: int) -> BlockSurvey:
        stem = self._march / f"block-{layer:04}"
        kept = json.loads(stem.with_suffix(".json").read_text())
        tensors = load_file(stem.with_suffix(".safetensors"))
        adapters: dict[Recipe, Adapter] = {}
        for fields in kept["adapters"]:
            recipe = Recipe(**fields)
            parts = {
                key.split("|")[1]: tensor
                for key, tensor in tensors.items()
                if key.split("|")[0] == recipe.name
            }
            adapters[recipe] = (
                FixedVector(parts["bias"])
                if recipe.rank == 0
                else Linear(parts["up"], parts.get("down"), parts["bias"])
            )
        return BlockSurvey(layer, kept["rows"], adapters)


def refuse_existing(out: Path, overwrite: bool) -> None:
    """A finished run is not overwritten unless asked; another folder never is."""
    if not out.exists():
        return
    is_run = (out / RUN).is_file()
    if not is_run and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not a run: give --out another name")
    if is_run and not overwrite:
        raise InputError(f"{out} holds a finished run: give another --out, or --overwrite")


def read_statistics(folder: Path) -> dict[int, BlockSums]:
    """Each block's sums that a run with ``--keep-statistics`` left, by layer; empty without."""
    found = {}
    for path in sorted((folder / "statistics").glob("block-*.safetensors")):
        with safe_open(path, "pt") as file:
            branches = tuple(file.metadata()["branches"].split(","))
        found[int(path.stem.split("-")[1])] = BlockSums.from_state(branches, load_file(path))
    return found


def write_tables(tables: list[Table], folder: Path) -> None:
    """One CSV file a table, UTF-8, floats exact."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        table.frame.to_csv(folder / f"{table.name}.csv", index=False, lineterminator="\n")


def read_tables(folder: str | Path) -> dict[str, Table]:
    """The tables of a run's ``tables`` folder."""
    return {name: read_table(folder, name) for name in COLUMNS}


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


def _jsonable(content: Any) -> Any:
    return json.loads(json.dumps(content))
