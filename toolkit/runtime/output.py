"""Folders and files that commands write: nothing that a command did not make is overwritten."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolkit.errors import InputError
from toolkit.runtime.records import write_json

LOCK = "lock"


def own_folder(out: Path, *records: str) -> Path:
    """Return `out`, links resolved, as a folder that a command may write, before it does any work.

    It is new, empty, or holds one of the `records` that the command leaves. Raises InputError
    where it is anything else, or cannot be written.
    """
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give --out the name of a folder")
    made = any((out / record).exists() for record in records)
    if out.is_dir() and any(out.iterdir()) and not made:
        raise InputError(
            f"{out} holds files that this command did not make (no {records[0]}): give --out "
            "another name"
        )
    require_writable(out)
    return out


def seen_from(out: Path, source: str | Path) -> str:
    """Return the path `source` as it is seen from the folder `out`; what is no path stays."""
    path = Path(source)
    return os.path.relpath(path.resolve(), out.resolve()) if path.exists() else str(source)


@contextmanager
def made_whole(out: Path, record: str) -> Iterator[None]:
    """Make the folder `out`; where what writes into it fails, nothing is left in it.

    `own_folder` would refuse a folder without its `record` the next time. What has one already, of
    an earlier result, stays.
    """
    known, there = (out / record).exists(), out.is_dir()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if not known:
            shutil.rmtree(out)
            if there:
                out.mkdir()
        raise


def own_file(out: Path, begins: str) -> None:
    """Raise InputError where `out` is a file that does not begin as the command's own files do."""
    if out.is_dir():
        raise InputError(f"{out} is a folder: give --out the name of a file")
    if out.is_file() and out.stat().st_size:
        with out.open("rb") as file:
            if file.read(len(begins.encode())) != begins.encode():
                raise InputError(
                    f"{out} was not made by this command, and is left as it is: give --out another "
                    "name"
                )
    require_writable(out.parent)


def require_writable(folder: Path) -> None:
    """Raise InputError unless a file can be made in `folder`, or in what it will be made in."""
    folder = folder.absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"{folder} cannot be made: {there} is a file")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"{there} cannot be written: {error.strerror}") from error


def own_request(path: Path, asked: dict[str, Any]) -> None:
    """Keep the request `asked` in `path`, whose folder is made, before its runs are kept there.

    Raises InputError where runs of another request are there.
    """
    if path.is_file() and json.loads(path.read_text("utf-8")) != json.loads(json.dumps(asked)):
        raise InputError(
            f"{path.parents[1]} holds runs of another request ({path}): choose another --out"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(asked, path)


def lock(folder: Path) -> None:
    """Lock `folder`, which is there, against other processes until `unlock`, or until this ends.

    Raises InputError, with the process that holds it, where another one does.
    """
    path = folder / LOCK
    if path in _held:
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        holder = path.read_text().strip() or "unknown"
        raise InputError(
            f"process {holder} is writing to {folder}: wait until it has ended, or give another "
            "--out"
        ) from error
    os.truncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    _held[path] = descriptor


def unlock(folder: Path) -> None:
    """Let other processes have `folder`."""
    descriptor = _held.pop(folder / LOCK, None)
    if descriptor is not None:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)


_held: dict[Path, int] = {}  # locks of this process
