"""The first look: what it says is true, and it changes no table."""

import re

import pytest
import torch

from tests.diagnosis.test_once import Counter
from tests.support import tiny
from toolkit import FitSpec, Options, diagnose, fit_adapters
from toolkit.analysis.divergence import recovered
from toolkit.diagnosis.first_look import first_look
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import evaluate
from toolkit.evaluation.reference import Reference

OPTIONS = Options(new_tokens=4, sample=1, shared_sample=0)


@pytest.fixture(scope="module")
def pair(tokenizer):
    return tiny.make_pair("llama", torch.float64, tokenizer)


@pytest.mark.parametrize(("n", "some"), [(60, False), (120, True)])
def test_it_says_what_the_adapters_of_a_fifth_of_the_documents_recover(pair, n, some):
    corpus = pair.corpus(tiny.make_documents(n))
    asked = corpus.prompts()
    reference = Reference(pair.tuned, pair.tokenizer, asked, 4, 5)
    rows = [row for batch in reference.for_a_first_look().batches for row in batch.rows]
    said = first_look(pair, corpus, reference)
    few = [d for d in corpus.encoded if not d.held_out][: len(corpus.fit) // 5]
    few = type(corpus)(tuple(few), pad_id=corpus.pad_id)
    spec = FitSpec.linear("post_block", 8, "forced")
    candidate = Candidate.of(fit_adapters(pair, few, [spec])[spec])
    found = evaluate(pair, [asked[row] for row in rows], [candidate], 4).divergences
    share, sem = recovered(found[candidate, "tuned"], found[NONE, "tuned"])
    assert f"fitted on {len(few.encoded)} documents, recovers {share:.2f} ± {sem:.2f}" in said
    assert (len(rows) < len(asked)) == some
    assert f"on {len(rows)} prompts" in said


def test_few_documents_have_none(pair, capfd):
    corpus = pair.corpus(tiny.make_documents(12))
    reference = Reference(pair.tuned, pair.tokenizer, corpus.prompts(), 4)
    assert first_look(pair, corpus, reference) == ""
    assert capfd.readouterr().err == ""


def test_a_run_that_is_looked_on_has_it_and_the_same_tables(pair, monkeypatch, capfd):
    documents = tiny.make_documents(60)
    alone = diagnose(pair, documents, OPTIONS, show_progress=False)
    assert "first look" not in capfd.readouterr().err
    greedy = Counter(
        monkeypatch,
        "toolkit.evaluation.reference.greedy",
        lambda model, prompts, *_: str(prompts.ids.tolist()),
    )
    shown = diagnose(pair, documents, OPTIONS, show_progress=True)
    said = capfd.readouterr().err
    assert re.search(r"first look: a map of rank 8 after every block, .* recovers", said)
    assert said.index("first look:") < said.index("marching through")
    assert sorted(greedy.found.values())[:-1] == [1] * (len(greedy.found) - 1)
    assert max(greedy.found.values()) <= 2  # some prompts are answered twice
    for name, table in alone.tables.items():
        assert table.frame.equals(shown.tables[name].frame), name
    assert "first look" in shown.info["stages"]
