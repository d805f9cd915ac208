"""The tables of a run: their columns, their files, their figures and the sentence each one says.

A table is rows with the columns of the output contract. Plots draw a table and compute nothing.
"""

from toolkit.tables.store import read_table, read_tables, write_tables
from toolkit.tables.table import Table

__all__ = ["Table", "read_table", "read_tables", "write_tables"]
