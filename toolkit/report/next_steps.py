"""What to do after a run: the code that loads its adapters, and commands that go on from it.

All of them are given in the run's folder, from which the paths in ``run.json`` are counted.
"""

import shlex
from pathlib import Path
from typing import Any

from toolkit.diagnosis.run import Run
from toolkit.runtime.output import seen_from

ASKED = "What is 2 + 3?"
BY_FIT = ("forced", "sequential")  # what ``oracle steer fit`` calls these forms, too


def paths_from(out: Path, **sources: str | Path) -> dict[str, str]:
    """Return the `sources` as seen from the folder `out`; what is no local path stays as it is."""
    return {name: seen_from(out, source) for name, source in sources.items()}


def moved(path: str, source: Path, out: Path) -> str:
    """Return the `path` that is counted from the folder `source` as it is seen from `out`."""
    return seen_from(out, source / path) if (source / path).exists() else path


def code(run: Run) -> str:
    """Write the Python that steers with the recommended adapters; "" where there are none."""
    if run.recommendation is None:
        return ""
    base, tuned, _ = _sources(run)
    prompt = run.samples[0]["prompt"] if run.samples else ASKED
    return f"""\
from toolkit import Adapters, ModelPair, steer

pair = ModelPair.load({base!r}, {tuned!r}, {run.info["base"]["dtype"]!r}, {run.info["device"]!r})
inputs = pair.tokenizer({prompt!r}, return_tensors="pt").to(pair.device)
with steer(pair.base, Adapters.from_pretrained("adapters")):
    answer = pair.base.generate(inputs.input_ids, max_new_tokens=32)
print(pair.tokenizer.decode(answer[0]))"""


def commands(run: Run) -> dict[str, str]:
    """Write the commands that refit, distil, judge and export the recommended adapters.

    A step that the run lacks the files for is left out: documents in memory give no refit, a run
    without a task no judge. ``oracle steer fit`` fits every block, and counts every token;
    ``oracle steer eval`` leaves out no question that is a document of the data.
    """
    r, info = run.recommendation, run.info
    if r is None:
        return {}
    base, tuned, data = _sources(run)
    options = info["options"]
    precision = ["--dtype", info["base"]["dtype"], "--device", info["device"]]
    reading = [*_option(options, "max_length"), *_option(options, "seed")]
    found: dict[str, list[Any]] = {}
    if data and r["layers"] == "all" and options.get("positions", "all") == "all":
        size = [] if r["kind"] == "vector" else ["--rank", r["rank"]]
        form = r["fit"] if r["fit"] in BY_FIT else "best"
        found["refit"] = [
            "steer", "fit", base, tuned, "--data", data, "--out", "refitted", "--location",
            r["location"], "--kind", r["kind"], *size, "--fit", form, *reading, *precision,
        ]  # fmt: skip
    if data:
        found["distil"] = [
            "steer", "distil", base, tuned, "--data", data, "--out", "distilled", "--start",
            "adapters", *_option(options, "new_tokens"), *reading, *precision,
        ]  # fmt: skip
    task = info.get("other_data", {}).get("task")
    if task and not task.get("left_out"):
        file = info.get("paths", {}).get("questions", task["file"])
        found["judge"] = [
            "steer", "eval", base, "--task", task["name"], "--adapters", "adapters", "--tuned",
            tuned, *(["--test", file] if file else []), "--n", task["questions"], *precision,
        ]  # fmt: skip
    # The one format that holds every kind exactly, with the first token left alone.
    found["export"] = [
        "export", "adapters", "--to", "folder", "--out", "exported", "--base", base, *precision,
    ]  # fmt: skip
    return {step: shlex.join(["oracle", *map(str, words)]) for step, words in found.items()}


def _sources(run: Run) -> tuple[str, str, str]:
    """Return the names of base and tuned model and of the data ("" where it has no file)."""
    info, paths = run.info, run.info.get("paths", {})
    base, tuned = (paths.get(half, info[half]["name"]) for half in ("base", "tuned"))
    return base, tuned, paths.get("data", info["data"].get("file", ""))


def _option(options: dict[str, Any], name: str) -> list[Any]:
    """Return an option of the run as a command has it; earlier runs lack some."""
    return [f"--{name.replace('_', '-')}", options[name]] if name in options else []
