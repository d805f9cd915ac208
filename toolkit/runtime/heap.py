"""Handing memory back: to the system, where the C library would keep it, and after Ctrl-C."""

import ctypes
import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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


@contextmanager
def freed_if_interrupted() -> Iterator[None]:
    """Free what an interrupted call holds, though somebody keeps the exception.

    A notebook keeps the traceback of a cell that was interrupted, and a traceback all frames: their
    tensors would stay while the next cell goes on, and so would contexts of suspended generators.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        traceback.clear_frames(interrupt.__traceback__)
        gc.collect()
        raise
