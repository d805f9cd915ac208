"""Whole distributions: along the tuned model's greedy tokens, along samples of it, and of others.

The comparison looks along one path, the tuned model's greedy tokens. What models would say at
temperature 1 is looked at here, in both directions, and what they say greedily by themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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

SAMPLES = 1  # continuations that are sampled from each model for a prompt
TOP = 5  # next tokens that are kept of every distribution
TOGETHER = PROMPTS_A_BATCH // 2  # prompts: four times their logits are held at once

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
) -> Distributions:
    """Compare `candidates` with the tuned model, whose greedy `answers` to `prompts` are known.

    One continuation of at most `n_new` tokens is sampled a prompt and model, by random numbers
    that belong to the prompt's place alone: batches do not change them, and models share them.
    Candidates go through the model together, each with copies of the prompts.
    """
    draws = np.stack([np.random.default_rng([seed, i]).random(n_new) for i in range(len(prompts))])
    said: list[NextTokens] = []
    found: dict[Candidate, list[Likeness]] = {candidate: [] for candidate in candidates}
    n_together = min(TOGETHER, len(prompts))
    groups = in_groups([candidate.shares for candidate in candidates], n_together)
    for start in range(0, len(prompts), TOGETHER):
        rows = slice(start, start + TOGETHER)
        batch = _Batch(pair, prompts[rows], answers[rows], torch.from_numpy(draws[rows]))
        said.append(batch.next_tokens)
        for group in groups:
            members = [candidates[index] for index in group]
            for candidate, likeness in zip(members, batch.likeness(members), strict=True):
                found[candidate].append(likeness)
    joined = {candidate: Likeness.join(parts) for candidate, parts in found.items()}
    return Distributions(prompts, answers, NextTokens.join(said), joined)


class _Batch:
    """A batch of prompts, and what the tuned model makes of it."""

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
        self.tuned = _Reader(pair.tuned, self.prompts)
        logits = self.tuned.read(self.answers)
        self.next_tokens, self.choices = NextTokens.of(logits), logits.argmax(-1)
        self.along_answers = Predictions(logits)
        self.sample = self.tuned.sampled(self.draws, self.ends)
        self.along_sample = Predictions(self.tuned.read(self.sample))

    def likeness(self, candidates: Sequence[Candidate]) -> list[Likeness]:
        """Return how alike the tuned model and each of `candidates` are on these prompts."""
        n, runner = len(candidates), self.pair.base_runner
        with side_by_side(candidates, runner.model, runner.sites):
            models = _Reader(runner.model, self.prompts.times(n))
            along_answers = [
                (
                    self.along_answers.total_variation(logits),
                    NextTokens.of(logits),
                    self._differs(logits),
                )
                for logits in models.read(self.answers.times(n)).chunk(n)
            ]
            along_sample = models.read(self.sample.times(n)).chunk(n)
            forward = [self.along_sample.divergence(logits) for logits in along_sample]
            answers = models.greedy(self.draws.shape[1], self.ends)
            samples = models.sampled(self.draws.repeat(n, 1), self.ends)
            own = [Predictions(logits) for logits in models.read(samples).chunk(n)]
        reverse = [
            ours.divergence(self.tuned.read(sample))
            for ours, sample in zip(own, samples.parts(n), strict=True)
        ]
        counted = self.answers.counted.cpu()
        found = zip(
            along_answers, forward, reverse, answers.parts(n), samples.parts(n), strict=True
        )
        return [
            Likeness(
                forward=_path(self.sample, ahead),
                reverse=_path(sample, back),
                variation=Divergences(variation.cpu(), counted),
                disagreement=Divergences(differs.double(), counted),
                next_tokens=next_tokens,
                answers=answer.tokens,
            )
            for (variation, next_tokens, differs), ahead, back, answer, sample in found
        ]

    def _differs(self, logits: Tensor) -> Tensor:
        """Return where another token than the tuned model's is the most likely."""
        return (logits.argmax(-1) != self.choices).cpu()


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
