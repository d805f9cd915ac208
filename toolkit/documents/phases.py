"""Phases of a text: prompt, thinking, answer.

Some tokenizers have tokens between which a model thinks before it answers (``<think>`` and
``</think>`` of DeepSeek-R1, Qwen3 and others, ``[THINK]`` of Magistral). They are found among the
added tokens by their names. Formats that say so with several tokens have no such phase here.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.documents.tokens import Encoded, Positions

PROMPT, THINKING, ANSWER = "prompt", "thinking", "answer"
PHASES = (PROMPT, THINKING, ANSWER)
MARK = re.compile(
    r"[<\[]\|?(?P<end>/|end_(?:of_)?)?(?:start_|begin_(?:of_)?|\w+:)?"
    r"(?:think|thinking|thought|reasoning)\|?[>\]]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ThinkingMarks:
    """Hold the tokens that begin thinking, and those that end it; both empty without a pair."""

    begins: frozenset[int]
    ends: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any) -> "ThinkingMarks":
        """Find the marks among the added tokens of `tokenizer`."""
        sides: dict[bool, set[int]] = {False: set(), True: set()}
        for text, token in tokenizer.get_added_vocab().items():
            if found := MARK.fullmatch(text):
                sides[found["end"] is not None].add(token)
        if not all(sides.values()):
            return cls(frozenset(), frozenset())
        return cls(frozenset(sides[False]), frozenset(sides[True]))


def phases(ids: Sequence[int], n_prompt: int, marks: ThinkingMarks) -> list[str]:
    """Return the phase of each token of `ids`, of which the first `n_prompt` are the prompt.

    The marks themselves are thinking. A prompt that ends within thinking, as some chat templates
    write it, has its continuation think.
    """
    thinks, found = False, []
    for index, token in enumerate(ids):
        thinks |= token in marks.begins
        after = THINKING if thinks else ANSWER
        found.append(PROMPT if index < n_prompt else after)
        thinks &= token not in marks.ends
    return found


def phases_of(document: Encoded, marks: ThinkingMarks) -> list[str]:
    """Return the phase of each token of `document`; a text without a prompt is all answer."""
    return phases(document.ids, document.response_start or 0, marks)


def phases_said(prompt: Sequence[int], said: Sequence[int], marks: ThinkingMarks) -> list[str]:
    """Return the phase of each token that was generated from `prompt`."""
    return phases([*prompt, *said], len(prompt), marks)[len(prompt) :]


def count_phases(
    documents: Sequence[Encoded], positions: Positions, marks: ThinkingMarks
) -> dict[str, int]:
    """Count the tokens of `documents` that enter statistics, by phase."""
    found = Counter(
        phase
        for document in documents
        for phase, counted in zip(
            phases_of(document, marks), document.counted(positions), strict=True
        )
        if counted
    )
    return {phase: found[phase] for phase in PHASES}
