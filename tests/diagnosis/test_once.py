"""Nothing is done twice in a run: the file, the tokens, the tuned model's answers, the marches."""

import json

import pytest

from tests.support import tiny
from toolkit import Options
from toolkit.fitting.block_result import KeptMarch
from toolkit.jobs.diagnose import Job, run_job

OPTIONS = Options(new_tokens=4, sample=1, shared_sample=0, max_kl=1e-9)


class Counter:
    """Counts the calls of a function, by what `key` makes of their arguments."""

    def __init__(self, monkeypatch, path, key=lambda *_: "calls"):
        module, _, name = path.rpartition(".")
        self.found = {}
        function = vars(__import__(module, fromlist=[name]))[name]

        def counted(*args, **kwargs):
            self.found[key(*args)] = self.found.get(key(*args), 0) + 1
            return function(*args, **kwargs)

        monkeypatch.setattr(path, counted)


def job(folder, out, options=OPTIONS):
    paths = str(folder / "base"), str(folder / "tuned"), folder / "data.jsonl", folder / out
    return Job(*paths, options, show=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_request(tmp_path_factory.mktemp("once"), n_documents=24)


def test_a_run_reads_tokenises_and_generates_once(folder, monkeypatch):
    files = Counter(monkeypatch, "toolkit.documents.corpus.read_bytes", str)
    tokens = Counter(monkeypatch, "toolkit.documents.tokens.encode", lambda d, *_: d.content)
    greedy = Counter(
        monkeypatch,
        "toolkit.evaluation.reference.greedy",
        lambda model, prompts, *_: str(prompts.ids.tolist()),
    )
    batches = Counter(monkeypatch, "toolkit.documents.corpus.make_batches", lambda d, *_: len(d))
    parts = Counter(monkeypatch, "toolkit.blocks.read.module_change")
    marches = Counter(monkeypatch, "toolkit.diagnosis.survey.march_through")
    looks = Counter(monkeypatch, "toolkit.evaluation.allocation.march_through")
    run = run_job(job(folder, "counted"))
    lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    different = {line.get("text") or f"{line['prompt']}\n{line['response']}" for line in lines}
    assert list(files.found.values()) == [1]
    assert set(tokens.found) == different
    assert set(tokens.found.values()) == {1}
    prompts = [row for batch in greedy.found for row in json.loads(batch)]
    assert len(prompts) == run.info["data"]["prompts"]
    assert set(greedy.found.values()) == {1}
    assert len(run.rank_search.tried) > 2  # sets were tried, on the same answers
    assert sum(marches.found.values()) == 1
    assert batches.found[len(different)] == 1
    assert parts.found["calls"] == 3 * tiny.N_LAYERS  # looks beforehand need no changes
    assert looks.found == {}  # the forced fits are those of the one march


class KilledError(Exception):
    """Stands for a killed process."""


def test_a_search_for_ranks_goes_on_after_an_interruption(folder, monkeypatch):
    """A round whose march was finished is not marched again; the result is the same."""
    whole = run_job(job(folder, "whole"))

    def killed(*_, **__):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("toolkit.evaluation.rank_search.evaluate", killed)
        with pytest.raises(KilledError):
            run_job(job(folder, "again"))
    (kept,) = (folder / "again.partial" / "search").iterdir()
    march = KeptMarch(kept / "march")
    assert len(march.passed()) == tiny.N_LAYERS
    assert not list(march.folder.glob("*.stream*"))  # what a finished march read is given back
    fitted = Counter(monkeypatch, "toolkit.fitting.closed_form.march_through")
    again = run_job(job(folder, "again"))
    assert fitted.found == {}
    assert again.rank_search.tried.equals(whole.rank_search.tried)
