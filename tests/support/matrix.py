"""Run the fast tests with other versions, one thing varied at a time, and print what came out.

    python -m tests.support.matrix [lowest newest warnings python3.12 ...]

`lowest` has the least versions that ``pyproject.toml`` allows, `newest` the newest that the index
has, `warnings` the pinned ones with every warning an error, deprecations included; a Python's name
the pinned ones with that Python. Each has an environment of its own under ``.matrix/``. torch stays
at the pinned release everywhere: another one is a CUDA build of several gigabytes.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAST = ("statistics", "analysis", "blocks", "models", "lockstep", "adapters", "documents")
TORCH = "torch==2.13.0"
OTHER_PYTHONS = ("python3.12", "python3.13")


def requirements() -> list[str]:
    """Return what the package and its tests need, as ``pyproject.toml`` says it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["dev"]]


def lowest(requirement: str) -> str:
    """Return `requirement` at the least version that it allows."""
    name, version = re.match(r"([\w-]+)>=([\w.]+)", requirement).groups()  # type: ignore[union-attr]
    return f"{name}=={version}"


def plan(name: str) -> tuple[str, list[str], list[str]]:
    """Return, for one row of the matrix: the Python, arguments of pip, arguments of pytest."""
    named = [r for r in requirements() if not r.startswith("torch>")]
    pinned = ["-c", str(ROOT / "constraints.txt")]
    if name == "lowest":
        return sys.executable, [TORCH, *map(lowest, named)], []
    if name == "newest":
        return sys.executable, [TORCH, *named], []
    if name == "warnings":
        return sys.executable, [*pinned, TORCH, *named], ["-W", "error"]
    return name, [*pinned, TORCH, *named], []


def run(name: str) -> str:
    """Make the environment of one row, run the fast tests in it, and return what came out."""
    python, packages, options = plan(name)
    if shutil.which(python) is None:
        return "not here"
    folder = ROOT / ".matrix" / name
    if python == sys.executable:
        venv.create(folder, with_pip=True, clear=True)
    else:
        subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
    own = str(folder / "bin" / "python")
    made = subprocess.run(
        [own, "-m", "pip", "install", "--quiet", *packages], capture_output=True, text=True
    )
    if made.returncode:
        return f"cannot be installed: {made.stderr.strip().splitlines()[-1]}"
    tests = [f"tests/{room}" for room in FAST]
    command = [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (folder / "pytest.log").write_text(done.stdout + done.stderr, "utf-8")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "passed" if done.returncode == 0 else f"failed: {len(failed)}, see {folder}/pytest.log"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=["lowest", "newest", "warnings"])
    names = parser.parse_args().names
    if names == ["lowest", "newest", "warnings"]:
        names += [python for python in OTHER_PYTHONS if shutil.which(python)]
    results = {}
    for name in names:
        results[name] = run(name)
        print(f"{name:<12} {results[name]}", flush=True)
    sys.exit(any(result.startswith(("failed", "cannot")) for result in results.values()))


if __name__ == "__main__":
    main()
