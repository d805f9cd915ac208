"""Whole distributions: along the tuned model's greedy tokens, along samples of it, and of others.

The comparison looks along one path, the tuned model's greedy tokens. What models would say at
temperature 1 is looked at here, in both directions, and what they say greedily by themselves.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.analysis.divergence import Divergences, Predictions, likely
from toolkit.evaluation.candidates import Candidate, in_groups, side_by_side
from toolkit.evaluation.reference import PROMPTS_A_BATCH, padded
from toolkit.models.generation import (
    Generated,
    Prefilled,
    Prompts,
    continuation_logits,
    end_tokens,
    greedy,
    make_prompts,
    prefill,
    sampled,
)
from toolkit.models.locations import causal_lm
from toolkit.models.pair import ModelPair
from toolkit.runtime.processes import ALONE, Processes

SAMPLES = 1  # continuations that are sampled from each model for a prompt
TOP = 5  # next tokens that are kept of every distribution
TOGETHER = PROMPTS_A_BATCH // 2  # prompts: logits of all candidates are held at once
# The ways in which candidates are looked at (of `_Group`), and about what each costs.
LOOKS = {"along_tuned": 2.0, "answers": 1.0, "along_own": 2.0}

Tokens = list[list[int]]


@dataclass(frozen=True)
class NextTokens:
    """Hold the most likely next tokens: `ids` and `probabilities`, `[n_prompts, n_new, 5]`."""

    ids: Tensor
    probabilities: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> "NextTokens":
        """Take them from `logits` `[n_prompts, n_new, vocabulary]`."""
        return cls(*(part.cpu() for part in likely(logits, TOP)))

    @staticmethod
    def join(parts: "Sequence[NextTokens]") -> "NextTokens":
        """Return those of several batches of prompts."""
        ids, probabilities = ([getattr(p, n) for p in parts] for n in ("ids", "probabilities"))
        return NextTokens(torch.cat(ids), torch.cat(probabilities))


@dataclass(frozen=True)
class Path:
    """Hold continuations that were sampled, and the divergence of two models along them.

    `tokens` count up to and with the end of sequence.
    """

    tokens: Tokens
    divergences: Divergences

    @staticmethod
    def join(parts: "Sequence[Path]") -> "Path":
        """Return the paths of several batches of prompts."""
        tokens = [row for part in parts for row in part.tokens]
        return Path(tokens, Divergences.join([part.divergences for part in parts]))


@dataclass(frozen=True)
class Likeness:
    """Hold how alike the tuned model and another, x, are; rows are prompts.

    forward: KL(tuned ‖ x) along continuations that are sampled from the tuned model. reverse:
    KL(x ‖ tuned) along those sampled from x. variation: total variation, and disagreement: 1 where
    x's most likely token is another, both along the tuned model's greedy tokens, as are x's next
    tokens. answers: x's own greedy tokens.
    """

    forward: Path
    reverse: Path
    variation: Divergences
    disagreement: Divergences
    next_tokens: NextTokens
    answers: Tokens

    @staticmethod
    def join(parts: "Sequence[Likeness]") -> "Likeness":
        """Return the likeness over several batches of prompts."""
        return Likeness(
            forward=Path.join([part.forward for part in parts]),
            reverse=Path.join([part.reverse for part in parts]),
            variation=Divergences.join([part.variation for part in parts]),
            disagreement=Divergences.join([part.disagreement for part in parts]),
            next_tokens=NextTokens.join([part.next_tokens for part in parts]),
            answers=[row for part in parts for row in part.answers],
        )


@dataclass(frozen=True)
class Distributions:
    """Hold the likeness of each candidate and the tuned model.

    `prompts` and the tuned model's greedy `answers` to them are tokens; `next_tokens` are the
    tuned model's along these.
    """

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    next_tokens: NextTokens
    likeness: dict[Candidate, Likeness]


@torch.no_grad()
def distributions(
    pair: ModelPair,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    candidates: Sequence[Candidate],
    n_new: int,
    seed: int = 0,
    processes: Processes = ALONE,
) -> Distributions:
    """Compare `candidates` with the tuned model, whose greedy `answers` to `prompts` are known.

    One continuation of at most `n_new` tokens is sampled a prompt and model, by random numbers
    that belong to the prompt's place alone: batches do not change them, and models share them.
    Candidates go through the model together, each with copies of the prompts. All `processes` share
    what is looked at.
    """
    draws = np.stack([np.random.default_rng([seed, i]).random(n_new) for i in range(len(prompts))])
    n_together = min(TOGETHER, len(prompts))
    groups = in_groups([candidate.shares for candidate in candidates], n_together)

    # Tasks come batch by batch and group by group: of one at a time anything is held.
    @lru_cache(maxsize=1)
    def batch_at(start: int) -> _Batch:
        rows = slice(start, start + TOGETHER)
        return _Batch(pair, prompts[rows], answers[rows], torch.from_numpy(draws[rows]))

    @lru_cache(maxsize=1)
    def group_at(start: int, members: tuple[int, ...]) -> _Group:
        return _Group(batch_at(start), [candidates[index] for index in members])

    def looked(start: int, members: tuple[int, ...], looks: Sequence[str]) -> list[Any]:
        group = group_at(start, members)
        return [getattr(group, look)() for look in looks]

    places = [
        (start, tuple(group)) for start in range(0, len(prompts), TOGETHER) for group in groups
    ]
    # Ways apart read the prompts again: only what does not go round by itself is looked at so.
    n_whole = len(places) // processes.size * processes.size
    shares = [(*place, tuple(LOOKS)) for place in places[:n_whole]]
    shares += [(*place, (look,)) for place in places[n_whole:] for look in LOOKS]
    tasks = [partial(looked, *share) for share in shares]
    costs = [sum(LOOKS[look] for look in looks) for *_, looks in shares]
    found = (part for parts in processes.spread(tasks, costs) for part in parts)
    said: dict[int, NextTokens] = {}
    likeness: dict[Candidate, list[Likeness]] = {candidate: [] for candidate in candidates}
    for start, members in places:
        (said[start], along_tuned), answered, along_own = (next(found) for _ in LOOKS)
        for index, along, answer, reverse in zip(
            members, along_tuned, answered, along_own, strict=True
        ):
            whole = Likeness(**along, answers=answer, reverse=reverse)
            likeness[candidates[index]].append(whole)
    joined = {candidate: Likeness.join(parts) for candidate, parts in likeness.items()}
    return Distributions(prompts, answers, NextTokens.join(list(said.values())), joined)


class _Batch:
    """A batch of prompts, and what the tuned model makes of it, when it is first needed."""

    def __init__(
        self,
        pair: ModelPair,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        draws: Tensor,
    ) -> None:
        self.pair, self.draws = pair, draws.to(pair.device)
        self.ends = end_tokens(causal_lm(pair.tuned), pair.tokenizer)
        self.prompts: Prompts = make_prompts(prompts, pair.pad_id, pair.device)
        self.answers: Generated = padded(answers, draws.shape[1], self.prompts.ids)

    @cached_property
    def tuned(self) -> "_Reader":
        """The tuned model."""
        return _Reader(self.pair.tuned, self.prompts)

    @cached_property
    def along_answers(self) -> tuple[Predictions, NextTokens, Tensor]:
        """Its predictions along its answers: whole, the most likely tokens, and the likeliest."""
        logits = self.tuned.read(self.answers)
        return Predictions(logits), NextTokens.of(logits), logits.argmax(-1)

    @cached_property
    def sample(self) -> tuple[Generated, Predictions]:
        """Its sample, and its predictions along it."""
        sample = self.tuned.sampled(self.draws, self.ends)
        return sample, Predictions(self.tuned.read(sample))


class _Group:
    """Candidates that go through the model together, on a batch of prompts."""

    def __init__(self, batch: _Batch, candidates: Sequence[Candidate]) -> None:
        self.batch, self.candidates, self.n = batch, candidates, len(candidates)

    def along_tuned(self) -> tuple[NextTokens, list[dict[str, Any]]]:
        """Compare along what the tuned model says: its next tokens, and fields of each likeness."""
        (_, next_tokens, _), (sample, along) = self.batch.along_answers, self.batch.sample
        with self._models() as models:
            read = models.read(self.batch.answers.times(self.n)).chunk(self.n)
            found = [self._along_answers(logits) for logits in read]
            del read  # as large as the vocabulary, as are those that come
            read = models.read(sample.times(self.n)).chunk(self.n)
            forward = [_path(sample, along.divergence(logits)) for logits in read]
        return next_tokens, [
            {**fields, "forward": path} for fields, path in zip(found, forward, strict=True)
        ]

    def answers(self) -> list[Tokens]:
        """Return what each says greedily."""
        with self._models() as models:
            said = models.greedy(self.batch.draws.shape[1], self.batch.ends)
        return [part.tokens for part in said.parts(self.n)]

    def along_own(self) -> list[Path]:
        """Compare along what each says when it is sampled from."""
        with self._models() as models:
            samples = models.sampled(self.batch.draws.repeat(self.n, 1), self.batch.ends)
            read = models.read(samples).chunk(self.n)
        return [
            _path(sample, Predictions(logits).divergence(self.batch.tuned.read(sample)))
            for logits, sample in zip(read, samples.parts(self.n), strict=True)
        ]

    def _along_answers(self, logits: Tensor) -> dict[str, Any]:
        """Compare along the tuned model's greedy tokens."""
        predicted, _, choices = self.batch.along_answers
        counted, differs = self.batch.answers.counted.cpu(), (logits.argmax(-1) != choices).cpu()
        return {
            "variation": Divergences(predicted.total_variation(logits).cpu(), counted),
            "disagreement": Divergences(differs.double(), counted),
            "next_tokens": NextTokens.of(logits),
        }

    @contextmanager
    def _models(self) -> Iterator["_Reader"]:
        runner = self.batch.pair.base_runner
        with side_by_side(self.candidates, runner.model, runner.sites):
            yield self._reader

    @cached_property
    def _reader(self) -> "_Reader":
        return _Reader(self.batch.pair.base_runner.model, self.batch.prompts.times(self.n))


class _Reader:
    """A model that has read prompts, and reads or says what follows them."""

    def __init__(self, model: nn.Module, prompts: Prompts) -> None:
        self.model, self.prompts = model, prompts
        self.start: Prefilled = prefill(model, prompts)

    def read(self, generated: Generated) -> Tensor:
        """Return the logits along `generated`."""
        return continuation_logits(self.model, self.prompts, self.start, generated)

    def greedy(self, n_new: int, ends: Sequence[int]) -> Generated:
        """Return the most likely tokens."""
        return greedy(self.model, self.prompts, self.start, n_new, ends)[0]

    def sampled(self, draws: Tensor, ends: Sequence[int]) -> Generated:
        """Sample; samples are read again in one pass, as other models read them."""
        return sampled(self.model, self.prompts, self.start, draws, ends)[0]


def _path(generated: Generated, nats: Tensor) -> Path:
    return Path(generated.tokens, Divergences(nats.cpu(), generated.counted.cpu()))
