"""Where numbers come from: versions, commit, machine, and what each stage took."""

import platform
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from toolkit.runtime.heap import release_freed


@dataclass
class Stages:
    """Seconds and peak memory of each stage."""

    figures: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, which begins with what earlier ones freed given back."""
        started = time.perf_counter()
        release_freed()
        yield
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the process so far
        seconds = time.perf_counter() - started
        self.figures[name] = {"seconds": round(seconds, 2), "peak_memory_bytes": peak}


def machine() -> str:
    """Return the processor's kind, and how many threads torch uses."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def stamp(started: float) -> dict[str, Any]:
    """For a record: seconds since `started` (of ``time.perf_counter``), and what it was made by."""
    return {
        "seconds": round(time.perf_counter() - started),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on."""
    names = ("oracle-toolkit", "torch", "transformers", "peft", "interp-engine", "numpy", "pandas")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """Return the commit that the package runs from, where it runs from a checkout of its own."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None
