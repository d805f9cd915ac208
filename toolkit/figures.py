"""``oracle figures``: the scripts of the folder ``figures/``, drawn from ``data/``.

A script has a docstring, ``MADE_BY`` (the commands, run from the repository's root, that make the
data it reads) and ``draw(data)``, which reads files below the folder `data` and returns a figure,
or several by the suffix of their file's name. It opens no model.
"""

import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from toolkit import draw
from toolkit.errors import InputError
from toolkit.plot import PLOTS
from toolkit.store import read_tables

ROOT = Path(__file__).parent.parent
# The runs of the main job that ship: the pair's name, its folder in data/, what makes it.
RUNS = {
    "smollm2": ("SmolLM2-135M and its LoRA on GSM8K", "demo-run"),
    "gemma3": ("Gemma-3-270m and its LoRA on GSM8K", "gemma-run"),
}
MADE_BY_RUNS = tuple(f"python recipes/shipped_runs.py {name}" for name in RUNS)


@dataclass(frozen=True)
class Script:
    """One script of ``figures/``."""

    path: Path
    module: Any

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def title(self) -> str:
        """The first line of its docstring."""
        return self.module.__doc__.strip().split("\n")[0]

    @property
    def made_by(self) -> tuple[str, ...]:
        return self.module.MADE_BY

    def figures(self, data: Path) -> dict[str, Figure]:
        """What it draws, by file name without suffix.

        Raises InputError, with the commands that make it, where data is missing.
        """
        try:
            drawn = self.module.draw(data)
        except (FileNotFoundError, InputError) as error:
            raise InputError(
                f"figure {self.name} lacks data: {error}; make it with {'; '.join(self.made_by)} "
                f"(oracle figures {self.name} --recompute does)"
            ) from error
        if not isinstance(drawn, Mapping):
            return {self.name: drawn}
        return {f"{self.name}_{suffix}": figure for suffix, figure in drawn.items()}


def shipped_frames(data: Path, table: str) -> dict[str, pd.DataFrame]:
    """One table of each run that ships, by the pair's short name."""
    return {
        name: read_tables(data / folder / "tables")[table].frame
        for name, (_, folder) in RUNS.items()
    }


def shipped_plots(data: Path, table: str) -> dict[str, Figure]:
    """The table's own plot for each run that ships, headed by the pair's name."""
    drawn = {}
    for name, frame in shipped_frames(data, table).items():
        drawn[name] = PLOTS[table](frame)
        drawn[name].suptitle(RUNS[name][0], fontsize=11.5, color=draw.GREY)
    return drawn


def find_scripts(names: Sequence[str] = (), root: Path = ROOT) -> list[Script]:
    """The scripts called `names`, or all. Raises InputError where there are none so called."""
    paths = {path.stem: path for path in sorted((root / "figures").glob("*.py"))}
    if not paths:
        raise InputError(
            f"{root / 'figures'} has no scripts: figures are drawn in a checkout of the repository"
        )
    if unknown := [name for name in names if name not in paths]:
        raise InputError(f"there is no figure {unknown[0]!r}: expected {', '.join(paths)}")
    return [_load(paths[name]) for name in names or paths]


def draw_figures(
    scripts: Iterable[Script], out: Path | None = None, root: Path = ROOT
) -> Iterable[Path]:
    """Draw each of `scripts` from the data, and yield the files as they are written."""
    out = out or root / "figures"
    out.mkdir(parents=True, exist_ok=True)
    for script in scripts:
        for name, figure in script.figures(root / "data").items():
            yield from draw.save(figure, out / name)


def commands(scripts: Iterable[Script]) -> list[str]:
    """What makes the data of `scripts`, each command once, in order."""
    return list(dict.fromkeys(command for script in scripts for command in script.made_by))


def recompute(command: str, root: Path = ROOT) -> None:
    """Run one command from the root. Raises InputError if it fails."""
    words = shlex.split(command)
    ours = {"python": [sys.executable], "oracle": [sys.executable, "-m", "toolkit"]}
    done = subprocess.run([*ours.get(words[0], [words[0]]), *words[1:]], cwd=root)
    if done.returncode:
        raise InputError(
            f"{command!r} failed with exit code {done.returncode}: what it printed says why; "
            "the data that was there before is as the command left it"
        )


def _load(path: Path) -> Script:
    spec = importlib.util.spec_from_file_location(f"figures_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Script(path, module)
