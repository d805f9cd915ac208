"""The folder in which one run grows, and from which an interrupted one goes on.

A run is built in ``DIR.partial``, which becomes ``DIR`` when it is complete; so no directory looks
finished that is not. In ``DIR.partial/march`` stand the streams and what each passed block gave, in
``DIR.partial/replacement`` what each compared candidate gave. A process that is killed at any
moment leaves the last finished block and candidate, from which any number of processes go on.
"""

import json
import os
import shutil
from collections.abc import Iterator, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from toolkit.adapters.adapter import Adapter
from toolkit.adapters.linear import Linear
from toolkit.adapters.vector import FixedVector
from toolkit.diagnosis.block_statistics import BlockStatistics
from toolkit.diagnosis.survey import BlockResult, Recipe
from toolkit.errors import InputError
from toolkit.runtime.processes import ALONE, Processes
from toolkit.runtime.records import write_json

REQUEST = "request.json"


@dataclass
class Workspace:
    """One run's folder. `request` identifies the run: the same one goes on."""

    out: Path
    request: dict[str, Any]
    keep_statistics: bool = False
    processes: Processes = ALONE

    @property
    def folder(self) -> Path:
        return self.out.with_name(f"{self.out.name}.partial")

    @property
    def streams(self) -> Path:
        """Where the march's streams are mapped."""
        return self.folder / "march"

    @property
    def outcomes(self) -> "TensorFolder":
        """What the compared candidates gave."""
        return TensorFolder(self.folder / "replacement")

    def open(self) -> bool:
        """Make the folder, or go on in one that the same request left; true if there was one."""
        return self.processes.from_first(self._open)

    def finished(self, survey: BlockResult) -> None:
        """A block is passed, and every stream is behind it: the run can go on from here."""
        self.processes.wait()
        self.processes.from_first(lambda: self._keep_block(survey))

    def passed(self) -> list[BlockResult]:
        """The blocks that were passed already."""
        if not self._progress.is_file():
            return []
        return [self._block(layer) for layer in range(json.loads(self._progress.read_text()))]

    def keep(self, layer: int, sums: BlockStatistics) -> None:
        """Keep a block's statistics, where the run is to."""
        if self.keep_statistics and self.processes.first:
            folder = self.folder / "statistics"
            folder.mkdir(exist_ok=True)
            branches = {"branches": ",".join(sums.branches)}
            _write(sums.state(), folder / f"block-{layer:04}.safetensors", branches)

    def close(self) -> None:
        """The run is complete: give the folder its name, in place of an earlier run's.

        Killed on the way, the same request finds all it needs in one folder or the other.
        """
        replaced = self.out.with_name(f"{self.out.name}.replaced")
        if self.out.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            self.out.rename(replaced)
        self.folder.rename(self.out)
        for name in (self.streams.name, self.outcomes.folder.name):
            shutil.rmtree(self.out / name)
        (self.out / REQUEST).unlink()
        shutil.rmtree(replaced, ignore_errors=True)

    def abandon(self) -> None:
        """Remove the folder: the input was bad."""
        if self.processes.first:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _progress(self) -> Path:
        return self.streams / "passed.json"

    def _open(self) -> bool:
        known = self.folder / REQUEST
        if known.is_file() and json.loads(known.read_text()) == json.loads(
            json.dumps(self.request)
        ):
            return self._progress.is_file()
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in (self.streams, self.outcomes.folder):
            folder.mkdir(parents=True)
        write_json(self.request, known)
        return False

    def _keep_block(self, survey: BlockResult) -> None:
        stem = self.streams / f"block-{survey.layer:04}"
        adapters = [asdict(recipe) for recipe in survey.adapters]
        write_json({"rows": survey.rows, "adapters": adapters}, stem.with_suffix(".json"))
        tensors = {
            f"{recipe.name}|{name}": parameter.detach().contiguous()
            for recipe, adapter in survey.adapters.items()
            for name, parameter in adapter.named_parameters()
        }
        _write(tensors, stem.with_suffix(".safetensors"))
        write_json(survey.layer + 1, self._progress)

    def _block(self, layer: int) -> BlockResult:
        stem = self.streams / f"block-{layer:04}"
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
        return BlockResult(layer, kept["rows"], adapters)


@dataclass(frozen=True)
class TensorFolder(MutableMapping[str, dict[str, Tensor]]):
    """Named groups of tensors, a safetensors file each, written whole or not at all."""

    folder: Path

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        path = self._path(name)
        if not path.is_file():
            raise KeyError(name)
        return load_file(path)

    def __setitem__(self, name: str, tensors: dict[str, Tensor]) -> None:
        _write({key: tensor.contiguous() for key, tensor in tensors.items()}, self._path(name))

    def __delitem__(self, name: str) -> None:
        self._path(name).unlink()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self.folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def refuse_existing(out: Path, overwrite: bool) -> None:
    """A finished run is not overwritten unless asked; another folder never is."""
    if not out.exists():
        return
    is_run = (out / RUN).is_file()
    if not is_run and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not a run: give --out another name")
    if is_run and not overwrite:
        raise InputError(f"{out} holds a finished run: give another --out, or --overwrite")


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    unfinished = path.with_suffix(".new")
    save_file(tensors, unfinished, metadata)
    os.replace(unfinished, path)


RUN = "run.json"


def read_statistics(folder: Path) -> dict[int, BlockStatistics]:
    """Each block's sums that a run with ``--keep-statistics`` left, by layer; empty without."""
    found = {}
    for path in sorted((folder / "statistics").glob("block-*.safetensors")):
        with safe_open(path, "pt") as file:
            branches = tuple(file.metadata()["branches"].split(","))
        found[int(path.stem.split("-")[1])] = BlockStatistics.from_state(branches, load_file(path))
    return found
