"""Accuracy with its interval, answers in batches, and the divergence from a reference."""

import numpy as np
import pytest
import scipy.stats
import torch

from tests.support import textbook, tiny
from tests.support.properties import restores
from tests.support.steering import random_adapters
from toolkit.adapters.attach import steer
from toolkit.documents.documents import Document
from toolkit.documents.tasks.jsonl import JSONLines
from toolkit.documents.tasks.task import Example
from toolkit.documents.tokens import encode
from toolkit.evaluation.accuracy import RESAMPLES, answers, bootstrap, correct, prompts_of
from toolkit.evaluation.reference import Reference

N_NEW = 6


def asked(n=9, seed=0):
    """Questions of various lengths, whose answers nobody knows."""
    rng = np.random.default_rng(seed)
    texts = [tiny.random_text(rng, length) for length in rng.integers(1, 12, n)]
    return [Example(text, "w5", "w5") for text in texts]


# --- intervals


@pytest.mark.parametrize(("n", "share"), [(50, 0.5), (200, 0.9), (500, 0.1)])
def test_the_interval_is_scipys_up_to_sampling(n, share):
    """A quantile at 2.5 % of 2,000 draws is itself uncertain by a tenth of their spread."""
    right = np.arange(n) < share * n
    theirs = scipy.stats.bootstrap(
        (right.astype(float),), np.mean, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    spread = np.sqrt(share * (1 - share) / n)
    ours = bootstrap(right)
    assert ours == pytest.approx(tuple(theirs), abs=0.25 * spread)
    assert ours[0] < share < ours[1]
    assert bootstrap(right, seed=0) == ours


def test_a_lower_level_is_a_narrower_interval():
    right = np.arange(100) < 40
    (low, high), (lower, higher) = bootstrap(right, 0.5), bootstrap(right, 0.99)
    assert lower < low < high < higher


def test_seeds_alike_add_nothing_and_seeds_apart_widen():
    """Between seeds whose means differ, the interval covers the seeds' spread too."""
    one = np.arange(400) < 200
    alike, apart = np.array([one] * 3), np.array([np.arange(400) < k for k in (80, 200, 320)])
    width = lambda right: np.diff(bootstrap(right))[0]  # noqa: E731
    assert width(alike) == pytest.approx(width(one), rel=0.1)
    # Means of 3 draws out of (0.2, 0.5, 0.8): their standard deviation, and that of questions.
    by_seed = np.std([0.2, 0.5, 0.8]) / 3**0.5
    assert width(apart) > 2 * 1.5 * by_seed > 2 * width(one)


def test_several_seeds_are_slowly_the_double_resampling():
    """Seeds drawn again, and for all of them the same questions: against plain loops."""
    generator = np.random.default_rng(0)
    right = generator.random((4, 60)) < np.array([[0.3], [0.5], [0.5], [0.7]])
    means = []
    for _ in range(4 * RESAMPLES):
        seeds = [int(generator.integers(4)) for _ in range(4)]
        questions = [int(generator.integers(60)) for _ in range(60)]
        means.append(sum(right[s, q] for s in seeds for q in questions) / 240)
    spread = np.std(means)
    assert bootstrap(right) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.25 * spread)


def test_all_right_or_all_wrong_has_no_width():
    assert bootstrap(np.ones(30)) == (1, 1)
    assert bootstrap(np.zeros((2, 30))) == (0, 0)


# --- answers


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("steered", [False, True])
def test_batched_answers_are_the_textbooks_one_by_one(tokenizer, family, steered):
    """In the questions' order, whatever their lengths; nothing behind the end of sequence."""
    model, questions = tiny.make_model(family), asked()
    adapters = random_adapters("post_mlp", layers=range(tiny.N_LAYERS) if steered else (0,)[:0])
    maps = {k: (a.up @ a.down, a.bias) for k, a in adapters.by_layer.items()}
    maps = {k: (A.numpy(), b.numpy()) for k, (A, b) in maps.items()}
    steps = []
    with restores(model), steer(model, adapters):
        together = answers(model, tokenizer, questions, N_NEW, 4, lambda: steps.append(1))
        alone = [answers(model, tokenizer, [q], N_NEW)[0] for q in questions]
    assert len(steps) == 3
    assert together == alone
    ended = 0
    for question, said in zip(questions, together, strict=True):
        document = Document(prompt=question.prompt, response=".")
        prompt = encode(document, tokenizer).prompt_ids
        look = lambda ids: textbook.run(model, ids, location="post_mlp", maps=maps).logits  # noqa: E731
        ids, _ = textbook.greedy(look, prompt, N_NEW, {tiny.EOS})
        ended += tiny.EOS in ids
        words = [tokenizer.decode([i]) for i in ids if i not in tokenizer.all_special_ids]
        assert said.split() == words
    assert len(set(together)) > 1


def test_an_answer_ends_with_the_sequence(tokenizer):
    """A model that says one word and then the end says one word, in any batch."""
    model = tiny.make_model("llama")

    def logits(_module, _args, kwargs, output):
        said = torch.where(kwargs["input_ids"] == 7, tiny.EOS, 7)[:, -1:]
        output.logits = torch.nn.functional.one_hot(said, tiny.N_VOCABULARY).double()
        return output

    model.register_forward_hook(logits, with_kwargs=True)
    questions = [Example("w9 w8 w20", "", ""), Example("w9 w7", "", ""), Example("w7", "", "")]
    assert answers(model, tokenizer, questions, 5) == ["w7", "", ""]


def test_correct_counts_what_the_task_calls_right(tokenizer):
    model, questions = tiny.make_model("llama"), asked()
    task = JSONLines()
    said = answers(model, tokenizer, questions, task.new_tokens)
    known = [
        Example(q.prompt, "r", text if i % 3 else "w5 w5 w5")
        for i, (q, text) in enumerate(zip(questions, said, strict=True))
    ]
    right = correct(model, tokenizer, task, known, batch_size=4)
    assert right.dtype == bool
    assert right.tolist() == [bool(i % 3) for i in range(len(known))]


# --- the reference


def test_a_model_diverges_from_itself_not_at_all(llama_pair, tokenizer):
    prompts = prompts_of(tokenizer, asked(5))
    reference = Reference(llama_pair.tuned, tokenizer, prompts, N_NEW)
    assert reference.divergence(llama_pair.tuned).nats.abs().max() < 1e-12
    assert reference.divergence(llama_pair.base).mean > 1e-2


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_divergence_is_the_textbooks(tokenizer, family):
    """Σ p log p/q of every token that the tuned model says, reread one prompt at a time."""
    pair = tiny.make_pair(family, torch.float64, tokenizer)
    prompts = prompts_of(tokenizer, asked(5))
    found = Reference(pair.tuned, tokenizer, prompts, N_NEW).divergence(pair.base)
    expected = []
    for row, prompt in enumerate(prompts):
        look = lambda ids: textbook.run(pair.tuned, ids).logits  # noqa: E731
        said, logits = textbook.greedy(look, prompt, N_NEW, {tiny.EOS})
        read = textbook.run(pair.base, [*prompt, *said[:-1]]).logits[len(prompt) - 1 :]
        expected.append(textbook.kl(logits, read))
        nats = found.nats[row, : len(said)].numpy()
        np.testing.assert_allclose(nats, expected[-1], atol=1e-8)
        assert int(found.counted[row].sum()) == len(said)
    assert found.mean == pytest.approx(textbook.mean_nats(expected), abs=1e-8)
