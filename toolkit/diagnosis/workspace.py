"""The folder in which one run grows, and from which an interrupted one goes on.

A run is built in ``DIR.partial``, which becomes ``DIR`` when it is complete; so no directory looks
finished that is not. In ``DIR.partial/march`` stand the streams and what each passed block gave, in
``DIR.partial/replacement`` what each compared candidate gave. A process that is killed at any
moment leaves the last finished block and candidate, from which any number of processes go on.
"""

import json
import shutil
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from toolkit.diagnosis.block_statistics import BlockStatistics
from toolkit.diagnosis.options import Options
from toolkit.documents.corpus import Corpus
from toolkit.errors import InputError
from toolkit.evaluation.rank_search import KeptRound
from toolkit.fitting.block_result import KeptMarch
from toolkit.models.pair import ModelPair
from toolkit.runtime.console import errors
from toolkit.runtime.output import LOCK, lock, require_writable, unlock
from toolkit.runtime.processes import ALONE, Processes
from toolkit.runtime.records import write_json, write_tensors

REQUEST, RUN = "request.json", "run.json"


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
    def march(self) -> KeptMarch:
        """The march of the diagnosis."""
        return KeptMarch(self.folder / "march", self.processes)

    @property
    def outcomes(self) -> "TensorFolder":
        """Tell what the compared candidates gave."""
        return TensorFolder(self.folder / "replacement")

    def outcomes_of(self, name: str) -> "TensorFolder":
        """Return where candidates that are compared later keep what they gave."""
        folder = TensorFolder(self.outcomes.folder / name)
        self.processes.from_first(lambda: folder.folder.mkdir(exist_ok=True))
        return folder

    @property
    def distilled(self) -> Path:
        """The folder of adapters that are distilled, with their checkpoints."""
        return self.folder / "distilled"

    def search_round(self, name: str) -> KeptRound:
        """One round of the search for the smallest ranks."""
        folder = self.folder / "search" / name
        march = KeptMarch(folder / "march", self.processes)
        march.open()
        outcomes = TensorFolder(folder / "outcomes")
        self.processes.from_first(lambda: outcomes.folder.mkdir(exist_ok=True))
        return KeptRound(march, outcomes)

    def open(self) -> bool:
        """Make the folder, or go on in one that the same request left; true if there was one."""
        return self.processes.from_first(self._open)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep the folder open for a run, and say so where it goes on from an interrupted one.

        Bad input removes the folder; whatever else ends the run leaves it for the same request.
        """
        if self.open() and self.processes.first:
            errors.print(f"going on from the interrupted run in {self.folder}")
        try:
            yield
        except InputError:
            self.remove()
            raise
        except BaseException:
            self.release()
            raise

    def keep(self, layer: int, sums: BlockStatistics) -> None:
        """Keep a block's statistics, where the run is to."""
        if self.keep_statistics and self.processes.first:
            folder = self.folder / "statistics"
            folder.mkdir(exist_ok=True)
            branches = {"branches": ",".join(sums.branches)}
            write_tensors(sums.state(), folder / f"block-{layer:04}.safetensors", branches)

    def close(self) -> None:
        """Give the folder of a complete run its name, in place of an earlier run's.

        Killed on the way, the same request finds all it needs in one folder or the other.
        """
        replaced = self.out.with_name(f"{self.out.name}.replaced")
        unlock(self.folder)
        if (self.out / RUN).is_file():
            shutil.rmtree(replaced, ignore_errors=True)
            self.out.rename(replaced)
        if self.out.is_dir():  # an empty one, which somebody may be in
            for path in sorted(self.folder.iterdir(), key=lambda path: path.name == RUN):
                path.rename(self.out / path.name)
            self.folder.rmdir()
        else:
            self.folder.rename(self.out)
        for folder in (
            self.march.folder,
            self.outcomes.folder,
            self.folder / "search",
            self.distilled,
        ):
            shutil.rmtree(self.out / folder.name, ignore_errors=True)
        (self.out / REQUEST).unlink()
        shutil.rmtree(replaced, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder: the input was bad, or nothing in it is needed any more."""
        if self.processes.first:
            self.release()
            shutil.rmtree(self.folder, ignore_errors=True)

    def release(self) -> None:
        """Let another run have the folder."""
        unlock(self.folder)

    def _open(self) -> bool:
        require_writable(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        lock(self.folder)
        known = self.folder / REQUEST
        if known.is_file() and json.loads(known.read_text()) == json.loads(
            json.dumps(self.request)
        ):
            return self.march.started
        for path in self.folder.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for folder in (self.march.folder, self.outcomes.folder):
            folder.mkdir(parents=True)
        write_json(self.request, known)
        return False


@dataclass(frozen=True)
class TensorFolder(MutableMapping[str, dict[str, Tensor]]):
    """Named groups of tensors, a safetensors file each, written whole or not at all."""

    folder: Path

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        path = self._path(name)
        if not path.is_file():
            raise KeyError(name)
        return load_file(path)

    def __contains__(self, name: object) -> bool:
        return self._path(str(name)).is_file()  # which need not be read for it

    def __setitem__(self, name: str, tensors: dict[str, Tensor]) -> None:
        write_tensors(
            {key: tensor.contiguous() for key, tensor in tensors.items()}, self._path(name)
        )

    def __delitem__(self, name: str) -> None:
        self._path(name).unlink()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self.folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


@contextmanager
def working_in(
    place: Workspace | str | Path | None,
    pair: ModelPair,
    corpus: Corpus,
    options: Options,
    processes: Processes = ALONE,
) -> Iterator[Workspace | None]:
    """Yield a run's workspace: none, an open one that is somebody's, or one at the path `place`.

    The one at a path is identified by what is read and by `options`, and removed when the run is
    complete.
    """
    if place is None or isinstance(place, Workspace):
        yield place
        return
    base, tuned = pair.hashes
    request = {"base": base, "tuned": tuned, "data": corpus.sha256, "options": vars(options)}
    own = Workspace(Path(place).resolve(), request, processes=processes)
    with own.opened():
        yield own
    own.remove()


def refuse_existing(out: Path, overwrite: bool) -> None:
    """A finished run is not overwritten unless asked; another folder never is."""
    require_writable(out)
    if not out.exists():
        return
    is_run = (out / RUN).is_file()
    if not is_run and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not a run: give --out another name")
    if is_run and not overwrite:
        raise InputError(f"{out} holds a finished run: give another --out, or --overwrite")


def read_statistics(folder: Path) -> dict[int, BlockStatistics]:
    """Each block's sums that a run with ``--keep-statistics`` left, by layer; empty without."""
    return {layer: read_block(path) for layer, path in kept_blocks(folder).items()}


def kept_blocks(folder: Path) -> dict[int, Path]:
    """Return the files of the blocks' sums that the run in `folder` kept, by layer."""
    paths = sorted((folder / "statistics").glob("block-*.safetensors"))
    return {int(path.stem.split("-")[1]): path for path in paths}


def read_block(path: Path) -> BlockStatistics:
    """Return one block's sums."""
    with safe_open(path, "pt") as file:
        branches = tuple(file.metadata()["branches"].split(","))
    return BlockStatistics.from_state(branches, load_file(path))
