"""How near ``--dry-run`` comes: time and memory as planned, and as measured.

    python benchmarks/plan.py [--documents 12 48]

``oracle diagnose`` of the pair that ships is planned and then run in a process of its own, for each
number of documents. Memory is the peak over what a process holds that has only imported the
toolkit.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from record import write

from toolkit.demo import ADAPTER, BASE, PROMPTS, shipped
from toolkit.job import Job, plan_job
from toolkit.run import Options

MIB = 2**20
IDLE = "import psutil, toolkit.cli; print(psutil.Process().memory_info().rss)"
PROMPTS_ASKED, NEW_TOKENS = 4, 16


def measured(data: Path, out: Path) -> dict:
    command = [sys.executable, "-m", "toolkit", "diagnose", BASE, str(shipped(ADAPTER)), "--quiet"]
    command += ["--data", str(data), "--out", str(out), "--max-prompts", str(PROMPTS_ASKED)]
    subprocess.run([*command, "--new-tokens", str(NEW_TOKENS)], check=True)
    return json.loads((out / "run.json").read_text())["stages"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, nargs="+", default=[12, 48])
    args = parser.parse_args()
    idle = int(subprocess.check_output([sys.executable, "-c", IDLE]))
    options = Options(max_prompts=PROMPTS_ASKED, new_tokens=NEW_TOKENS)
    rows = []
    for n in args.documents:
        with tempfile.TemporaryDirectory() as scratch:
            data, out = Path(scratch) / "data.jsonl", Path(scratch) / "out"
            lines = shipped(PROMPTS).read_text("utf-8").splitlines()[:n]
            data.write_text("\n".join(lines), "utf-8")
            plan = plan_job(Job(BASE, str(shipped(ADAPTER)), data, out, options))
            stages = measured(data, out)
        for name in ("march", "replacement"):
            planned = sum(
                plan.seconds(stage)
                for stage in plan.stages
                if stage.name.startswith("replacement") == (name == "replacement")
            )
            found, peak = stages[name]["seconds"], stages[name]["peak_memory_bytes"] - idle
            rows.append(
                {
                    "documents": n,
                    "stage": name,
                    "planned, s": round(planned, 1),
                    "measured, s": found,
                    "measured / planned, time": round(found / planned, 2),
                    "planned, MiB": round(plan.memory.at(name) / MIB),
                    "measured, MiB": round(peak / MIB),
                    "measured / planned, memory": round(peak / plan.memory.at(name), 2),
                }
            )
    note = f"SmolLM2 and its LoRA, {PROMPTS_ASKED} prompts, {NEW_TOKENS} new tokens"
    write("plan", "What a dry run says, and what came", rows, note)


if __name__ == "__main__":
    main()
