"""A finished run on disk: its tables are what was written."""

import json

import torch

from tests.support import tiny
from toolkit import Options, diagnose
from toolkit.runtime.records import write_json
from toolkit.tables.store import read_tables, write_tables

DOCUMENTS = tiny.make_documents(14)
OPTIONS = Options(new_tokens=4, sample=2)


def test_tables_survive_their_files(llama_pair, tmp_path):
    """Floats are exact, and ranks and layers keep their kinds."""
    tables = diagnose(llama_pair, DOCUMENTS, OPTIONS, show_progress=False).tables
    write_tables(tables.values(), tmp_path)
    found = read_tables(tmp_path)
    for table in tables.values():
        read = found[table.name].frame
        for name in table.frame.columns:
            ours, theirs = table.frame[name], read[name]
            if ours.dtype.kind == "f":
                torch.testing.assert_close(
                    torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=0, equal_nan=True
                )
            else:
                assert ours.tolist() == theirs.tolist(), (table.name, name)


def test_json_holds_no_number_that_json_lacks(tmp_path):
    write_json({"a": [float("nan"), float("inf"), 1.5], "b": 2}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, None, 1.5], "b": 2}
