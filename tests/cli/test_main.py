"""The commands as a user gives them, on tiny models in folders."""

import json
import runpy
import shutil

import pandas as pd
import pytest
import torch

from tests.support import tiny
from tests.support.commands import oracle
from tests.support.pictures import save_blank
from toolkit import Adapters, ModelPair, steer
from toolkit.tables import drawing
from toolkit.tables.spec import specs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and a tuned model's folder, and a data file."""
    return tiny.save_request(tmp_path_factory.mktemp("models"))


def diagnose(folders, out, *more):
    data = ("--data", folders / "data.jsonl", "--out", out)
    small = ("--new-tokens", 4, "--sample", 2, "--quiet")
    return oracle("diagnose", folders / "base", folders / "tuned", *data, *small, *more)


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    result = diagnose(folders, out, "--keep-statistics")
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def blank_pictures(monkeypatch):
    """Drawing takes most of the time of redoing a run: two of the tests here draw."""
    monkeypatch.setattr(drawing, "save", save_blank)


def test_diagnose_writes_what_the_contract_says(finished):
    for name, spec in specs().items():
        frame = pd.read_csv(finished / "tables" / f"{name}.csv")
        assert frame.columns.tolist() == list(spec.columns)
        assert (finished / "figures" / f"{name}.svg").stat().st_size > 0
        assert (finished / "figures" / f"{name}.png").stat().st_size > 0
    info = json.loads((finished / "run.json").read_text())
    assert info["data"]["fit"]["documents"] + info["data"]["held_out"]["documents"] == 20
    assert len(info["data"]["sha256"]) == 64
    assert not finished.with_name("run.partial").exists()
    assert "<script" not in (finished / "report.html").read_text()


def test_recommended_adapters_steer(finished, folders):
    report = json.loads((finished / "report.json").read_text())
    adapters = Adapters.from_pretrained(finished / "adapters")
    assert adapters.location == report["run"]["recommendation"]["location"]
    share = report["run"]["recommendation"]["reported"]
    assert adapters.info["recovered"]["low"] == share["low"]
    card = (finished / "adapters" / "README.md").read_text()
    assert f"recovered: {share['estimate']:.3f} (95 % interval {share['low']:.3f} to" in card
    pair = ModelPair.load(folders / "base", folders / "tuned")
    ids = torch.arange(5, 15)[None]
    plain = pair.base(input_ids=ids).logits
    with steer(pair.base, adapters):
        assert not torch.equal(pair.base(input_ids=ids).logits, plain)
    assert torch.equal(pair.base(input_ids=ids).logits, plain)


def test_from_redoes_a_run_without_models(finished, tmp_path):
    result = oracle("diagnose", "--from", finished, "--out", tmp_path / "again")
    assert result.exit_code == 0, result.output
    for name in specs():
        ours, theirs = (
            pd.read_csv(d / "tables" / f"{name}.csv") for d in (finished, tmp_path / "again")
        )
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_finished_run_is_not_overwritten_unasked(finished, folders):
    result = diagnose(folders, finished)
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr


BAD = {
    "no data file": (["--data", "nowhere.jsonl"], "no such data file"),
    "positions": (["--positions", "middle"], "expected all, response, last"),
    "dtype": (["--dtype", "int8"], "expected one of float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, folders, tmp_path):
    arguments, expected = BAD[name]
    result = diagnose(folders, tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert expected in result.stderr
    assert not list(tmp_path.iterdir())


def test_too_few_documents_leave_nothing(folders, tmp_path):
    data = tmp_path / "one.txt"
    data.write_text("w5 w6 w7\n")
    result = diagnose(folders, tmp_path / "out", "--data", data)
    assert result.exit_code == 2
    assert "at least 2" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["one.txt"]


def test_module_is_the_command(monkeypatch, capsys):
    """As ``python -m toolkit --help`` runs it, without importing all that it imports again."""
    monkeypatch.setattr("sys.argv", ["toolkit", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("toolkit", run_name="__main__", alter_sys=True)
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "diagnose" in said
    assert "demo" in said


@pytest.mark.usefixtures("blank_pictures")
def test_from_writes_over_nobodys_files(finished, tmp_path):
    kept = tmp_path / "mine" / "report.html"
    kept.parent.mkdir()
    kept.write_text("mine")
    result = oracle("diagnose", "--from", finished, "--out", tmp_path / "mine")
    assert (result.exit_code, kept.read_text()) == (2, "mine")
    assert "is not a run" in result.stderr
    shutil.copytree(finished, tmp_path / "other")
    (tmp_path / "other" / "tables" / "stale.csv").write_text("")
    result = oracle("diagnose", "--from", finished, "--out", tmp_path / "other")
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    result = oracle("diagnose", "--from", finished, "--out", tmp_path / "other", "--overwrite")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "other" / "tables" / "stale.csv").exists()
    inside = oracle("diagnose", "--from", finished / "x", "--out", finished)
    assert inside.exit_code == 2


@pytest.mark.usefixtures("blank_pictures")
def test_a_run_that_is_redone_elsewhere_names_its_inputs_from_there(finished, folders, tmp_path):
    out = tmp_path / "deep" / "again"
    assert oracle("diagnose", "--from", finished, "--out", out).exit_code == 0
    paths = json.loads((out / "run.json").read_text())["paths"]
    assert (out / paths["base"]).resolve() == (folders / "base").resolve()
    assert (out / paths["data"]).resolve() == (folders / "data.jsonl").resolve()
    assert paths["data"] in json.loads((out / "report.json").read_text())["commands"]["distil"]


def test_options_without_a_meaning_are_refused(finished, folders, tmp_path):
    result = oracle("diagnose", "--from", finished, "--max-kl", 0.1, "--out", tmp_path / "again")
    assert result.exit_code == 2
    assert "--from takes no --max-kl" in result.stderr
    result = diagnose(folders, tmp_path / "out", "--steps", 5)
    assert result.exit_code == 2
    assert "--steps belongs to --train" in result.stderr
    assert not list(tmp_path.iterdir())
