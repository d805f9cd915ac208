"""How near ``--dry-run`` comes: time and memory as planned, and as measured.

    python tests/benchmarks/plan.py [--documents 12 48]

``oracle diagnose`` of the pair that ships is planned and then run in a process of its own, for each
number of documents: once as it is, and once with glibc told to give every freed mebibyte back at
once. Memory is the peak over what a process holds that has only imported the toolkit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from record import write

from toolkit.diagnosis.options import Options
from toolkit.jobs.diagnose import Job, plan_job
from toolkit.planning.estimate import RunPlan
from toolkit.runtime.shipped import ADAPTER, BASE, PROMPTS, shipped

MIB = 2**20
IDLE = "import psutil, toolkit.cli.main; print(psutil.Process().memory_info().rss)"
PROMPTS_ASKED, NEW_TOKENS = 4, 16
STAGES = ("march", "replacement")
HEAPS = {"as it is": {}, "freed at once": {"MALLOC_MMAP_THRESHOLD_": str(MIB)}}


def measured(data: Path, out: Path, heap: dict[str, str]) -> dict:
    command = [sys.executable, "-m", "toolkit", "diagnose", BASE, str(shipped(ADAPTER)), "--quiet"]
    command += ["--data", str(data), "--out", str(out), "--max-prompts", str(PROMPTS_ASKED)]
    command += ["--new-tokens", str(NEW_TOKENS)]
    subprocess.run(command, check=True, env=os.environ | heap)
    return json.loads((out / "run.json").read_text())["stages"]


def planned_seconds(plan: RunPlan) -> dict[str, float]:
    seconds = dict.fromkeys(STAGES, 0.0)
    for stage in plan.stages:
        if stage.name.startswith("first look"):  # a quiet run has none
            continue
        of = "replacement" if stage.name.startswith("replacement") else "march"
        seconds[of] += plan.seconds(stage)
    return seconds


def compared(n: int, heap: str, idle: int) -> dict:
    """The row of one run of `n` documents."""
    options = Options(max_prompts=PROMPTS_ASKED, new_tokens=NEW_TOKENS)
    with tempfile.TemporaryDirectory() as scratch:
        data, out = Path(scratch) / "data.jsonl", Path(scratch) / "out"
        lines = shipped(PROMPTS).read_text("utf-8").splitlines()[:n]
        data.write_text("\n".join(lines), "utf-8")
        plan = plan_job(Job(BASE, str(shipped(ADAPTER)), data, out, options))
        found = measured(data, out, HEAPS[heap])
    row = {"documents": n, "heap": heap}
    for name, planned in planned_seconds(plan).items():
        seconds = found[name]["seconds"]
        row |= {f"{name}, planned s": round(planned, 1), f"{name}, s": round(seconds, 1)}
        row[f"{name}, ratio"] = round(seconds / planned, 2)
    planned = plan.memory.peak
    peak = max(found[name]["peak_memory_bytes"] for name in STAGES) - idle
    row |= {"planned MiB": round(planned / MIB), "MiB": round(peak / MIB)}
    return row | {"memory, ratio": round(peak / planned, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, nargs="+", default=[12, 48])
    args = parser.parse_args()
    idle = int(subprocess.check_output([sys.executable, "-c", IDLE]))
    rows = [compared(n, heap, idle) for n in args.documents for heap in HEAPS]
    note = (
        f"SmolLM2 and its LoRA, {PROMPTS_ASKED} prompts, {NEW_TOKENS} new tokens; measured memory "
        "has in it the pages of mapped weights and streams"
    )
    write("plan", "What a dry run says, and what came", rows, note)


if __name__ == "__main__":
    main()
