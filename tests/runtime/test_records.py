"""Records come back as they were written, and a failed write leaves what was there."""

import pytest

from toolkit.runtime.records import read_lines, write_lines

ROWS = [{"name": "Zürich\u2028See", "share": 0.1}, {"name": "none", "share": float("nan")}]


def test_lines_come_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_lines(path) == []
    write_lines(ROWS, path)
    assert read_lines(path) == [ROWS[0], {"name": "none", "share": None}]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_lines(ROWS, path)
    with pytest.raises(TypeError):
        write_lines([{"name": object()}], path)
    assert len(read_lines(path)) == 2
