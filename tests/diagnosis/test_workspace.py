"""A run on disk: resumed after an interruption, and never finished-looking before it is."""

import json

import pytest

from tests.support import families, tiny
from toolkit import InputError, ModelPair, Options, diagnose
from toolkit.diagnosis.workspace import Workspace, refuse_existing, working_in
from toolkit.fitting.block_result import KeptMarch

DOCUMENTS = tiny.make_documents(14)
OPTIONS = Options(new_tokens=4, sample=2)


class KilledError(Exception):
    """Stands for a killed process."""


class Interrupted(Workspace):
    """A workspace whose process ends after so many blocks."""

    def __init__(self, *args, stop_after=None):
        super().__init__(*args)
        self.stop_after, self.marched = stop_after, []

    @property
    def march(self):
        kept, workspace = super().march, self

        class March(KeptMarch):
            def finished(self, result):
                super().finished(result)
                workspace.marched.append(result.layer)
                if result.layer == workspace.stop_after:
                    raise KilledError

        return March(kept.folder, kept.processes)


def run(pair, workspace):
    workspace.open()
    return diagnose(pair, DOCUMENTS, OPTIONS, show_progress=False, workspace=workspace)


@pytest.mark.parametrize("stop_after", [0, 1, tiny.N_LAYERS - 1])
def test_resumed_run_equals_an_uninterrupted_one(llama_pair, tmp_path, stop_after):
    plain = diagnose(llama_pair, DOCUMENTS, OPTIONS, show_progress=False)
    asked = tmp_path / "run", {"options": 1}
    with pytest.raises(KilledError):
        run(llama_pair, Interrupted(*asked, stop_after=stop_after))
    assert not (tmp_path / "run").exists()
    second = Interrupted(*asked)
    resumed = run(llama_pair, second)
    assert second.marched == list(range(stop_after + 1, tiny.N_LAYERS))
    for a, b in zip(plain.tables.values(), resumed.tables.values(), strict=True):
        assert a.frame.astype(str).equals(b.frame.astype(str)), a.name


def test_a_march_whose_blocks_read_earlier_ones_begins_anew(tmp_path):
    """The keys and values that later blocks of Gemma 4 read are not kept."""
    families.save_pair("gemma4_text", tmp_path)
    pair = ModelPair.load(tmp_path / "base", tmp_path / "tuned")
    plain = diagnose(pair, DOCUMENTS, OPTIONS, show_progress=False)
    asked = tmp_path / "run", {"options": 1}
    with pytest.raises(KilledError):
        run(pair, Interrupted(*asked, stop_after=2))
    second = Interrupted(*asked)
    resumed = run(pair, second)
    assert second.marched == [0, 1, 2, 3]
    for a, b in zip(plain.tables.values(), resumed.tables.values(), strict=True):
        assert a.frame.astype(str).equals(b.frame.astype(str)), a.name


def test_what_was_compared_is_not_compared_again(llama_pair, tmp_path, monkeypatch):
    """A second start reads what each candidate gave."""
    first = run(llama_pair, Workspace(tmp_path / "run", {"options": 1}))
    for name in ("prefill", "greedy", "continuation_logits", "whole_logits"):
        monkeypatch.setattr(f"toolkit.evaluation.compare.{name}", None)
    second = run(llama_pair, Workspace(tmp_path / "run", {"options": 1}))
    for a, b in zip(first.tables.values(), second.tables.values(), strict=True):
        assert a.frame.astype(str).equals(b.frame.astype(str)), a.name


def test_another_request_starts_anew(llama_pair, tmp_path):
    run(llama_pair, Workspace(tmp_path / "run", {"options": 1}))
    assert Workspace(tmp_path / "run", {"options": 1}).open()
    other = Workspace(tmp_path / "run", {"options": 2})
    assert not other.open()
    assert not list(other.march.folder.iterdir())


@pytest.mark.parametrize(
    ("documents", "options", "goes_on"),
    [
        (DOCUMENTS, OPTIONS, True),
        (DOCUMENTS[:-1], OPTIONS, False),
        (DOCUMENTS, Options(new_tokens=5, sample=2), False),
    ],
    ids=["same", "other documents", "other options"],
)
def test_a_path_goes_on_with_the_same_request(llama_pair, tmp_path, documents, options, goes_on):
    place, made = tmp_path / "mine", tmp_path / "mine.partial" / "made"

    def interrupted():
        made.touch()
        raise KeyboardInterrupt

    first = llama_pair.corpus(DOCUMENTS)
    with pytest.raises(KeyboardInterrupt), working_in(place, llama_pair, first, OPTIONS):
        interrupted()
    with working_in(str(place), llama_pair, llama_pair.corpus(documents), options) as workspace:
        assert workspace.folder == made.parent
        assert made.exists() == goes_on
    assert list(tmp_path.iterdir()) == [], "a complete run leaves nothing"


def test_bad_input_leaves_no_folder(llama_pair, tmp_path):
    corpus = llama_pair.corpus(DOCUMENTS)
    with pytest.raises(InputError), working_in(tmp_path / "mine", llama_pair, corpus, OPTIONS):
        raise InputError("bad")
    assert list(tmp_path.iterdir()) == []


def test_a_finished_folder_keeps_nothing_of_its_making(llama_pair, tmp_path):
    """And takes the place of an earlier run's, whenever the process is killed on the way."""
    out = tmp_path / "run"
    for content in ("first", "second"):
        workspace = Workspace(out, {"options": content})
        workspace.open()
        (workspace.folder / "run.json").write_text(content)
        workspace.close()
        assert [path.name for path in out.iterdir()] == ["run.json"]
        assert (out / "run.json").read_text() == content
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


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
