"""From a run to the folder that it leaves: figures, the HTML page, the answer in a sentence."""

from toolkit.report.folder import publish, read_run

__all__ = ["publish", "read_run"]
