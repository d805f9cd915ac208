"""The memory that a piece of work takes while it runs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

INTERVAL = 0.02  # seconds between two looks


@contextmanager
def watched(peaks: list[int]) -> Iterator[None]:
    """Append the most bytes that are taken inside, beyond what there was, to `peaks`."""
    process, done, peak = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(INTERVAL):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    peaks.append(peak[0])
