"""A run on disk: resumed after an interruption, and never finished-looking before it is."""

import json

import pytest
import torch

from tests import tiny
from toolkit import InputError, Options, diagnose
from toolkit.diagnose import Listeners
from toolkit.store import Workspace, read_tables, refuse_existing, write_json, write_tables

DOCUMENTS = tiny.make_documents(14)
OPTIONS = Options(new_tokens=4, sample=2)


class KilledError(Exception):
    """Stands for a killed process."""


def run(pair, workspace, stop_after=None):
    def finished(survey, march):
        workspace.finished(survey, march)
        if survey.layer == stop_after:
            raise KilledError

    workspace.open()
    listeners = Listeners(finished, workspace.resume, workspace.keep)
    return diagnose(pair, DOCUMENTS, OPTIONS, show_progress=False, listeners=listeners)


@pytest.mark.parametrize("stop_after", [0, 1, tiny.N_LAYERS - 1])
def test_resumed_run_equals_an_uninterrupted_one(llama_pair, tmp_path, stop_after):
    plain = diagnose(llama_pair, DOCUMENTS, OPTIONS, show_progress=False)
    workspace = Workspace(tmp_path / "run", {"options": 1})
    with pytest.raises(KilledError):
        run(llama_pair, workspace, stop_after)
    assert not workspace.out.exists()
    marched = []
    original = workspace.finished
    workspace.finished = lambda survey, march: (
        marched.append(survey.layer),
        original(survey, march),
    )
    resumed = run(llama_pair, workspace)
    assert marched == list(range(stop_after + 1, tiny.N_LAYERS))
    for a, b in zip(plain.tables, resumed.tables, strict=True):
        assert a.frame.astype(str).equals(b.frame.astype(str)), a.name


def test_another_request_starts_anew(tmp_path):
    first = Workspace(tmp_path / "run", {"options": 1})
    first.open()
    (first.folder / "march" / "streams.safetensors").write_bytes(b"")
    assert Workspace(tmp_path / "run", {"options": 1}).open()
    assert not Workspace(tmp_path / "run", {"options": 2}).open()
    assert not list((first.folder / "march").iterdir())


def test_tables_survive_their_files(llama_pair, tmp_path):
    """Floats are exact, and ranks and layers keep their kinds."""
    tables = diagnose(llama_pair, DOCUMENTS, OPTIONS, show_progress=False).tables
    write_tables(tables, tmp_path)
    for table in tables:
        read = read_tables(tmp_path)[table.name].frame
        for name in table.frame.columns:
            ours, theirs = table.frame[name], read[name]
            if ours.dtype.kind == "f":
                torch.testing.assert_close(
                    torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=0, equal_nan=True
                )
            else:
                assert ours.tolist() == theirs.tolist(), (table.name, name)


def test_a_folder_that_is_not_a_run_is_never_replaced(tmp_path):
    out = tmp_path / "notes"
    refuse_existing(out, overwrite=False)
    out.mkdir()
    refuse_existing(out, overwrite=False)
    (out / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is not a run"):
            refuse_existing(out, overwrite)
    finished = tmp_path / "finished"
    finished.mkdir()
    (finished / "run.json").write_text(json.dumps({}))
    with pytest.raises(InputError, match="--overwrite"):
        refuse_existing(finished, overwrite=False)
    refuse_existing(finished, overwrite=True)


def test_json_holds_no_number_that_json_lacks(tmp_path):
    write_json({"a": [float("nan"), float("inf"), 1.5], "b": 2}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, None, 1.5], "b": 2}
