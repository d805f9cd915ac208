"""Handing freed memory back to the system, where the C library would keep it."""

import ctypes
from collections.abc import Callable


def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return None


_malloc_trim = _trim()


def release_freed() -> None:
    """Give back what is free in the heap; nothing happens where the C library has no such call.

    glibc keeps tensors of up to 32 MiB that were freed, in pieces between those that live. In a
    march that is hundreds of megabytes, which the next stage cannot use as a whole.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)
