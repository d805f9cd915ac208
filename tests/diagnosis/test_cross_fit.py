"""Cross-fitted maps against maps that numpy fits without each fold's documents."""

import functools
import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from tests.support import textbook, tiny
from tests.support.diagnosed import assert_tables_equal
from tests.support.members import reduced
from tests.support.textbook import Textbook
from toolkit import InputError, Options, diagnose
from toolkit.diagnosis.cross_fit import FoldStatistics, cross_fitted_specs, fold_prompts
from toolkit.diagnosis.grid import grid_for
from toolkit.diagnosis.workspace import Workspace
from toolkit.documents.documents import as_document
from toolkit.documents.tokens import encode_all
from toolkit.lockstep.march import March

N_FOLDS, N_NEW = 3, 4
OPTIONS = Options(new_tokens=N_NEW, sample=0, shared_sample=0, batch_tokens=100, folds=N_FOLDS)
DOCUMENTS = tiny.make_documents(12)
PLACES = ("pre_mlp", "post_mlp", "post_block")


def made(family):
    return tiny.make_pair(family, torch.float64, tiny.make_tokenizer())


@functools.cache
def table(family):
    return diagnose(made(family), DOCUMENTS, OPTIONS, show_progress=False).cross_fitted.frame


def folds_of(documents):
    """The fold of each document, by the definition."""
    return np.array([int(as_document(d).lot) % N_FOLDS for d in documents])


def without(book, fold, folds, location, rank):
    """Maps of every block, fitted by numpy on the documents of the other folds."""
    kept = Textbook(book.base, book.tuned, [])
    chosen = [index for index, other in enumerate(folds) if other != fold]
    kept.documents = [(book.documents[i][0], False) for i in chosen]
    kept.of = {name: [seen[i] for i in chosen] for name, seen in book.of.items()}
    return kept.maps(location, rank, "forced")


@functools.cache
def expected(family):
    pair = made(family)
    encoded = encode_all(DOCUMENTS, pair.tokenizer)
    book = Textbook(pair.base, pair.tuned, [(e.ids, e.held_out) for e in encoded])
    folds, rows = folds_of(DOCUMENTS), []
    assert len(set(folds)) == N_FOLDS
    assert 0 < sum(e.held_out for e in encoded) < len(encoded)
    ends = {tiny.EOS}
    prompts = [[e.prompt_ids for e, f in zip(encoded, folds, strict=True) if f == fold]
               for fold in range(N_FOLDS)]  # fmt: skip
    base = [n for some in prompts for n in book.divergences(some, N_NEW, ends)["tuned"]]
    for location in PLACES:
        for rank in (0, 8):  # the states have 16 dimensions
            nats = []
            for fold, some in enumerate(prompts):
                maps = without(book, fold, folds, location, rank)
                nats += book.divergences(some, N_NEW, ends, location, maps)["tuned"]
            rows.append(row(location, rank, nats, base))
    return rows


def row(location, rank, nats, base):
    """Shares by leaving out each prompt in turn."""
    steered, unsteered = (np.array([n.sum() for n in some]) for some in (nats, base))
    share, n = 1 - steered.sum() / unsteered.sum(), len(steered)
    left = [1 - np.delete(steered, i).sum() / np.delete(unsteered, i).sum() for i in range(n)]
    sem = np.sqrt((n - 1) / n * np.square(left - np.mean(left)).sum())
    reach = stats.t.ppf(0.975, n - 1) * sem
    return {"location": location, "rank": rank, "recovered": share, "recovered_sem": sem,
            "recovered_low": share - reach, "recovered_high": share + reach,
            "kl": textbook.mean_nats(nats), "base_kl": textbook.mean_nats(base),
            "n_prompts": n}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "neox"])  # attention before the MLP, and beside it
def test_each_fold_is_judged_by_maps_of_the_others(family):
    frame = table(family)
    assert (frame.kind == np.where(frame["rank"] == 0, "vector", "linear")).all()
    assert_tables_equal(
        frame.drop(columns="kind"), expected(family), ["location", "rank"], 1e-5, 1e-8
    )
    assert (frame.n_prompts == len(DOCUMENTS)).all()


def fitted(pair, corpus):
    """The maps of the first block, by spec."""
    specs = grid_for(pair.branches, pair.d_model, False)
    sums = FoldStatistics(specs, N_FOLDS)
    march = March(pair.base_runner, pair.tuned_runner, corpus.batches, pair.branches)
    for step in march.steps(0):
        sums.update(step)
    return {spec: a for task in sums.tasks(torch.float64) for spec, a in task()[1].items()}


def test_a_map_never_sees_a_document_of_its_own_fold(llama_pair):
    """Other tokens in the documents of one fold change every map but that fold's own."""
    corpus = llama_pair.corpus(DOCUMENTS, **OPTIONS.reading)
    before, states = fitted(llama_pair, corpus), torch.randn(5, tiny.D_MODEL).double()
    for fold in range(N_FOLDS):
        encoded = [
            replace(d, ids=d.ids[::-1]) if d.lot % N_FOLDS == fold else d for d in corpus.encoded
        ]
        after = fitted(llama_pair, replace(corpus, encoded=tuple(encoded)))
        assert before.keys() == after.keys()
        for spec, adapter in before.items():
            same = torch.allclose(adapter(states), after[spec](states), rtol=1e-6, atol=1e-9)
            assert same == (spec.fold == fold), spec.name


