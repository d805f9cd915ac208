"""``oracle compare``: finished runs of one base model beside each other."""

from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.options import Device, Quiet
from toolkit.runtime.console import bad_input, console, errors
from toolkit.runtime.output import own_folder


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of oracle diagnose, of one base.", metavar="RUN..."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for tables and page.")],
    transfer: Annotated[
        bool,
        typer.Option(
            "--transfer",
            help="Also judge each run's adapters on every run's prompts; this runs the models.",
        ),
    ] = False,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Put finished runs beside each other: fine-tunes of one base, checkpoints, seeds.

    What is recovered by place and size beside how far each fine-tune went, how alike their deltas'
    leading directions are, and (--transfer) what one's adapters recover of another.
    """
    with bad_input():
        from toolkit.models.loading import require_device
        from toolkit.runs.side_by_side import PAGE, RECORD, compare_runs, write_comparison

        require_device(device)
        own_folder(out, RECORD)
        found = compare_runs(runs, with_transfer=transfer, device=device, show_progress=not quiet)
        write_comparison(found, out)
        for reason in found.left_out:
            errors.print(f"left out: {reason}")
        for sentence in found.findings.values():
            console.print(sentence, soft_wrap=True)
        console.print(f"page: {(out / PAGE).resolve()}", soft_wrap=True)
