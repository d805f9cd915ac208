"""Greedy generation, batched and cached, and the logits that choose each token."""

import numpy as np
import pytest
import torch

from tests.support import textbook, tiny
from toolkit.models.generation import (
    Prefilled,
    continuation_logits,
    counted_tokens,
    end_tokens,
    greedy,
    make_prompts,
    prefill,
    sampled,
    whole_logits,
)

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20], [30, 31, 32, 33]]
ENDS = {tiny.EOS, *range(20, 26)}
FAMILIES = ["llama", "gemma3", "gpt2", "opt", "neox"]


def in_one_batch(model, n_new=6, ends=ENDS):
    """The prompts, the model that has read them, what it says and the logits it chose by."""
    prompts = make_prompts(PROMPTS, tiny.PAD)
    start = prefill(model, prompts)
    return prompts, start, *greedy(model, prompts, start, n_new, sorted(ends))


def alone(model, prompt, n_new=6, ends=ENDS):
    return textbook.greedy(lambda ids: textbook.run(model, ids).logits, prompt, n_new, ends)


def test_prompts_are_padded_on_the_left():
    prompts = make_prompts([[7, 8, 9], [5]], pad_id=0)
    assert prompts.ids.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert prompts.mask.tolist() == [[True, True, True], [False, False, True]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_says_what_each_prompt_says_alone(family):
    """Tokens up to and with the first end, and the logits that chose them, read in three ways."""
    model = tiny.make_model(family)
    prompts, start, said, logits = in_one_batch(model)
    assert said.ids.shape == said.counted.shape == logits.shape[:2] == (3, 6)
    continued = continuation_logits(model, prompts, start, said)
    whole = whole_logits(model, prompts, said)
    for row, prompt in enumerate(PROMPTS):
        expected, chosen_by = alone(model, prompt)
        counted = said.counted[row]
        assert said.ids[row][counted].tolist() == expected
        for found in (logits, continued, whole):
            np.testing.assert_allclose(found[row][counted], chosen_by, atol=1e-10)


def test_what_has_been_read_can_be_gone_on_from_twice():
    """Neither generating nor rereading touches the cache of what was read."""
    model = tiny.make_model("gemma3")
    prompts, start, said, logits = in_one_batch(model)
    continued = continuation_logits(model, prompts, start, said)
    again, same_logits = greedy(model, prompts, start, 6, sorted(ENDS))
    assert torch.equal(again.ids, said.ids)
    assert torch.equal(same_logits, logits)
    assert torch.equal(continuation_logits(model, prompts, start, said), continued)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_sample_is_where_the_distribution_function_passes_its_number(family):
    """Each prompt alone, by plain code; the logits are those that it was drawn from."""
    model = tiny.make_model(family)
    prompts = make_prompts(PROMPTS, tiny.PAD)
    start = prefill(model, prompts)
    draws = torch.rand(3, 6, dtype=torch.float64)
    draws[0] = 0.0
    said, logits = sampled(model, prompts, start, draws, sorted(ENDS))
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for index in range(6):
            chosen_by = textbook.run(model, ids).logits[-1]
            np.testing.assert_allclose(logits[row, index], chosen_by, atol=1e-10)
            passed = np.cumsum(np.exp(textbook.log_softmax(chosen_by)))
            ids.append(int(np.argmax(passed > float(draws[row, index]))))
        assert said.ids[row].tolist() == ids[len(prompt) :]
    assert torch.equal(said.counted, counted_tokens(said.ids, sorted(ENDS)))


def test_what_is_impossible_is_never_sampled():
    """Not even by a number next to 0 or 1."""
    logits = torch.tensor([[-np.inf, 0.0, 0.0, -np.inf]] * 2, dtype=torch.float64)
    start = Prefilled(logits, None)
    draws = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    prompts = make_prompts([[5], [5]], tiny.PAD)
    said, _ = sampled(tiny.make_model("llama"), prompts, start, draws, ())
    assert said.ids.tolist() == [[1], [2]]


def test_one_new_token_needs_no_second_pass():
    model = tiny.make_model("llama")
    prompts, start, said, logits = in_one_batch(model, n_new=1)
    assert said.ids.shape == (3, 1)
    assert torch.equal(continuation_logits(model, prompts, start, said), logits)


@pytest.mark.parametrize(
    "setting", [{"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": [16]}]
)
def test_generation_is_greedy_whatever_the_models_own_settings(setting):
    """What a model's generation_config asks for (Qwen's: a repetition penalty) is not greedy."""
    model = tiny.make_model("llama")
    expected = in_one_batch(model, ends=())[2].ids
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    assert torch.equal(in_one_batch(model, ends=())[2].ids, expected)


def test_tokens_count_up_to_and_with_the_first_end():
    ids = torch.tensor([[3, 9, 4, 9], [9, 9, 9, 9], [1, 2, 3, 4]])
    expected = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert torch.equal(counted_tokens(ids, (9, 7)), expected)
    assert counted_tokens(ids, ()).all()


def test_ends_are_the_models_and_the_tokenizers(tokenizer):
    model = tiny.make_model("llama")
    model.generation_config.eos_token_id = [4, 3]
    assert end_tokens(model, tokenizer) == (tiny.EOS, 3, 4)
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == (tiny.EOS,)
