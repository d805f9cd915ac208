"""Adapters in the formats of those who serve models, with what is lost on the way measured.

A format is one file with one class of `Format`, and its name in `FORMATS`. It says of given
adapters whether it holds them exactly, which nearest adapters it holds instead, or why it holds
none; and it writes what it holds. `export` refuses what is not exact, or writes it when it is asked
to and measures the difference.
"""

from toolkit.export.format import Base, Fidelity, Format
from toolkit.export.formats import FORMATS
from toolkit.export.write import export

__all__ = ["FORMATS", "Base", "Fidelity", "Format", "export"]
