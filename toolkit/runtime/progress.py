"""Progress of long work, with the time that is left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[], None]


class Bar:
    """A bar on the terminal: called after each step."""

    def __init__(self, bar: Progress, title: str, total: int) -> None:
        self._bar, self._task = bar, bar.add_task(title, total=total)

    def __call__(self) -> None:
        self._bar.advance(self._task)

    def say(self, line: str) -> None:
        """Print a line above the bar, which stays."""
        if not self._bar.disable:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(title: str, total: int, shown: bool = True) -> Iterator[Bar]:
    """Yield a bar to call after each of `total` steps; it is on stderr if `shown`."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        yield Bar(bar, title, total)
