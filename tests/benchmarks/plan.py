"""How near ``--dry-run`` comes: time and memory as planned, and as measured.

    python tests/benchmarks/plan.py [--documents 12 48]

``oracle diagnose`` of the pair that ships is planned and then run in a process of its own, for each
number of documents: once as it is, and once with glibc told to give every freed mebibyte back at
once. Memory is the largest size of the process, as the system tells it and as the plan does.
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
PROMPTS_ASKED, NEW_TOKENS = 4, 16
STAGES = ("march", "replacement", "close look")
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
        part = stage.name.split(":")[0]
        if part != "first look":  # a quiet run has none
            seconds[part if part in STAGES else "march"] += plan.seconds(stage)
    return seconds


def compared(n: int, heap: str) -> dict:
    """The row of one run of `n` documents."""
    options = Options(max_prompts=PROMPTS_ASKED, new_tokens=NEW_TOKENS)
    with tempfile.TemporaryDirectory() as scratch:
        data, out = Path(scratch) / "data.jsonl", Path(scratch) / "out"
        lines = shipped(PROMPTS).read_text("utf-8").splitlines()[:n]
        data.write_text("\n".join(lines), "utf-8")
        plan = plan_job(Job(BASE, str(shipped(ADAPTER)), data, out, options))
        found = measured(data, out, HEAPS[heap])
    row = {"documents": n, "heap": heap}
    times = planned_seconds(plan)
    took = {name: found[name]["seconds"] for name in STAGES}
    times["all"], took["all"] = sum(times.values()), sum(took.values())
    for name, planned in times.items():
        seconds = took[name]
        row |= {f"{name}, planned s": round(planned, 1), f"{name}, s": round(seconds, 1)}
        row[f"{name}, ratio"] = round(seconds / planned, 2)
    planned = plan.memory.size
    peak = max(found[name]["peak_memory_bytes"] for name in STAGES)
    row |= {"planned MiB": round(planned / MIB), "MiB": round(peak / MIB)}
    return row | {"memory, ratio": round(peak / planned, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, nargs="+", default=[12, 48])
    args = parser.parse_args()
    rows = [compared(n, heap) for n in args.documents for heap in HEAPS]
    note = (
        f"SmolLM2 and its LoRA, {PROMPTS_ASKED} prompts, {NEW_TOKENS} new tokens; measured memory "
        "has in it the pages of mapped weights and streams"
    )
    write("plan", "What a dry run says, and what came", rows, note)


if __name__ == "__main__":
    main()
