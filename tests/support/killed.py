"""Run a job in processes that are killed at random moments, until one ends by itself.

    python -m tests.support.killed FOLDER [--seed 0]

FOLDER holds ``base``, ``tuned`` and ``data.jsonl``. Writes ``whole``, a run without interruption,
and ``killed``; prints how much was done when each process was killed. Processes are forked from
this one, which has loaded all modules but no model, so that little of their time is starting.
"""

import argparse
import contextlib
import io
import json
import os
import random
import signal
import time
from pathlib import Path

import interp_engine.model  # noqa: F401
import torch

from tests.support.pictures import save_blank
from toolkit.diagnosis.options import Options
from toolkit.jobs.diagnose import Job, run_job
from toolkit.tables import drawing as draw
from toolkit.tables.table import Table

OPTIONS = Options(new_tokens=4, sample=2, shared_sample=8, batch_tokens=128)


def start(folder: Path, name: str) -> int:
    """A process that runs the job; its number."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        # Pictures would take most of so small a run's time, and no later start reads them.
        Table.plot = lambda table, noise: None
        draw.save = save_blank
        paths = str(folder / "base"), str(folder / "tuned"), folder / "data.jsonl", folder / name
        with contextlib.redirect_stderr(io.StringIO()):
            run_job(Job(*paths, OPTIONS, show=False))
        os._exit(0)
    return child


def done(folder: Path) -> tuple[int, int]:
    """Blocks passed and candidates compared by the run in `folder`."""
    progress = folder / "march" / "passed.json"
    passed = int(progress.read_text()) if progress.is_file() else 0
    return passed, len(list((folder / "replacement").glob("*.safetensors")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments = random.Random(args.seed)
    started = time.perf_counter()
    assert os.waitpid(start(args.folder, "whole"), 0)[1] == 0
    whole = time.perf_counter() - started
    left = []
    while not (args.folder / "killed" / "run.json").is_file():
        child = start(args.folder, "killed")
        # Longer and longer: a machine that others use may have become slower.
        time.sleep(moments.uniform(0.02, 0.4 + 0.1 * len(left)) * whole)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left.append(done(args.folder / "killed.partial"))
        if len(left) == 30:  # each time too little was done to be kept
            raise SystemExit("30 processes did not end the run")
    print(json.dumps({"seconds": whole, "left": left}))


if __name__ == "__main__":
    main()
