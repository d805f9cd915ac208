"""Programs in processes of their own that begin with the toolkit imported.

Importing takes longer than most that tests run. One process does it, when a test first asks, and
forks for every program.
"""

import functools
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support.pictures import save_blank
from toolkit.tables import drawing

ROOT = Path(__file__).parents[2]
PRELOADED = ["toolkit.cli.main", "interp_engine.model", "tests.support.forked"]


@functools.cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT)}):
        forkserver.ensure_running()
    return context


def start(
    program: Callable[..., None],
    *words: str,
    folder: Path = ROOT,
    environment: dict[str, str] | None = None,
    said: tuple[str, str] = (os.devnull, os.devnull),
) -> Any:
    """Start `program` in `folder`, in a session of its own; `said` are files for what it prints."""
    task = (program, words, folder, environment or {}, said)
    process = _context().Process(target=_begin, args=task)
    process.start()
    return process


def run(program: Callable[..., None], *words: str, **place: Any) -> Any:
    """Run `program` to its end; what ``subprocess.run`` gives of it."""
    with tempfile.TemporaryDirectory() as folder:
        said = (f"{folder}/stdout", f"{folder}/stderr")
        process = start(program, *words, said=said, **place)
        process.join(300)
        assert process.exitcode is not None, Path(said[1]).read_text()
        printed = (Path(file).read_text() for file in said)
        return subprocess.CompletedProcess(words, process.exitcode, *printed)


def module(name: str, *words: str) -> None:
    """Run ``python -m name words``."""
    sys.argv = [name, *words]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def code(text: str, *words: str) -> None:
    """Run ``python -c text words``."""
    sys.argv = ["-c", *words]
    exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})


def kernel(*words: str) -> None:
    """Run ``python -m ipykernel_launcher words``; what is saved of a run has blank pictures."""
    from ipykernel.kernelapp import launch_new_instance

    drawing.save = save_blank
    launch_new_instance(argv=list(words))


class Kernel:
    """A kernel's process, with what Jupyter asks of one that it started itself."""

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], env: dict[str, str], cwd: str, **_: Any) -> None:
        words = command[command.index("-f") :]
        self._process = start(kernel, *words, folder=Path(cwd), environment=env)
        self.pid = self._process.pid
        while os.getpgid(self.pid) != self.pid:  # signals go to the group, which is not yet its own
            time.sleep(0.001)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def forked_kernels() -> Any:
    """While this is entered, kernels that Jupyter starts are forked."""
    return mock.patch("jupyter_client.provisioning.local_provisioner.launch_kernel", Kernel)


def _begin(
    program: Callable[..., None],
    words: tuple[str, ...],
    folder: Path,
    environment: dict[str, str],
    said: tuple[str, str],
) -> None:
    """Become a process as if it were started by itself, and run `program`."""
    gc.freeze()  # as in the conftest
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    for number, name in enumerate(said, 1):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    program(*words)
