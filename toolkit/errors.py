"""The one exception that bad input raises, and how others are said in one line."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """The user's input cannot be used.

    The message is one line: what was expected, what came, what to do. The command line prints it
    and exits with code 2; in Python it is an ordinary ``ValueError``.
    """


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Raise InputError, with `what` and the reason, for any exception of a library inside."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever a library finds wrong with its input
        raise InputError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Return the first line of an exception's message that says something."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
