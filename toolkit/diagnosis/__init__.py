"""The diagnosis of a pair: one march, every analysis, every candidate, one answer.

`options` says what can be asked for, `grid` which adapters are fitted, `survey` what happens in a
block, `workspace` how an interrupted run goes on, `run` what comes out, `headline` the
answer in a sentence; `diagnose` leads through it.
"""

from toolkit.diagnosis.diagnose import diagnose
from toolkit.diagnosis.options import Options
from toolkit.diagnosis.run import Run
from toolkit.diagnosis.workspace import Workspace

__all__ = ["Options", "Run", "Workspace", "diagnose"]
