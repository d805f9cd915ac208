"""Makes data/demo-run or data/gemma-run: the tables and records of a diagnosis of a shipped pair.

    python recipes/shipped_runs.py smollm2
    python recipes/shipped_runs.py gemma3

About 7 and 15 minutes on two cores. Figures, report.html and adapters are left out.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from toolkit.cli import run_job

RUNS = {
    "smollm2": (
        ("SmolLM2-135M-Instruct", "data/smollm2-gsm8k-lora"),
        {"shared_sample": 128},
        "data/demo-run",
    ),
    "gemma3": (
        ("gemma-3-270m", "data/gemma3-gsm8k-lora"),
        {"sample": 16, "shared_sample": 512, "max_prompts": 4, "new_tokens": 16},
        "data/gemma-run",
    ),
}
KEPT = ("tables", "run.json", "report.json")


def main() -> None:
    if sys.argv[1:] not in [[name] for name in RUNS]:
        raise SystemExit(f"expected one of {', '.join(RUNS)}")
    (base, tuned), options, folder = RUNS[sys.argv[1]]
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "run"
        run_job(base, tuned, Path("data/gsm8k-demo.jsonl"), made, options)
        for name in KEPT:
            if (made / name).is_dir():
                shutil.copytree(made / name, Path(folder) / name, dirs_exist_ok=True)
            else:
                shutil.copy(made / name, Path(folder) / name)


if __name__ == "__main__":
    main()
