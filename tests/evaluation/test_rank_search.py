"""The smallest ranks within a KL: the set holds it, the one below does not."""

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import tiny
from toolkit import Options, diagnose
from toolkit.diagnosis.headline import smallest_set
from toolkit.documents.tokens import encode_all
from toolkit.errors import InputError
from toolkit.evaluation.candidates import Candidate
from toolkit.evaluation.compare import evaluate
from toolkit.evaluation.rank_search import RankSearch, search, smallest_ranks
from toolkit.report.folder import load_rank_set, save_rank_set

DOCUMENTS = tiny.make_documents(40)


@pytest.fixture(scope="module")
def pair(tokenizer):
    return tiny.make_pair("llama", torch.float64, tokenizer, size=0.15)


@pytest.fixture(scope="module")
def base_kl(pair):
    prompts = [d.prompt_ids for d in encode_all(DOCUMENTS, pair.tokenizer) if d.held_out]
    return next(iter(evaluate(pair, prompts, [], 8).divergences.values())).mean


@pytest.fixture(scope="module")
def found(pair, base_kl):
    return smallest_ranks(pair, DOCUMENTS, 0.75 * base_kl, new_tokens=8)


def test_the_set_holds_and_the_next_smaller_does_not(pair, base_kl, found):
    """The adapters are judged anew, on prompts that none was fitted on."""
    prompts = [d.prompt_ids for d in encode_all(DOCUMENTS, pair.tokenizer) if d.held_out]
    candidate = Candidate.of(found.adapters)
    kl = evaluate(pair, prompts, [candidate], 8).divergences[candidate, "tuned"].mean
    assert kl == pytest.approx(found.chosen.kl)
    assert kl <= 0.75 * base_kl < found.next_smaller.kl
    assert found.next_smaller.total < found.chosen.total == sum(found.ranks)
    assert tuple(a.rank for a in found.adapters.by_layer.values()) == found.ranks
    assert found.tried.kl[0] == pytest.approx(base_kl)
    assert "Within" in smallest_set(found)
    assert "next smaller" in smallest_set(found)


def test_nothing_is_needed_within_a_wide_bound(pair, base_kl):
    found = smallest_ranks(pair, DOCUMENTS, 2 * base_kl, new_tokens=8)
    assert found.ranks == ()
    assert found.adapters is None
    assert "No steering is needed" in smallest_set(found)


def test_nothing_suffices_within_a_narrow_bound(pair):
    found = smallest_ranks(pair, DOCUMENTS, 1e-9, new_tokens=8)
    assert found.ranks is None
    assert found.chosen.kl == found.tried.kl.min()
    assert found.adapters is not None
    assert "No set of ranks" in smallest_set(found)


def test_survives_disk(found, tmp_path):
    save_rank_set(found, tmp_path / "kept")
    again = load_rank_set(tmp_path / "kept")
    assert again.ranks == found.ranks
    assert smallest_set(again) == smallest_set(found)
    assert again.adapters.parameters == found.adapters.parameters


def test_the_sentence_tells_a_kl_from_the_bound():
    """Two decimals would say 0.05 of either side of a bound of 0.05."""
    tried = pd.DataFrame(
        {
            "total": [4, 6],
            "parameters": [40, 60],
            "kl": [0.0532, 0.0468],
            "kl_sem": [0.0091, float("nan")],
            "n_prompts": [8, 8],
        }
    )
    said = smallest_set(RankSearch(0.05, (2, 4), None, tried))
    assert "60 parameters, 0.0468 nats on 8 held-out prompts" in said
    assert said.endswith("4 ranks, leaves 0.0532 ± 0.0091.")


@pytest.mark.parametrize("bound", [0, -1, float("nan")])
def test_bounds_that_are_none_are_refused(bound):
    with pytest.raises(InputError, match="above 0"):
        Options(max_kl=bound)


def test_diagnose_finds_it_too(pair, base_kl, found):
    options = Options(new_tokens=8, max_kl=0.75 * base_kl)
    run = diagnose(pair, DOCUMENTS, options, show_progress=False)
    assert run.rank_search.ranks == found.ranks
    assert "rank set" in run.info["stages"]


@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 45))
def test_search_finds_the_threshold(n, guess, threshold):
    """Of sets that hold from `threshold` on; the one below was asked about."""
    asked = []

    def holds(places):
        asked.extend(places)
        return [place >= threshold for place in places]

    found = search(n, min(guess, n - 1), holds)
    assert len(asked) == len(set(asked))
    assert found == (threshold if threshold < n else None)
    assert found in (None, 0) or found - 1 in asked


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 29))
def test_search_ends_where_holding_is_no_matter_of_size(held, guess):
    """What it returns holds, and the set below it does not."""
    found = search(len(held), min(guess, len(held) - 1), lambda places: [held[p] for p in places])
    if found is None:
        assert not held[-1]
    else:
        assert held[found]
        assert found == 0 or not held[found - 1]


def test_the_smallest_set_of_all_has_no_steering_below_it():
    columns = ["total", "parameters", "kl", "kl_sem", "n_prompts"]
    tried = pd.DataFrame([[0, 0, 0.2, 0.01, 4], [2, 96, 0.04, 0.01, 4]], columns=columns)
    said = smallest_set(RankSearch(0.05, (1, 1), None, tried))
    assert "(1 a block)" in said
    assert "No steering leaves 0.2 " in said
