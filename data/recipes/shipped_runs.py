"""Diagnoses the shipped pairs, and full fine-tunes: makes data/demo-run, gemma-run, full-run, ...

    python data/recipes/shipped_runs.py demo-run      # about ten minutes on two cores
    python data/recipes/shipped_runs.py gemma-run     # about ten
    python data/recipes/shipped_runs.py full-run      # about ten, with the full fine-tune at hand
    python data/recipes/shipped_runs.py gemma-full-run
    python data/recipes/shipped_runs.py arc-run --arc-test arc_easy_test.jsonl

The weights of the full fine-tunes do not ship. In the repository's root these make them, in ten to
thirty minutes each (the files are JSON lines with "prompt", "response", "answer"):

    oracle finetune SmolLM2-135M-Instruct --method sft --task gsm8k --train gsm8k_train.jsonl \\
        --test gsm8k_test.jsonl --rate 5e-5 --batch-size 8 --micro-batch 4 --examples 480 \\
        --longer skip --out smollm2-gsm8k-full
    oracle finetune gemma-3-270m --method sft --task gsm8k --train gsm8k_train.jsonl \\
        --test gsm8k_test.jsonl --rate 5e-5 --batch-size 8 --micro-batch 2 --examples 320 \\
        --validation 40 --longer skip --out gemma3-gsm8k-full
    oracle finetune SmolLM2-135M-Instruct --method sft --task arc-easy \\
        --train arc_easy_train.jsonl --test arc_easy_test.jsonl --rate 5e-5 --batch-size 8 \\
        --examples 1200 --validation 100 --out smollm2-arc-easy-full

The documents are those of data/gsm8k-demo.jsonl; of arc-run the first 120 lines of the test file,
whose later lines are the questions.

Of a run of `oracle diagnose` are kept the tables, run.json and report.json, whose names of models
and data are relative to the repository's root, and what the training of a full fine-tune did.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from toolkit.diagnosis.options import Options
from toolkit.diagnosis.other_data import OtherFiles
from toolkit.jobs.diagnose import Job, run_job
from toolkit.runtime.records import write_json

ROOT = Path(__file__).parents[2]
DOCUMENTS = Path("data/gsm8k-demo.jsonl")
ELSEWHERE = (ROOT / "data" / "elsewhere.jsonl",)
TABLES, RECORDS = "tables", ("run.json", "report.json")
ON_THIS_MACHINE = ("code", "commands", "paths")
SMOLLM2, GEMMA = "SmolLM2-135M-Instruct", "gemma-3-270m"
ARC_RUN, ARC_FILE, ARC_DOCUMENTS = "arc-run", "arc-easy.jsonl", 120
# Base, tuned (from the root), and the options that are not diagnose's defaults.
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "demo-run": (SMOLLM2, "data/smollm2-gsm8k-lora", {"shared_sample": 128}),
    "full-run": (SMOLLM2, "smollm2-gsm8k-full", {}),
    ARC_RUN: (SMOLLM2, "smollm2-arc-easy-full", {"shared_sample": 128, "new_tokens": 12}),
    "gemma-run": (
        GEMMA,
        "data/gemma3-gsm8k-lora",
        {"sample": 16, "shared_sample": 512, "max_prompts": 4, "new_tokens": 16},
    ),
    "gemma-full-run": (GEMMA, "gemma3-gsm8k-full", {"shared_sample": 128}),
}


def keep(run: Path, folder: Path) -> None:
    """Copy what is kept of the finished `run` into `folder`, in place of what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / TABLES, ignore_errors=True)
    shutil.copytree(run / TABLES, folder / TABLES)
    for name in RECORDS:
        write_json(portable(json.loads((run / name).read_text("utf-8"))), folder / name)


def portable(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without what holds on this machine alone: commands, and where files lie."""
    found = {name: part for name, part in record.items() if name not in ON_THIS_MACHINE}
    task = found.get("other_data", {}).get("task", {})
    for described in (found.get("data", {}), task):
        if Path(described.get("file", "")).is_absolute():
            described["file"] = Path(described["file"]).name
    return found


def documents_of(name: str, arc_test: Path, scratch: Path) -> tuple[Path, OtherFiles]:
    """Return a run's file of documents, and what is looked at beside them."""
    if name != ARC_RUN:
        return DOCUMENTS, OtherFiles(elsewhere=ELSEWHERE)
    lines = arc_test.read_text("utf-8").splitlines(keepends=True)
    documents = scratch / ARC_FILE
    documents.write_text("".join(lines[:ARC_DOCUMENTS]), "utf-8")
    return documents, OtherFiles("arc-easy", arc_test, elsewhere=ELSEWHERE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=RUNS, metavar="NAME", help=", ".join(RUNS))
    parser.add_argument("--out", type=Path, default=ROOT / "data", help="data/ by default")
    parser.add_argument("--arc-test", type=Path, default=Path("arc_easy_test.jsonl"))
    args = parser.parse_args()
    out, arc_test = args.out.resolve(), args.arc_test.resolve()
    os.chdir(ROOT)  # so that the names that run.json keeps are relative to it
    for name in args.names:
        base, tuned, options = RUNS[name]
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / name
            documents, other = documents_of(name, arc_test, Path(folder))
            run_job(Job(base, tuned, documents, run, Options(**options), other=other))
            keep(run, out / name)
        trained = Path(tuned) / "training.json"
        if trained.is_file() and not tuned.startswith("data/"):
            shutil.copyfile(trained, out / name / trained.name)


if __name__ == "__main__":
    main()
