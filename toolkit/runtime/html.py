"""Pieces of HTML that objects show as a notebook's cell output; every text in them is escaped."""

import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any

from markupsafe import Markup


def card(title: str, *parts: Markup) -> str:
    """Return an object's view: `title`, which is the answer, and the parts below it."""
    return Markup("<div><p><b>{}</b></p>{}</div>").format(title, Markup().join(parts))


def paragraph(text: str) -> Markup:
    """Return `text` as a paragraph."""
    return Markup("<p>{}</p>").format(text)


def facts(values: Mapping[str, Any]) -> Markup:
    """Return names with their values, a row each."""
    row = Markup('<tr><th style="text-align:left">{}</th><td style="text-align:left">{}</td></tr>')
    rows = (row.format(name, cell(value)) for name, value in values.items())
    return Markup("<table>{}</table>").format(Markup().join(rows))


def grid(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markup:
    """Return rows of cells under `header`; what is wider than the page scrolls."""
    line = lambda tag, cells: Markup("<tr>{}</tr>").format(  # noqa: E731
        Markup().join(Markup(f"<{tag}>{{}}</{tag}>").format(cell(value)) for value in cells)
    )
    body = Markup().join(line("td", cells) for cells in rows)
    return Markup('<div style="overflow-x:auto"><table>{}{}</table></div>').format(
        line("th", header), body
    )


def cell(value: Any) -> str:
    """Write a value briefly: four digits of a number, thousands apart, nothing for what is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def picture(figure: Any, name: str) -> Markup:
    """Return a matplotlib figure as an image inside the page."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=100)
    source = "data:image/png;base64," + b64encode(file.getvalue()).decode()
    return Markup('<img style="max-width:100%" alt="{}" src="{}">').format(name, source)
