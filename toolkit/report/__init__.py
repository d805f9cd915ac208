"""From a run to the folder that it leaves, and back.

`headline` is the answer in a sentence, `page` the HTML report, `folder` writes tables, figures,
adapters, ``run.json`` and the report, and reads them again.
"""

from toolkit.report.folder import publish, read_run

__all__ = ["publish", "read_run"]
