"""Types of arguments and options that several commands share."""

from typing import Annotated

import typer

MODEL = "Hub id, folder, .gguf file or packaged model."
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
Device = Annotated[str, typer.Option(help="Where the models run: cpu, cuda, ...")]
