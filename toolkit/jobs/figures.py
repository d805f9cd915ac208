"""The scripts of ``figures/``: found, drawn from ``data/``, and their data made anew.

A script is one figure: its docstring says what it shows, ``MADE_BY`` names the commands, run from
the repository's root, that make the data it reads, and ``draw(data)`` takes the folder ``data/``
and returns a figure, or figures by the suffix of their file's name. It opens no model.
"""

import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from toolkit.errors import InputError
from toolkit.tables.drawing import BLACK, BLUE, PURPLE, STYLE, save
from toolkit.tables.store import read_table

ROOT = Path(__file__).parents[2]
Drawn = Figure | Mapping[str, Figure]


@dataclass(frozen=True)
class ShippedPair:
    """How figures name and draw a shipped pair, and its run in ``data/``."""

    name: str
    run: str
    style: dict[str, Any]

    def table(self, data: Path, name: str) -> pd.DataFrame:
        """Return the run's table `name`."""
        return read_table(data / self.run / "tables", name).frame


PAIRS = {
    "smollm2": ShippedPair(
        "SmolLM2-135M", "demo-run", {"color": BLUE, "marker": "o", "linestyle": "-"}
    ),
    "gemma3": ShippedPair(
        "Gemma-3-270m", "gemma-run", {"color": PURPLE, "marker": "s", "linestyle": "--"}
    ),
}
PUBLISHED_STYLE: dict[str, Any] = {"color": BLACK, "marker": "D", "linestyle": ":"}


@dataclass(frozen=True)
class Script:
    """One file of ``figures/``, imported."""

    name: str
    root: Path
    about: str
    made_by: tuple[str, ...]
    draw: Callable[[Path], Drawn]

    @property
    def summary(self) -> str:
        return self.about.split("\n\n")[0].replace("\n", " ")


def each_pair(plot: Callable[[ShippedPair], Figure]) -> dict[str, Figure]:
    """One plot for each shipped pair, under the pair's name, on the same axes."""
    drawn = {key: plot(pair) for key, pair in PAIRS.items()}
    for panels in zip(*(figure.axes for figure in drawn.values()), strict=True):
        low, high = zip(*(axes.get_ylim() for axes in panels), strict=True)
        for axes in panels:
            axes.set_ylim(min(low), max(high))
    for key, figure in drawn.items():
        figure.set_figheight(figure.get_figheight() + 0.4)
        figure.suptitle(PAIRS[key].name, x=0.01, ha="left", fontsize=13, color="#555555")
    return drawn


def find_scripts(names: Sequence[str] = (), root: Path = ROOT) -> list[Script]:
    """Return the scripts of `names`, all of them by default."""
    paths = {path.stem: path for path in sorted((root / "figures").glob("*.py"))}
    if not paths:
        raise InputError(
            f"{root / 'figures'} holds no scripts: figures are redrawn in a checkout of the "
            "repository, with `python -m toolkit figures` in its root"
        )
    unknown = [name for name in names if name not in paths]
    if unknown:
        raise InputError(f"no figure is named {unknown[0]!r}: expected any of {', '.join(paths)}")
    return [load_script(paths[name], root) for name in dict.fromkeys(names or paths)]


def load_script(path: Path, root: Path = ROOT) -> Script:
    """Import one script, by its path."""
    spec = importlib.util.spec_from_file_location(f"figures.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Script(path.stem, root, (module.__doc__ or "").strip(), module.MADE_BY, module.draw)


def draw_figures(script: Script) -> dict[str, Figure]:
    """Return the script's figures by their files' names, drawn from the data that is there."""
    commands = " and ".join(f"`{command}`" for command in script.made_by)
    remedy = (
        f"get it back with git, or make the data of {script.name} anew: {commands or 'no command'}"
    )
    try:
        with matplotlib.rc_context(STYLE):
            drawn = script.draw(script.root / "data")
    except FileNotFoundError as error:
        raise InputError(f"{error.filename} is not here: {remedy}") from None
    except InputError as error:
        raise InputError(f"{error}: {remedy}") from None
    if isinstance(drawn, Figure):
        return {script.name: drawn}
    return {f"{script.name}-{suffix}": figure for suffix, figure in drawn.items()}


def redraw(script: Script, out: Path | None = None) -> list[Path]:
    """Draw and save, in ``figures/`` by default; the same bytes every time. The files' paths."""
    folder = out or script.root / "figures"
    figures = draw_figures(script)
    folder.mkdir(parents=True, exist_ok=True)
    return [path for name, figure in figures.items() for path in save(figure, folder / name)]


def recompute(scripts: Sequence[Script], say: Callable[[str], None] = print) -> None:
    """Run each command that makes data of `scripts` once, in order, in the repository's root."""
    for command in dict.fromkeys(command for script in scripts for command in script.made_by):
        say(f"running: {command}")
        root = scripts[0].root
        done = subprocess.run(as_arguments(command), cwd=root, env=surroundings(root))
        if done.returncode:
            raise InputError(f"`{command}` failed with exit code {done.returncode}: see above")


def surroundings(root: Path) -> dict[str, str]:
    """The environment of a command: this interpreter's `oracle` and `python`, this checkout."""
    first = {"PATH": Path(sys.executable).parent, "PYTHONPATH": root}
    found = {name: os.environ.get(name, "") for name in first}
    joined = {
        name: os.pathsep.join(filter(None, (str(first[name]), found[name]))) for name in first
    }
    return {**os.environ, **joined}


def as_arguments(command: str) -> list[str]:
    """`command` with this interpreter in place of ``oracle`` and ``python``."""
    program, *rest = shlex.split(command)
    here = {"oracle": [sys.executable, "-m", "toolkit"], "python": [sys.executable]}
    return [*here.get(program, [program]), *rest]
