"""The terminal: what is said on it, and how bad input ends a command."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from toolkit.errors import InputError

errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
console = Console(highlight=False)


@contextmanager
def bad_input() -> Iterator[None]:
    """Bad input is one line on stderr and exit code 2."""
    try:
        yield
    except InputError as error:
        errors.print(f"oracle: {' '.join(str(error).split())}")
        raise typer.Exit(2) from None
