"""Tables as pictures: aligned columns, thin rules."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from toolkit.draw import BLACK, GREY

ROW = 0.25  # inches
SIZE, MARK_SIZE = 10.5, 8.5


class Cell(NamedTuple):
    """A value and what stands small behind it; a faint one is grey and slanted."""

    value: str
    mark: str = ""
    faint: bool = False


Row = Sequence[str | Cell] | str  # one cell a column, or the heading of what follows


def table_height(rows: Sequence[Row], notes: int = 0) -> float:
    """Inches that `draw_table` needs for its head, `rows` and so many lines of notes."""
    return (len(rows) + notes + 1.8) * ROW


def draw_table(
    axes: Axes, head: Sequence[str], rows: Sequence[Row], ends: Sequence[float], notes: str = ""
) -> None:
    """Typeset `rows` under `head`, and lines of `notes` below.

    The first column begins at the left; every other column's values end at its share of the width
    in `ends`, with their marks behind. A value "" leaves a cell empty.
    """
    n_notes = len(notes.splitlines())
    axes.set(xlim=(0, 1), ylim=(len(rows) + n_notes + 1.6, -0.2))
    axes.set_axis_off()
    _line(axes, 0.4, [Cell(words) for words in head], ends, weight="bold")
    for y in (0.9, len(rows) + 1.0):
        axes.axhline(y, color=BLACK, linewidth=0.9)
    for index, row in enumerate(rows):
        y = index + 1.5
        if isinstance(row, str):
            if index:
                axes.axhline(y - 0.5, color=GREY, linewidth=0.5)
            axes.text(0, y, row, va="center_baseline", size=SIZE, style="italic")
        else:
            cells = [Cell(cell) if isinstance(cell, str) else cell for cell in row]
            _line(axes, y, cells, ends)
    axes.text(0, len(rows) + 1.2, notes, va="top", size=MARK_SIZE + 0.5, color="#555555")


def _line(
    axes: Axes, y: float, cells: Sequence[Cell], ends: Sequence[float], weight: str = "normal"
) -> None:
    """One row of cells, its middle at `y`."""
    for index, (cell, end) in enumerate(zip(cells, (0.0, *ends), strict=True)):
        axes.text(
            end, y, cell.value, ha="right" if index else "left", va="center_baseline", size=SIZE,
            weight=weight, color=GREY if cell.faint else BLACK,
            style="italic" if cell.faint else "normal",
        )  # fmt: skip
        axes.text(end + 0.006, y, cell.mark, va="center_baseline", size=MARK_SIZE, color="#555555")
