"""Prompts of like length are read together, and what is found of them is in their own order."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.steering import random_adapters
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import FORCINGS, evaluate
from toolkit.evaluation.reference import PASS, Reference, like_lengths

LENGTHS = [300, 4, 290, 2, 7, 310, 3]
PROMPTS = [[5 + (row + k) % 40 for k in range(length)] for row, length in enumerate(LENGTHS)]
N_NEW = 4


def cost(batches, lengths):
    return sum(PASS + len(rows) * max(lengths[row] for row in rows) for rows in batches)


def all_cuts(order, most):
    """Every way to cut `order` into batches of `most` or fewer."""
    if not order:
        yield []
    for n in range(1, min(most, len(order)) + 1):
        yield from ([order[:n], *rest] for rest in all_cuts(order[n:], most))


@given(st.lists(st.integers(1, 600), min_size=1, max_size=8), st.integers(1, 5))
def test_no_other_batches_are_read_sooner(lengths, most):
    batches = like_lengths(lengths, most)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    assert max(map(len, batches)) <= most
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    assert cost(batches, lengths) == min(cost(cut, lengths) for cut in all_cuts(order, most))
    longest = [max(lengths[row] for row in rows) for rows in batches]
    assert longest == sorted(longest, reverse=True)


def test_without_a_limit_prompts_of_one_length_are_one_batch():
    assert like_lengths([5] * 40, None) == [list(range(40))]
    assert like_lengths([]) == []


def test_what_is_found_is_in_the_order_of_the_prompts(llama_pair):
    candidate = Candidate.of(random_adapters("post_block"))
    together = evaluate(llama_pair, PROMPTS, [candidate], N_NEW, forcings=FORCINGS)
    assert len(like_lengths(LENGTHS)) > 1
    for row, prompt in enumerate(PROMPTS):
        alone = evaluate(llama_pair, [prompt], [candidate], N_NEW, forcings=FORCINGS)
        for key, found in alone.divergences.items():
            assert torch.equal(together.divergences[key].counted[row], found.counted[0])
            ours, theirs = together.divergences[key].nats[row], found.nats[0]
            assert torch.allclose(ours[found.counted[0]], theirs[found.counted[0]], atol=1e-9)
        for asked, tokens in alone.tokens.items():
            assert together.tokens[asked][row] == tokens[0]
    read = Reference(llama_pair.tuned, llama_pair.tokenizer, PROMPTS, N_NEW)
    found, known = read.divergence(llama_pair.base).nats, together.divergences[NONE, "tuned"]
    assert torch.allclose(found[known.counted], known.nats[known.counted], atol=1e-9)


def test_known_tokens_are_those_of_their_prompts(llama_pair):
    asked = Reference(llama_pair.tuned, llama_pair.tokenizer, PROMPTS, N_NEW)
    tokens = evaluate(llama_pair, asked, []).tokens[None]
    told = Reference(llama_pair.tuned, llama_pair.tokenizer, PROMPTS, N_NEW)
    told.remember(tokens)
    for ours, theirs in zip(told.batches, asked.batches, strict=True):
        assert ours.generated.tokens == theirs.generated.tokens
    some = Reference(llama_pair.tuned, llama_pair.tokenizer, PROMPTS, N_NEW)
    some.remember(tokens[:6])  # all of the long ones, and not the last of the short ones
    assert [batch._generated is not None for batch in some.batches] == [True, False]
