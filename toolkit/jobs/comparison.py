"""The table as a job: methods over processes, finished runs kept, the result written."""

import json
import multiprocessing
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from toolkit.documents.tasks import make_task
from toolkit.documents.tasks.task import chance
from toolkit.errors import InputError
from toolkit.models.pair import ModelPair
from toolkit.runtime.output import own_folder, own_request
from toolkit.runtime.progress import progress
from toolkit.runtime.provenance import versions
from toolkit.tables import drawing as draw
from toolkit.tables import method_plot as plot_methods
from toolkit.training import tiny
from toolkit.training.comparison import Bench, Outcome, Record, Setting, row_of, run_method
from toolkit.training.methods import Method
from toolkit.training.trainer import TrainingOptions

SMALL = 10_000_000  # parameters below which a model trains better on one thread of its own


@dataclass(frozen=True)
class TableRequest:
    """Hold what a table is asked for; each process makes its own `Bench` from it.

    `rate`: one learning rate for all, instead of those that suit each method.
    """

    model: str = tiny.NAME
    tuned: str | None = None
    task: str = "listops"
    train: Path | None = None
    test: Path | None = None
    examples: int | None = None
    n_test: int = 500
    max_steps: int = 200
    batch_size: int = 32
    device: str = "cpu"
    rate: float | None = None
    methods: tuple[Method, ...] = tiny.METHODS

    @property
    def is_tiny(self) -> bool:
        return self.model == tiny.NAME

    def bench(self) -> Bench:
        return Bench(self.setting())

    def setting(self) -> Setting:
        options = TrainingOptions(1.0, batch_size=self.batch_size, max_steps=self.max_steps)
        n_train = self.examples or (tiny.N_TRAIN if self.is_tiny else None)
        if self.is_tiny:
            return Setting(
                tiny.tiny_pair(), tiny.TASK, options, n_train, n_test=self.n_test, n_fit=2000
            )
        if self.tuned is None:
            raise InputError(f"--model {self.model} needs --tuned, the fine-tune to compare with")
        task = make_task(self.task, self.train, self.test)
        pair = ModelPair.load(self.model, self.tuned, device=self.device)
        return Setting(pair, task, options, n_train, n_test=self.n_test, n_kl=32, batch_size=32)

    def rates(self, method: Method) -> Sequence[float]:
        if self.rate is not None:
            return (self.rate,)
        return tiny.RATES[method.family] if self.is_tiny else method.rates


_bench: Bench | None = None


def make_table(
    request: TableRequest,
    out: Path,
    seeds: Sequence[int] = range(3),
    workers: int = 0,
    show_progress: bool = True,
) -> tuple[pd.DataFrame, float]:
    """Run what is not yet in ``out/runs``; write and return the table, and the chance line.

    ``table.csv`` has a row for each method, ``table.json`` what it was made with; ``table.svg``
    and ``.png`` draw it.
    """
    started = time.perf_counter()
    out = own_folder(out, "table.json", "runs/request.json")
    asked = {name: value for name, value in _plain(request).items() if name != "methods"}
    own_request(out / "runs" / "request.json", asked)
    bench = request.bench()
    workers = workers or _workers(bench)
    rows = {}
    todo = sorted(request.methods, key=lambda m: m.family == "steering")  # longest first
    with progress("methods", len(todo), show_progress) as advance:
        for method, outcomes in _outcomes(bench, request, todo, seeds, out, workers):
            rows[method] = row_of(method, outcomes, bench.pair.n_parameters)
            advance()
    frame = pd.DataFrame([rows[method] for method in request.methods])
    frame.to_csv(out / "table.csv", index=False, lineterminator="\n")
    constant = chance(bench.train_examples, bench.test)
    about = {
        "request": _plain(request),
        "task": bench.task.name,
        "questions": len(bench.test),
        "chance": constant,
        "seeds": list(seeds),
        "seconds": round(time.perf_counter() - started),
        "workers": workers,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
    }
    (out / "table.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    draw.save(plot_methods.methods(frame, constant), out / "table")
    return frame, constant


def _outcomes(
    bench: Bench,
    request: TableRequest,
    methods: Sequence[Method],
    seeds: Sequence[int],
    out: Path,
    workers: int,
) -> Iterator[tuple[Method, list[Outcome]]]:
    asked = [
        (method, request.rates(method), tuple(seeds), _record(out, method)) for method in methods
    ]
    if workers == 1:
        for method, rates, some, path in asked:
            yield method, run_method(bench, method, rates, some, Record(path))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _ready, (request,)) as pool:
        futures = {pool.submit(_run, *arguments): arguments[0] for arguments in asked}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _ready(request: TableRequest) -> None:
    """A process of its own: one thread, its own models."""
    global _bench
    torch.set_num_threads(1)
    _bench = request.bench()


def _run(method: Method, rates: Sequence[float], seeds: Sequence[int], path: Path) -> list[Outcome]:
    assert _bench is not None
    return run_method(_bench, method, rates, seeds, Record(path))


def _workers(bench: Bench) -> int:
    small = bench.pair.n_parameters < SMALL and bench.pair.device.type == "cpu"
    return min(os.cpu_count() or 1, 8) if small else 1


def _record(out: Path, method: Method) -> Path:
    return out / "runs" / (re.sub(r"[^a-z0-9]+", "-", method.name.lower()).strip("-") + ".jsonl")


def forget_runs(out: Path) -> None:
    """Remove the finished runs of the table in `out`, so that all are run again."""
    if (out / "runs" / "request.json").is_file():
        shutil.rmtree(out / "runs")


def _plain(request: TableRequest) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(request), default=str))
