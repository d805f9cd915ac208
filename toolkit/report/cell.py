"""A run's report as the output of a notebook's cell."""

from dataclasses import dataclass

from markupsafe import Markup

from toolkit.diagnosis.run import Run
from toolkit.report.page import render
from toolkit.tables.drawing import svg


@dataclass(frozen=True)
class Page:
    """A whole page of HTML, which a notebook shows in a frame of its own."""

    html: str

    def _repr_html_(self) -> str:
        # The frame is sandboxed: the page has no scripts, and needs none.
        return Markup(
            '<iframe sandbox="" style="width:100%;height:80vh;border:0" srcdoc="{}"></iframe>'
        ).format(self.html)


def show(run: Run) -> Page:
    """Show the report of `run`, the page that ``report.html`` is, in the cell's output."""
    drawn = {name: svg(table.plot(run.noise)) for name, table in run.tables.items()}
    return Page(render(run, drawn))
