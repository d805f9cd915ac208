"""Divergences of whole sequences, by enumerating them; everything else by plain code."""

import numpy as np
import pytest
import torch

from tests.support import textbook, tiny
from tests.support.sequences import every_sequence, log_probability, small_model
from tests.support.steering import random_adapters
from toolkit import ModelPair
from toolkit.analysis.divergence import Predictions
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import evaluate
from toolkit.evaluation.distributions import distributions
from toolkit.models.generation import (
    WITHOUT_CACHE,
    Generated,
    continuation_logits,
    counted_tokens,
    make_prompts,
    prefill,
)

PROMPT, N_NEW, MANY = [3, 4, 2], 3, 3000
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20], [30, 31, 32, 33], [7, 7, 40], *([i, 9] for i in range(8))]


@pytest.fixture(scope="module")
def five_tokens():
    """A pair that knows five tokens, and log p of every sequence under tuned and base."""
    base, tuned = small_model(0), small_model(1)
    pair = ModelPair.from_models(base, tuned, tiny.make_tokenizer(n_tokens=5))
    sequences = every_sequence(N_NEW)
    logs = [
        np.array([log_probability(model, PROMPT, tokens) for tokens in sequences])
        for model in (tuned, base)
    ]
    for log_p in logs:
        assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-12)
    return pair, sequences, *logs


def kl(log_p, log_q):
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def test_conditional_divergences_add_up_to_that_of_sequences(five_tokens):
    """An identity: over all sequences, weighted by their probability, and no sampling at all."""
    pair, sequences, tuned, base = five_tokens
    ids = torch.tensor([[*tokens, *[0] * (N_NEW - len(tokens))] for tokens in sequences])
    every = Generated(ids, counted_tokens(ids, [tiny.EOS]))
    assert every.tokens == [list(tokens) for tokens in sequences]
    prompts = make_prompts([PROMPT] * len(sequences), tiny.PAD)
    ours, theirs = (
        continuation_logits(model, prompts, prefill(model, prompts), every)
        for model in (pair.tuned, pair.base)
    )
    sums = (Predictions(ours).divergence(theirs) * every.counted).sum(1).numpy()
    assert (np.exp(tuned) * sums).sum() == pytest.approx(kl(tuned, base), rel=1e-10)


def test_samples_estimate_the_divergence_of_sequences_in_both_directions(five_tokens):
    pair, sequences, tuned, base = five_tokens
    said = evaluate(pair, [PROMPT], [], N_NEW).tokens[None] * MANY
    found = distributions(pair, [PROMPT] * MANY, said, [NONE], N_NEW).likeness[NONE]
    for path, log_p, log_q in ((found.forward, tuned, base), (found.reverse, base, tuned)):
        mean, sem = path.divergences.per_sequence
        assert sem < 0.05 * mean
        assert abs(mean - kl(log_p, log_q)) < 4 * sem
        drawn = [tuple(tokens) for tokens in path.tokens]
        shares = np.array([drawn.count(tokens) for tokens in sequences]) / MANY
        error = np.sqrt(np.exp(log_p) * (1 - np.exp(log_p)) / MANY)
        assert (abs(shares - np.exp(log_p)) < 4.5 * error).all()
    other = distributions(pair, [PROMPT] * 9, said[:9], [NONE], N_NEW, seed=1).likeness[NONE]
    assert other.forward.tokens != found.forward.tokens[:9]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_everything_is_what_plain_code_gives(family, tokenizer):
    """Each prompt alone, without a cache: along greedy tokens, samples, and own answers."""
    pair = tiny.make_pair(family, torch.float64, tokenizer)
    ends = {tiny.EOS, *range(20, 26)}
    pair.tuned.generation_config.eos_token_id = sorted(ends)
    adapted = Candidate.of(random_adapters("post_block"))
    evaluation = evaluate(pair, PROMPTS, [adapted], 5)
    answers = evaluation.tokens[None]
    found = distributions(pair, PROMPTS, answers, [NONE, adapted], 5)
    tuned = lambda ids: textbook.run(pair.tuned, ids).logits  # noqa: E731

    def along(logits_of, prompt, tokens):
        return logits_of([*prompt, *tokens])[len(prompt) - 1 : -1]

    for candidate in (NONE, adapted):
        alike = found.likeness[candidate]
        with candidate.attached(pair.base, pair.base_runner.sites):
            own = lambda ids: textbook.run(pair.base, ids).logits  # noqa: E731
            for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
                p, q = (along(model, prompt, answer) for model in (tuned, own))
                difference = np.exp(textbook.log_softmax(p)) - np.exp(textbook.log_softmax(q))
                expected = abs(difference).sum(-1) / 2
                ours = alike.variation.nats[row][alike.variation.counted[row]]
                np.testing.assert_allclose(ours, expected, atol=1e-10)
                differs = p.argmax(-1) != q.argmax(-1)
                ours = alike.disagreement.nats[row][alike.disagreement.counted[row]]
                assert ours.bool().tolist() == differs.tolist()
                best = np.argsort(-q, -1)[:, :5]
                n = len(answer)
                assert alike.next_tokens.ids[row, :n].tolist() == best.tolist()
                np.testing.assert_allclose(
                    alike.next_tokens.probabilities[row, :n],
                    np.take_along_axis(np.exp(textbook.log_softmax(q)), best, -1),
                    atol=1e-10,
                )
                for path, ours_of, theirs_of in (
                    (alike.forward, tuned, own),
                    (alike.reverse, own, tuned),
                ):
                    tokens = path.tokens[row]
                    assert len(tokens) == 5 or tokens[-1] in ends
                    assert not set(tokens[:-1]) & ends
                    logits = (along(model, prompt, tokens) for model in (ours_of, theirs_of))
                    nats = path.divergences.nats[row][path.divergences.counted[row]]
                    np.testing.assert_allclose(nats, textbook.kl(*logits), atol=1e-10)
                assert alike.answers[row] == textbook.greedy(own, prompt, 5, ends)[0]


def test_neither_batches_nor_caches_change_what_is_drawn(llama_pair, monkeypatch):
    """Prompts one by one, and models that read every token anew: the same continuations."""
    answers = evaluate(llama_pair, PROMPTS, [], 5).tokens[None]

    def looked():
        return distributions(llama_pair, PROMPTS, answers, [NONE], 5).likeness[NONE]

    together = looked()
    monkeypatch.setattr("toolkit.evaluation.distributions.TOGETHER", 1)
    apart = looked()
    for model in (llama_pair.base, llama_pair.tuned):
        WITHOUT_CACHE.add(model)
    anew = looked()
    for found in (apart, anew):
        assert found.answers == together.answers
        for ours, theirs in ((found.forward, together.forward), (found.reverse, together.reverse)):
            assert ours.tokens == theirs.tokens
            assert ours.divergences.mean == pytest.approx(theirs.divergences.mean, rel=1e-9)
        assert found.variation.mean == pytest.approx(together.variation.mean, rel=1e-9)
