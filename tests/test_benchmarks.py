"""The benchmarks' page says what their results say."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "benchmarks"
SCRIPTS = {path.stem for path in FOLDER.glob("*.py")}
RESULTS = sorted((FOLDER / "results").glob("*.json"))


def test_the_page_is_that_of_the_results(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    from page import PAGE, page

    assert PAGE.read_text("utf-8") == page()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_where_it_is_from(path):
    result = json.loads(path.read_text("utf-8"))
    script = result["command"].split()[1]
    assert Path(script).stem in SCRIPTS
    assert all(len(row) == len(result["columns"]) for row in result["rows"])
    assert {"torch", "transformers"} <= set(result["versions"])
    assert result["machine"]["cores"] >= 1
