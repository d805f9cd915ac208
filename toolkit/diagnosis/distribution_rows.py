"""The rows of the table ``distributions``, and with them those of ``tokens`` and ``prompts``."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.analysis.divergence import Divergences, mean_and_sem
from toolkit.diagnosis.token_rows import prompt_rows, token_rows
from toolkit.documents.corpus import Corpus
from toolkit.documents.phases import PHASES, ThinkingMarks, phases_said
from toolkit.documents.tokens import Encoded
from toolkit.evaluation.candidates import Candidate
from toolkit.evaluation.compare import Evaluation
from toolkit.evaluation.distributions import (
    SAMPLES,
    Distributions,
    Likeness,
    Path,
    distributions,
)
from toolkit.models.pair import ModelPair
from toolkit.runtime.processes import ALONE, Processes

Row = dict[str, Any]
ALL = "all"


def distribution_tables(
    pair: ModelPair,
    corpus: Corpus,
    documents: Sequence[Encoded],
    models: Mapping[str, Candidate],
    evaluation: Evaluation,
    n_new: int,
    processes: Processes = ALONE,
) -> dict[str, list[Row]]:
    """Look at whole distributions; return the rows of distributions, tokens and prompts.

    `models` are by name base, recommended and runner-up; `evaluation` has their divergences along
    the tuned model's greedy answers to the prompts of `documents`. All `processes` share the work.
    """
    prompts = [document.prompt_ids for document in documents]
    marks = ThinkingMarks.of(pair.tokenizer)
    candidates = list(models.values())
    answers = evaluation.tokens[None]
    found = distributions(pair, prompts, answers, candidates, n_new, corpus.seed, processes)
    nats = {name: evaluation.divergences[c, "tuned"] for name, c in models.items()}
    rows = [
        row
        for name, candidate in models.items()
        for row in distribution_rows(name, found, candidate, nats[name], marks)
    ]
    where = token_rows(pair.tokenizer, found, models, nats, marks)
    sums = prompt_rows(pair.tokenizer, documents, nats)
    return {"distributions": rows, "tokens": where, "prompts": sums}


def distribution_rows(
    name: str,
    found: Distributions,
    candidate: Candidate,
    nats: Divergences,
    marks: ThinkingMarks,
) -> list[Row]:
    """Return the rows of one model: one for all tokens, and where there are several, of phases."""
    alike, n_new = found.likeness[candidate], nats.nats.shape[1]
    greedy = _phases(found.prompts, found.answers, n_new, marks)
    forward = _phases(found.prompts, alike.forward.tokens, n_new, marks)
    reverse = _phases(found.prompts, alike.reverse.tokens, n_new, marks)
    there = [phase for phase in PHASES if (greedy[phase] & nats.counted).any()]
    return [
        {
            "model": name,
            "phase": phase,
            **_along_answers(nats, alike, greedy[phase]),
            **_along_samples(alike.forward, forward[phase], "sampled_kl", "sequence_kl"),
            **_along_samples(alike.reverse, reverse[phase], "reverse_kl", "reverse_sequence_kl"),
            **(_answers(found.answers, alike.answers) if phase == ALL else {}),
        }
        for phase in (ALL, *(there if len(there) > 1 else ()))
    ]


def _phases(
    prompts: Sequence[Sequence[int]],
    said: Sequence[Sequence[int]],
    n_new: int,
    marks: ThinkingMarks,
) -> dict[str, Tensor]:
    """Return by phase, and for all, which generated tokens are of it, bool `[n_prompts, n_new]`."""
    found = {phase: torch.zeros(len(said), n_new, dtype=torch.bool) for phase in PHASES}
    for row, (prompt, tokens) in enumerate(zip(prompts, said, strict=True)):
        for index, phase in enumerate(phases_said(prompt, tokens, marks)):
            found[phase][row, index] = True
    return {ALL: torch.ones(len(said), n_new, dtype=torch.bool), **found}


def _along_answers(nats: Divergences, alike: Likeness, chosen: Tensor) -> Row:
    """Return what is measured along the tuned model's greedy tokens."""
    nats = nats.of_tokens(chosen)
    variation, differs = alike.variation.of_tokens(chosen), alike.disagreement.of_tokens(chosen)
    return {
        "n_prompts": int(nats.counted.any(1).sum()),
        "n_tokens": int(nats.counted.sum()),
        "kl": nats.mean,
        "kl_sem": nats.sem,
        "agreement": 1 - differs.mean,
        "agreement_sem": differs.sem,
        "total_variation": variation.mean,
        "total_variation_sem": variation.sem,
        "top_tenth": nats.top_tenth,
    }


def _along_samples(path: Path, chosen: Tensor, per_token: str, per_sequence: str) -> Row:
    """Return nats along sampled continuations, a token and a sequence, under the given names."""
    nats = path.divergences.of_tokens(chosen)
    mean, sem = nats.per_sequence
    return {
        "n_samples": SAMPLES * len(nats.nats),
        per_token: nats.mean,
        f"{per_token}_sem": nats.sem,
        per_sequence: mean,
        f"{per_sequence}_sem": sem,
    }


def _answers(tuned: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> Row:
    """Compare greedy answers, which end with the end of sequence or are cut at one length."""
    indices = [first_difference(a, b) for a, b in zip(tuned, other, strict=True)]
    differ = [index for index in indices if index is not None]
    exact, sem = mean_and_sem(torch.tensor([index is None for index in indices]).double())
    mean = sum(differ) / len(differ) if differ else None
    return {"first_difference": mean, "exact": exact, "exact_sem": sem}


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Return the index of the first token that differs; None where the two are the same."""
    if list(a) == list(b):
        return None
    alike = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(alike, min(len(a), len(b)))
