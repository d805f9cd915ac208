"""Two processes against one: the same numbers, and how much sooner.

    python tests/benchmarks/processes.py [--documents 40] [--rounds 1]

``oracle diagnose`` on the pair that ships, in one process and in two (gloo), one thread each, in
turn. The march's and the comparisons' seconds are those of run.json; the largest difference of any
number in any table is taken relative to 1 + its size.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from record import write

from toolkit.runtime.shipped import ADAPTER, BASE, PROMPTS, shipped
from toolkit.tables.store import read_tables

LAUNCH = {
    1: ["-m", "toolkit"],
    2: ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "toolkit"],
}


def diagnose(n: int, data: Path, out: Path, options: list[str]) -> None:
    command = [sys.executable, *LAUNCH[n], "diagnose", BASE, str(shipped(ADAPTER))]
    command += ["--data", str(data), "--out", str(out), "--quiet", *options]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def largest_difference(ours: Path, theirs: Path) -> float:
    worst = 0.0
    one, other = (read_tables(folder / "tables") for folder in (ours, theirs))
    for name, table in one.items():
        for column in table.frame:
            a, b = table.frame[column], other[name].frame[column]
            if a.dtype.kind == "f":
                gap = np.abs(a - b) / (1 + np.abs(b))
                worst = max(worst, float(np.nanmax(gap, initial=0.0)))
            else:
                assert a.tolist() == b.tolist(), (name, column)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--max-prompts", type=int, default=4)
    parser.add_argument("--shared-sample", type=int, default=32)
    args = parser.parse_args()
    options = ["--max-prompts", str(args.max_prompts), "--new-tokens", "16"]
    options += ["--shared-sample", str(args.shared_sample), "--batch-tokens", "512"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lines = shipped(PROMPTS).read_text("utf-8").splitlines()[: args.documents]
        (folder / "data.jsonl").write_text("\n".join(lines), "utf-8")
        for n in LAUNCH:
            diagnose(n, folder / "data.jsonl", folder / str(n), options)
        stages = {
            n: json.loads((folder / str(n) / "run.json").read_text())["stages"] for n in LAUNCH
        }
        worst = largest_difference(folder / "2", folder / "1")
    rows = [
        {
            "stage": stage,
            "one process, s": found["seconds"],
            "two processes, s": stages[2][stage]["seconds"],
            "speed-up": round(found["seconds"] / stages[2][stage]["seconds"], 2),
        }
        for stage, found in stages[1].items()
    ]
    note = (
        f"oracle diagnose of SmolLM2 and its LoRA, {args.documents} documents, one thread a "
        "process, batches of 512 tokens; largest difference of any number in any table: "
        f"{worst:.1e}"
    )
    write("processes", "Two processes", rows, note)


if __name__ == "__main__":
    main()