def test_several_processes_fit_the_maps_of_one(llama_pair):
    """Two share the batches: each then has the sums of all, to the last bit."""
    corpus = llama_pair.corpus(DOCUMENTS, **OPTIONS.reading)
    specs = grid_for(llama_pair.branches, llama_pair.d_model, False)
    march = March(llama_pair.base_runner, llama_pair.tuned_runner, corpus.batches, PLACES)
    steps = list(march.steps(0))
    assert len(steps) > 2
    whole = FoldStatistics(specs, N_FOLDS)
    for step in steps:
        whole.update(step)
    two = [FoldStatistics(specs, N_FOLDS) for _ in range(2)]
    for rank, sums in enumerate(two):
        sums.update(steps[0])  # whose frames all processes take
        for step in steps[1:][rank::2]:
            sums.update(step)
    first = FoldStatistics(specs, N_FOLDS)
    first.update(steps[0])
    reduced(two)
    for place, folds in whole.sums.items():
        for fold, statistics in enumerate(folds):
            found = two[1].sums[place][fold].moments.state()
            once = first.sums[place][fold].moments.state()
            for name, value in statistics.moments.state().items():
                twice = name.startswith(("n", "sum", "product"))  # both added the first batch
                assert torch.equal(found[name] - once[name] * twice, value), (place, name)


def test_folds_hold_fit_and_held_out_documents_alike():
    documents = [as_document(d) for d in tiny.make_documents(400)]
    for fold in range(5):
        some = [d.held_out for d in documents if d.lot % 5 == fold]
        assert 50 < len(some) < 110
        assert 0.1 < np.mean(some) < 0.32


def test_three_sizes_at_every_place_are_fitted():
    specs = cross_fitted_specs(grid_for(PLACES, 64, True))
    found = {(s.location, s.rank) for s in specs}
    assert found == {(place, rank) for place in PLACES for rank in (0, 8, 32)}
    assert len(specs) == len(found)
    assert len({replace(s, fold=k).name for s in specs for k in (None, 0, 1)}) == 3 * len(specs)


def test_projections_as_wide_as_the_states_change_nothing():
    pair = made("llama")
    found = diagnose(pair, DOCUMENTS, replace(OPTIONS, sketch=64), show_progress=False)
    numbers = [f.select_dtypes("number").to_numpy() for f in (found.cross_fitted.frame,
               table("llama"))]  # fmt: skip
    np.testing.assert_allclose(*numbers, rtol=1e-4, atol=1e-6)


def test_an_interrupted_run_goes_on(llama_pair, tmp_path, monkeypatch):
    """Killed after the march; then, killed after all comparisons, nothing is read again."""
    asked = tmp_path / "run", {"options": 1}
    diagnosing = importlib.import_module("toolkit.diagnosis.diagnose")

    def go_on():
        workspace = Workspace(*asked)
        workspace.open()
        run = diagnose(llama_pair, DOCUMENTS, OPTIONS, show_progress=False, workspace=workspace)
        return run.cross_fitted.frame

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(diagnosing, "weight_candidates", killed)  # the march has ended
        with pytest.raises(KeyboardInterrupt):
            go_on()
    with monkeypatch.context() as patched:
        patched.setattr(diagnosing, "survey", lambda *_: iter(()))  # no block is left
        first = go_on()
    assert first.equals(table("llama"))
    for name in ("prefill", "greedy", "continuation_logits", "whole_logits"):
        monkeypatch.setattr(f"toolkit.evaluation.compare.{name}", None)
    assert go_on().equals(first)


def test_prompts_of_a_fold_are_at_most_those_asked_for(llama_pair):
    corpus = llama_pair.corpus(DOCUMENTS, **OPTIONS.reading)
    every = fold_prompts(corpus, OPTIONS)
    some = fold_prompts(corpus, replace(OPTIONS, max_prompts=2))
    assert some == {fold: prompts[:2] for fold, prompts in every.items()}
    assert sum(map(len, every.values())) == len(DOCUMENTS)
    assert fold_prompts(corpus, Options()) == {}


def test_documents_of_one_fold_alone_are_refused(llama_pair):
    alone = [d for d in tiny.make_documents(60) if as_document(d).lot % 2 == 0]
    with pytest.raises(InputError, match="fall into one of 2 folds"):
        diagnose(llama_pair, alone, Options(folds=2), show_progress=False)


@pytest.mark.parametrize("folds", [1, -1])
def test_folds_are_none_or_several(folds):
    with pytest.raises(InputError, match=f"--cross-fit.*is {folds}: expected 2 or more"):
        Options(folds=folds)


def test_without_the_option_there_is_no_row(llama_pair):
    run = diagnose(llama_pair, DOCUMENTS, replace(OPTIONS, folds=0), show_progress=False)
    assert run.cross_fitted.frame.empty
    assert "--cross-fit" in run.cross_fitted.finding()
