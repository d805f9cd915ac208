"""Phases: the marks of real tokenizers, and every token's phase."""

import pytest

from tests.support import tiny
from toolkit.documents.phases import (
    ThinkingMarks,
    count_phases,
    phases,
    phases_of,
    phases_said,
)
from toolkit.documents.tokens import encode_all

MARKS = ThinkingMarks(frozenset({8}), frozenset({9}))
PAIRS = {
    "DeepSeek-R1, Qwen3": ("<think>", "</think>"),
    "Magistral": ("[THINK]", "[/THINK]"),
    "Command A": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "Sky-T1": ("<|begin_of_thought|>", "<|end_of_thought|>"),
    "Seed-OSS": ("<seed:think>", "</seed:think>"),
}


def thinking_tokenizer(begins="<think>", ends="</think>"):
    """Tokens 58 and 59 begin and end thinking."""
    tokenizer = tiny.make_tokenizer(n_tokens=58)
    tokenizer.add_tokens([begins, ends], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_marks_are_found_among_the_added_tokens(pair):
    assert ThinkingMarks.of(thinking_tokenizer(*pair)) == ThinkingMarks(
        frozenset({58}), frozenset({59})
    )


@pytest.mark.parametrize("pair", [("<tool>", "</tool>"), ("<think>", "/no_think"), ("a", "b")])
def test_without_a_pair_there_are_no_marks(pair):
    assert ThinkingMarks.of(thinking_tokenizer(*pair)) == ThinkingMarks(frozenset(), frozenset())


def letters(ids, n_prompt):
    return "".join(phase[0] for phase in phases(ids, n_prompt, MARKS))


def test_thinking_is_between_the_marks_and_with_them():
    assert letters([1, 2, 8, 3, 9, 4], 2) == "pptt" + "ta"
    assert letters([1, 8, 3, 4], 1) == "pttt"  # cut while it thinks
    assert letters([1, 2, 3], 1) == "paa"
    assert letters([1, 9, 3], 1) == "paa"  # an end without a beginning
    assert letters([1, 8, 9, 2, 8, 3, 9, 4], 1) == "pttat" + "tta"


def test_a_prompt_may_begin_to_think_or_have_done_so():
    assert letters([1, 8, 3, 9, 4], 2) == "pptta"
    assert letters([1, 8, 9, 3], 3) == "pppa"
    assert phases_said([1, 8], [3, 9, 4], MARKS) == ["thinking", "thinking", "answer"]
    assert phases_said([1], [], MARKS) == []


def test_every_token_of_a_document_has_a_phase_and_is_counted_once():
    tokenizer = thinking_tokenizer()
    documents = [
        {"prompt": "w5 w6", "response": "<think> w7 w8 </think> w9"},
        {"text": "w5 w6 w7"},
        {"text": "w9 w9 w7 w5"},
    ]
    encoded = encode_all(documents, tokenizer)
    marks = ThinkingMarks.of(tokenizer)
    assert phases_of(encoded[0], marks) == ["prompt"] * 2 + ["thinking"] * 4 + ["answer"]
    assert phases_of(encoded[1], marks) == ["answer"] * 3
    # The first token of a document never counts.
    assert count_phases(encoded, "all", marks) == {"prompt": 1, "thinking": 4, "answer": 6}
    assert count_phases(encoded[:1], "response", marks) == {
        "prompt": 0, "thinking": 4, "answer": 1,
    }  # fmt: skip
