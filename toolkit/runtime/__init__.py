"""The machine and the process: nothing here knows what a model is.

Progress on the terminal, checks kept for the report, several processes that work as one, atomic
records, where numbers come from, and the two places where the machine itself is in the way (the C
library's heap and LAPACK's threads). Anything may use this room; it uses `errors` alone.
"""

from toolkit.runtime.check import Check, check
from toolkit.runtime.processes import ALONE, LostProcessError, Processes, joined
from toolkit.runtime.progress import progress
from toolkit.runtime.provenance import Stages, commit, machine, stamp, versions
from toolkit.runtime.records import write_json

__all__ = [
    "ALONE",
    "Check",
    "LostProcessError",
    "Processes",
    "Stages",
    "check",
    "commit",
    "joined",
    "machine",
    "progress",
    "stamp",
    "versions",
    "write_json",
]
