"""Tables as figures: aligned columns, thin rules, sections and a note."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

import matplotlib
from matplotlib.axes import Axes

from toolkit.tables.drawing import BLACK, GREY, STYLE, WIDTH, Plot

ROW, RULE_GAP, FONT = 0.27, 0.62, 10.0  # a row's height in inches; part of a row; points


@dataclass(frozen=True)
class Section:
    """Rows under a heading of their own; the first cell of a row is its label."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    @property
    def n_rows(self) -> float:
        """Its height, in rows."""
        return len(self.rows) + 2 * RULE_GAP + 0.5


def draw_table(title: str, sections: Sequence[Section], widths: Sequence[float], note: str) -> Plot:
    """`widths` are the columns' shares of the width; all but the first are set to the right."""
    lines = [line for part in note.split("\n") for line in wrap(part, 108)]
    n_rows = sum(section.n_rows for section in sections) + 1.6 + 0.8 * len(lines)
    with matplotlib.rc_context(STYLE):
        figure = Plot(figsize=(WIDTH * 1.25, ROW * n_rows))
        axes = figure.add_axes((0.02, 0.01, 0.96, 0.98))
        clear(axes, n_rows)
        axes.text(0, 0.7, title, fontsize=12, weight="bold", va="center")
        y = 2.0
        for section in sections:
            y = draw_section(axes, section, widths, y)
        for line in lines:
            axes.text(0, y, line, fontsize=8.6, color="#555555", va="center")
            y += 0.8
    return figure


def clear(axes: Axes, n_rows: float) -> None:
    """Make `axes` a page of so many rows, from the top down."""
    axes.set(xlim=(0, 1), ylim=(n_rows, 0))
    axes.axis("off")


def draw_section(axes: Axes, section: Section, widths: Sequence[float], y: float) -> float:
    """Draw it from row `y` down; where the next begins."""
    axes.text(0, y, section.title, fontsize=FONT, weight="bold", color="#333333", va="center")
    _cells(axes, section.header, widths, y, color="#555555", first=False)
    y += RULE_GAP
    axes.axhline(y, color=BLACK, linewidth=0.9)
    y += RULE_GAP
    for row in section.rows:
        _cells(axes, row, widths, y, color=BLACK)
        y += 1
    axes.axhline(y - 1 + RULE_GAP, color=GREY, linewidth=0.5)
    return y + 0.5


def _cells(
    axes: Axes, cells: Sequence[str], widths: Sequence[float], y: float, color: str,
    first: bool = True,
) -> None:  # fmt: skip
    right, total = 0.0, sum(widths)
    for place, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        right += width / total
        if place == 0:
            if first:
                axes.text(0.01, y, cell, fontsize=FONT, color=color, va="center")
        else:
            axes.text(right, y, cell, fontsize=FONT, color=color, va="center", ha="right")
