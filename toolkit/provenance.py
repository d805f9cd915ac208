"""Where numbers come from: versions, models, data, options, time and memory."""

import platform
import resource
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from toolkit.documents import Batch, Encoded
from toolkit.pair import ModelPair
from toolkit.run import Options


@dataclass
class Stages:
    """Seconds and peak memory of each stage."""

    figures: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the process so far
        seconds = time.perf_counter() - started
        self.figures[name] = {"seconds": round(seconds, 2), "peak_memory_bytes": peak}


def describe_run(
    pair: ModelPair,
    options: Options,
    encoded: Sequence[Encoded],
    batches: list[Batch],
    prompts: Sequence[Any],
    stages: Stages,
    noise: dict[str, Any],
) -> dict[str, Any]:
    """The content of ``run.json``: what ran, on what, with what, and what it cost."""

    def side(held_out: bool) -> dict[str, int]:
        counted = sum(int(b.counted.sum()) for b in batches if b.held_out == held_out)
        n = sum(document.held_out == held_out for document in encoded)
        return {"documents": n, "tokens": counted}

    def model(name: str, live: torch.nn.Module, sha256: str) -> dict[str, str]:
        dtype = str(next(live.parameters()).dtype).removeprefix("torch.")
        return {"name": name, "sha256": sha256, "dtype": dtype}

    return {
        "versions": versions(),
        "commit": commit(),
        "base": model(pair.base_name, pair.base, pair.hashes[0]),
        "tuned": model(pair.tuned_name, pair.tuned, pair.hashes[1]),
        "family": type(pair.base).__name__,
        "parameters": pair.n_parameters,
        "layers": pair.n_layers,
        "data": {"fit": side(False), "held_out": side(True), "prompts": len(prompts)},
        "statistics_dtype": "float64",
        "device": str(pair.device),
        "machine": machine(),
        "seed": options.seed,
        "options": asdict(options),
        "noise_floor": noise,
        "not_applicable": pair.missing,
        "stages": stages.figures,
    }


def machine() -> str:
    """The processor's kind, and how many threads torch uses."""
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
    """Of Python and of the packages that numbers depend on."""
    names = ("oracle-toolkit", "torch", "transformers", "peft", "interp-engine", "numpy", "pandas")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """The commit that the package runs from, where it runs from a checkout of its own."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None
