"""From a run to the folder that it leaves, and back.

`page` is the HTML report, `cell` shows it in a notebook, `verdict` and `where` are parts of it;
`folder` writes tables, figures, adapters, ``run.json`` and the report, and reads them again.
"""

from toolkit.report.cell import show
from toolkit.report.folder import publish, read_run

__all__ = ["publish", "read_run", "show"]
