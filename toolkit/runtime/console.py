"""The terminal: what is said on it, and how bad input ends a command."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from toolkit.errors import InputError

errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
console = Console(highlight=False)


@contextmanager
def bad_input() -> Iterator[None]:
    """Bad input is one line on stderr and exit code 2; on each machine one process speaks."""
    try:
        yield
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            errors.print(f"oracle: {' '.join(str(error).split())}")
        raise typer.Exit(2) from None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep back transformers' own progress bars and reports, which would print between ours."""
    from transformers.utils import logging  # takes a second to import

    level, was_shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if was_shown:
            logging.enable_progress_bar()
