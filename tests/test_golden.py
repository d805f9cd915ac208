"""Runs give the tables that they gave before, and what earlier code left interrupted goes on."""

import json
import shutil
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import tiny
from toolkit import Options, diagnose
from toolkit.diagnosis.workspace import Workspace
from toolkit.jobs.diagnose import Job, run_job
from toolkit.runtime.shipped import shipped
from toolkit.tables.store import read_table

GOLDEN = Path(__file__).parent / "golden"
ROUNDING = {"rtol": 2e-2, "atol": 2e-3}  # of float32 sums on another machine, at the worst


def is_the_machine():
    """Whether files can be the same byte for byte: the processor and versions of the golden run."""
    made = json.loads((GOLDEN / "made_on.json").read_text())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    said = dict(reversed([[part.strip() for part in x.split(":", 1)] for x in lines if ":" in x]))
    processor = {name: said.get(name) for name in made["processor"]}
    versions = {name: metadata.version(name) for name in made["versions"]}
    same = (processor, versions) == (made["processor"], made["versions"])
    return same and torch.get_num_threads() == 1


def inputs(pair, folder):
    """The base, the tuned model and the documents of a golden run, and how many tokens to make."""
    if pair == "listops":
        models = shipped("tiny-listops")
        return models / "base", models / "tuned", GOLDEN / "listops.jsonl", 6
    tiny.save_request(folder, "gemma3", torch.float32, 24)
    return folder / "base", folder / "tuned", folder / "data.jsonl", 4


@pytest.mark.parametrize("pair", ["listops", "gemma3"])
def test_tables_are_those_of_the_code_before(pair, tmp_path):
    base, tuned, data, n_new = inputs(pair, tmp_path)
    options = Options(new_tokens=n_new, sample=1, shared_sample=16)
    run_job(Job(str(base), str(tuned), data, tmp_path / "run", options, show=False))
    names = sorted(path.stem for path in (GOLDEN / pair).glob("*.csv"))
    assert len(names) == 15
    for name in names:
        ours, theirs = tmp_path / "run" / "tables", GOLDEN / pair
        if is_the_machine():
            assert (ours / f"{name}.csv").read_bytes() == (theirs / f"{name}.csv").read_bytes()
        assert_close(read_table(ours, name).frame, read_table(theirs, name).frame, name)


def assert_close(ours, theirs, name):
    """The same rows and words; numbers but for rounding."""
    assert list(ours.columns) == list(theirs.columns)
    assert len(ours) == len(theirs)
    for column in ours:
        if ours[column].dtype == float:
            a, b = ours[column].to_numpy(), theirs[column].to_numpy()
            scale = np.nanmax(np.abs(b), initial=1.0)
            assert np.allclose(a / scale, b / scale, equal_nan=True, **ROUNDING), (name, column)
        else:
            assert ours[column].astype(str).equals(theirs[column].astype(str)), (name, column)


def test_an_interrupted_run_of_the_code_before_goes_on(llama_pair, tmp_path):
    """Two blocks are read; the tables are those of a run that is made anew."""
    shutil.copytree(GOLDEN / "workspace" / "run_partial", tmp_path / "run.partial")
    documents = tiny.make_documents(14)
    options = Options(new_tokens=4, sample=1, shared_sample=0)
    workspace = Workspace(tmp_path / "run", {"options": 1})
    assert workspace.open()
    assert [result.layer for result in workspace.march.passed()] == [0, 1]
    resumed = diagnose(llama_pair, documents, options, show_progress=False, workspace=workspace)
    assert len(workspace.march.passed()) == tiny.N_LAYERS
    plain = diagnose(llama_pair, documents, options, show_progress=False)
    for a, b in zip(plain.tables.values(), resumed.tables.values(), strict=True):
        assert_close(a.frame, b.frame, a.name)
