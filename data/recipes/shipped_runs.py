"""Diagnoses the shipped pairs, and a full fine-tune: makes data/demo-run, gemma-run and full-run.

    python data/recipes/shipped_runs.py demo-run      # about ten minutes on two cores
    python data/recipes/shipped_runs.py gemma-run     # about ten
    python data/recipes/shipped_runs.py full-run      # about ten, with the full fine-tune at hand

The weights of the full fine-tune do not ship. In the repository's root this makes them, in about
ten minutes more (the files are GSM8K as JSON lines with "prompt", "response", "answer"):

    oracle finetune SmolLM2-135M-Instruct --method sft --task gsm8k --train gsm8k_train.jsonl \\
        --test gsm8k_test.jsonl --rate 5e-5 --batch-size 8 --micro-batch 4 --examples 480 \\
        --longer skip --out smollm2-gsm8k-full

Of a run of `oracle diagnose` are kept the tables, run.json and report.json, whose names of models
and data are relative to the repository's root.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from toolkit.diagnosis.options import Options
from toolkit.diagnosis.other_data import OtherFiles
from toolkit.jobs.diagnose import Job, run_job

ROOT = Path(__file__).parents[2]
DOCUMENTS = Path("data/gsm8k-demo.jsonl")
ELSEWHERE = OtherFiles(elsewhere=(ROOT / "data" / "elsewhere.jsonl",))
KEPT = ("tables", "run.json", "report.json")
# Base, tuned (from the root), and the options that are not diagnose's defaults.
RUNS = {
    "full-run": ("SmolLM2-135M-Instruct", "smollm2-gsm8k-full", {}),
    "demo-run": ("SmolLM2-135M-Instruct", "data/smollm2-gsm8k-lora", {"shared_sample": 128}),
    "gemma-run": (
        "gemma-3-270m",
        "data/gemma3-gsm8k-lora",
        {"sample": 16, "shared_sample": 512, "max_prompts": 4, "new_tokens": 16},
    ),
}


def keep(run: Path, folder: Path) -> None:
    """Copy what is kept of the finished `run` into `folder`, in place of what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        source, target = run / name, folder / name
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=RUNS, metavar="NAME", help=", ".join(RUNS))
    parser.add_argument("--out", type=Path, default=ROOT / "data", help="data/ by default")
    args = parser.parse_args()
    out = args.out.resolve()
    os.chdir(ROOT)  # so that the names that run.json keeps are relative to it
    for name in args.names:
        base, tuned, options = RUNS[name]
        with tempfile.TemporaryDirectory() as folder:
            job = Job(
                base, tuned, DOCUMENTS, Path(folder) / name, Options(**options), other=ELSEWHERE
            )
            run_job(job)
            keep(Path(folder) / name, out / name)


if __name__ == "__main__":
    main()
