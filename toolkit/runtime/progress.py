"""Progress of long work, with the time that is left: on the terminal, or in a notebook's cell."""

import io
import time
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

CELL_WIDTH = 100  # characters of a cell's line
REDRAWN = 0.25  # seconds after which a cell's line is drawn again


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


class CellBar(Bar):
    """A bar that is one line of a cell's output, drawn again in its place.

    It is plain text, which stays and is saved with the notebook; rich's own would be a widget,
    which does not and is not. No thread draws it: nothing is left running in a cell that ended.
    """

    def __init__(self, bar: Progress, title: str, total: int) -> None:
        from IPython.display import display  # is there where a cell is

        super().__init__(bar, title, total)
        self._drawn = time.monotonic()
        self._shown = display(self._line(), raw=True, display_id=True)

    def __call__(self) -> None:
        super().__call__()
        if time.monotonic() - self._drawn > REDRAWN:
            self.draw()

    def say(self, line: str) -> None:
        """Print a line below the bar, and below those that were said before."""
        print(line)

    def draw(self) -> None:
        """Draw the line as it is now."""
        self._shown.update(self._line(), raw=True)
        self._drawn = time.monotonic()

    def _line(self) -> dict[str, str]:
        page = Console(file=io.StringIO(), width=CELL_WIDTH, color_system=None, force_jupyter=False)
        with page.capture() as drawn:
            page.print(self._bar.get_renderable())
        return {"text/plain": drawn.get().rstrip()}


@contextmanager
def progress(title: str, total: int, shown: bool = True) -> Iterator[Bar]:
    """Yield a bar, on stderr or in a cell if `shown`, to call after each of `total` steps."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    if shown and console.is_jupyter:
        cell = CellBar(Progress(*columns, disable=True), title, total)  # rich counts, we draw
        try:
            yield cell
        finally:
            cell.draw()
        return
    with Progress(*columns, console=console, disable=not shown) as bar:
        yield Bar(bar, title, total)
