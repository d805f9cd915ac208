"""Several processes share comparisons and looks: they give the bits of one, and no work twice."""

import pytest
import torch

from tests.support import tiny
from tests.support.members import together
from tests.support.steering import random_adapters
from toolkit.evaluation import candidates as grouping
from toolkit.evaluation import compare
from toolkit.evaluation.candidates import NONE, ORACLE, Candidate
from toolkit.evaluation.compare import FORCINGS, evaluate, n_comparisons, reference_of
from toolkit.evaluation.distributions import distributions
from toolkit.runtime.processes import ALONE

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20], [30, 31, 32, 33], [7, 7, 40], [9, 8]]
N_NEW = 4


@pytest.fixture(scope="module")
def pairs(tokenizer):
    """The same pair for each of three processes, which do not see each other's hooks."""
    return [tiny.make_pair("llama", torch.float32, tokenizer) for _ in range(3)]


def tried():
    """Two that steer everywhere, and each of their blocks alone."""
    everywhere = [random_adapters("post_mlp"), random_adapters("post_block")]
    singles = [Candidate.of(a, layer) for a in everywhere for layer in range(tiny.N_LAYERS)]
    return [*(Candidate.of(a) for a in everywhere), *singles]


def forcings(candidate):
    return FORCINGS if candidate.layers == "all" else ("tuned",)


def compared(pair, kept, processes):
    """An evaluation, how often it was to advance, and how often it did."""
    reference, advanced = reference_of(pair, PROMPTS, N_NEW, batch_size=2), []
    n = n_comparisons(pair, reference, tried(), forcings, kept, processes)
    found = evaluate(
        pair, reference, tried(), forcings=forcings, kept=kept, processes=processes,
        advance=lambda: advanced.append(1),
    )  # fmt: skip
    return found, n, len(advanced)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_comparison_is_the_same_and_advances_as_often_as_it_says(pairs, size, resumed):
    kept: dict[str, dict[str, torch.Tensor]] = {}
    expected, n, _ = compared(pairs[0], kept, ALONE)
    assert n == 3 * (3 + len(tried()))
    half = dict(list(kept.items())[: len(kept) // 2]) if resumed else {}
    members = together(size, lambda own: compared(pairs[own.rank], half, own))
    assert sum(n for _, n, _ in members) == n
    for found, promised, advanced in members:
        assert advanced == promised
        assert found.tokens == expected.tokens
        assert found.divergences.keys() == expected.divergences.keys()
        for key, divergences in expected.divergences.items():
            assert torch.equal(found.divergences[key].nats, divergences.nats)
    assert half.keys() == kept.keys()


def test_what_is_known_costs_nothing_and_a_group_generates_once(pairs):
    reference = reference_of(pairs[0], PROMPTS, N_NEW, batch_size=2)
    everyone = [*compare.ALWAYS, *tried()]

    def costs(kept):
        works = compare._works(pairs[0], reference, everyone, forcings, kept, ALONE)
        found = [dict(zip(map(tuple, work.groups), work.costs, strict=True)) for work in works]
        return found, (3, 4)  # both adapters, side by side

    first, group = costs({})
    assert first[0] == first[1] == first[2]
    assert first[0][group] == 2 + compare.GENERATION
    assert first[0][1,] == 1 + compare.GENERATION  # no steering goes alone
    assert first[0][0,] == 0  # the tuned model's tokens, which all processes make
    assert everyone[2] == ORACLE
    alone = [first[0][index,] for index in range(5, 5 + tiny.N_LAYERS)]
    assert alone == [1 - layer / tiny.N_LAYERS + compare.HEAD for layer in range(tiny.N_LAYERS)]

    kept: dict[str, dict[str, torch.Tensor]] = {}
    evaluate(pairs[0], reference, [], forcings=FORCINGS, kept=kept)
    again, _ = costs({})
    assert again[0][1,] == again[0][2,] == 0  # the reference remembers no steering and the oracle
    assert again[0][group] == 2 + compare.GENERATION
    assert NONE in reference.batches[0].outcomes
    evaluate(pairs[0], reference, tried(), forcings=forcings, kept=kept)
    assert not any(cost for batch in costs(kept)[0] for cost in batch.values())


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("together_at", [1, 2, 5])  # two groups on each of 5, 3 and 1 batches
def test_distributions_are_the_same_in_parts(pairs, together_at, size, monkeypatch):
    monkeypatch.setattr("toolkit.evaluation.distributions.TOGETHER", together_at)
    monkeypatch.setattr(grouping, "ROWS", 2 * together_at)
    candidates = [NONE, *tried()[:2]]
    answers = evaluate(pairs[0], PROMPTS, [], N_NEW).tokens[None]

    def look(processes):
        pair = pairs[processes.rank]
        return distributions(pair, PROMPTS, answers, candidates, N_NEW, processes=processes)

    expected = look(ALONE)
    for found in together(size, look):
        assert torch.equal(found.next_tokens.ids, expected.next_tokens.ids)
        for candidate in candidates:
            ours, theirs = found.likeness[candidate], expected.likeness[candidate]
            assert ours.answers == theirs.answers
            for path, other in ((ours.forward, theirs.forward), (ours.reverse, theirs.reverse)):
                assert path.tokens == other.tokens
                assert torch.equal(path.divergences.nats, other.divergences.nats)
            for name in ("variation", "disagreement"):
                assert torch.equal(getattr(ours, name).nats, getattr(theirs, name).nats)
            assert torch.equal(ours.next_tokens.probabilities, theirs.next_tokens.probabilities)
