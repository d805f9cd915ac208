"""The terminal: what is said on it, and how bad input ends a command."""

import errno
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from toolkit.errors import InputError, one_line

errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
console = Console(highlight=False)
# What a disk or a folder says that takes no more.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR)


@contextmanager
def bad_input() -> Iterator[None]:
    """Bad input is one line on stderr and exit code 2; on each machine one process speaks.

    So is an error that nobody expected, with exit code 1 and a file that has the traceback.
    """
    try:
        yield
    except InputError as error:
        _say(" ".join(str(error).split()))
        raise typer.Exit(2) from None
    except (typer.Exit, typer.Abort):
        raise
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise _unexpected(error) from None
        where = f" ({error.filename})" if error.filename else ""
        _say(
            f"{error.strerror}{where}: make room or give another --out; the same command goes on "
            "from what is kept"
        )
        raise typer.Exit(2) from None
    except Exception as error:
        raise _unexpected(error) from None


def _say(line: str) -> None:
    """Print one line, in one process on each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        errors.print(f"oracle: {line}")


def _unexpected(error: Exception) -> typer.Exit:
    """Say in one line that the program failed, and keep the traceback and the versions."""
    from toolkit.runtime.provenance import versions

    handle, name = tempfile.mkstemp(prefix="oracle-error-", suffix=".log")
    told = {"command": sys.argv, **versions()}
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write("".join(traceback.format_exception(error)))
        file.write(json.dumps(told, indent=2, default=str) + "\n")
    _say(
        f"this should not have happened ({type(error).__name__}: {one_line(error)[:200]}); "
        f"please report it with {name}"
    )
    return typer.Exit(1)


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
