"""``oracle figures``."""

from pathlib import Path
from typing import Annotated

import typer

from toolkit.runtime.console import bad_input, console, errors


def figures(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Figures to draw; all by default.", metavar="[NAME]..."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the files; figures/ by default.")
    ] = None,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            help="First make the data anew from models, with the commands that --list shows. All "
            "of them take hours on two cores: an hour is data/recipes/smollm2_tasks.sh, a "
            "quarter to half an hour each are the oracle sweeps, the runs of "
            "data/recipes/shipped_runs.py and `oracle table`; the others take minutes.",
        ),
    ] = False,
    list_: Annotated[
        bool, typer.Option("--list", help="Say what each shows and what makes its data; draw none.")
    ] = False,
) -> None:
    """Redraw figures from data/, in seconds and without a model; for a checkout."""
    with bad_input():
        from toolkit.jobs import figures as library

        scripts = library.find_scripts(names or ())
        if list_:
            for script in scripts:
                console.print(f"{script.name}: {script.summary}", soft_wrap=True, markup=False)
                for command in script.made_by:
                    console.print(f"    {command}", soft_wrap=True, markup=False)
            return
        if recompute:
            library.recompute(scripts, errors.print)
        for script in scripts:
            for path in library.redraw(script, out):
                console.print(str(path), soft_wrap=True, markup=False)
