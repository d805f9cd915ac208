"""The recipe of data/demo-run and data/gemma-run, on a tiny pair; and what it left."""

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.support import tiny
from tests.support.recipes import load_recipe
from toolkit.diagnosis.options import Options
from toolkit.tables.spec import specs

recipe = load_recipe("shipped_runs")


def test_a_run_is_kept_in_place_of_what_is_there(tmp_path):
    run, folder = tmp_path / "run", tmp_path / "kept"
    for place, content in ((run, "new"), (folder, "old")):
        (place / "tables").mkdir(parents=True)
        (place / "tables" / f"{content}.csv").write_text(content)
        for name in ("run.json", "report.json"):
            (place / name).write_text(json.dumps({"is": content, "commands": {}, "paths": {}}))
    (run / "report.html").write_text("new")
    recipe.keep(run, folder)
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.*")}
    assert found.pop("tables/new.csv") == "new"
    kept = {name: json.loads(text) for name, text in found.items()}
    assert kept == {name: {"is": "new"} for name in ("run.json", "report.json")}


def test_a_kept_record_names_no_place_of_this_machine():
    task = {"name": "arc-easy", "file": "/home/me/test.jsonl"}
    record = {"data": {"file": "/tmp/x/documents.jsonl"}, "other_data": {"task": task}}
    found = recipe.portable(record)
    assert found["data"]["file"] == "documents.jsonl"
    assert found["other_data"]["task"]["file"] == "test.jsonl"
    relative = {"data": {"file": "data/gsm8k-demo.jsonl"}}
    assert recipe.portable(relative) == relative


@pytest.mark.parametrize("name", recipe.RUNS)
def test_what_ships_was_run_with_these_options(name):
    base, tuned, options = recipe.RUNS[name]
    info = json.loads((recipe.ROOT / "data" / name / "run.json").read_text())
    assert Options(**info["options"]) == Options(**options)
    assert (info["base"]["name"], info["tuned"]["name"]) == (base, tuned)
    documents = Path(recipe.ARC_FILE) if name == recipe.ARC_RUN else recipe.DOCUMENTS
    assert Path(info["data"]["file"]) == documents


def test_the_recipe_runs(tmp_path, monkeypatch):
    tiny.save_request(tmp_path)
    small = {"sample": 2, "shared_sample": 16, "new_tokens": 4}
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    monkeypatch.setattr(recipe, "DOCUMENTS", Path("data.jsonl"))
    monkeypatch.setattr(recipe, "RUNS", {"run": ("base", "tuned", small)})
    monkeypatch.setattr("sys.argv", ["shipped_runs.py", "run", "--out", str(tmp_path / "data")])
    monkeypatch.chdir(tmp_path)
    recipe.main()
    info = json.loads((tmp_path / "data" / "run" / "run.json").read_text())
    assert (info["base"]["name"], info["data"]["file"]) == ("base", "data.jsonl")
    assert {path.stem for path in (tmp_path / "data" / "run" / "tables").iterdir()} == set(specs())
    assert len(pd.read_csv(tmp_path / "data" / "run" / "tables" / "norms.csv"))
