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
from toolkit.evaluation.candidates import Candidate
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
    """
    draws = np.stack([np.random.default_rng([seed, i]).random(n_new) for i in range(len(prompts))])
    said: list[NextTokens] = []
    found: dict[Candidate, list[Likeness]] = {candidate: [] for candidate in candidates}
    for start in range(0, len(prompts), TOGETHER):
        rows = slice(start, start + TOGETHER)
        batch = _Batch(pair, prompts[rows], answers[rows], torch.from_numpy(draws[rows]))
        said.append(batch.next_tokens)
        for candidate in candidates:
            found[candidate].append(batch.likeness(candidate))
    likeness = {candidate: Likeness.join(parts) for candidate, parts in found.items()}
    return Distributions(prompts, answers, NextTokens.join(said), likeness)


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
        self.start: Prefilled = prefill(pair.tuned, self.prompts)
        logits = self._read(pair.tuned, self.start, self.answers)
        self.next_tokens, self.choices = NextTokens.of(logits), logits.argmax(-1)
        self.along_answers = Predictions(logits)
        self.sample = self._sampled(pair.tuned, self.start)
        self.along_sample = Predictions(self._read(pair.tuned, self.start, self.sample))

    def likeness(self, candidate: Candidate) -> Likeness:
        """Return how alike the tuned model and `candidate` are on these prompts."""
        base = self.pair.base_runner.model
        with candidate.attached(base, self.pair.base_runner.sites):
            start = prefill(base, self.prompts)
            logits = self._read(base, start, self.answers)
            variation = self.along_answers.total_variation(logits)
            next_tokens = NextTokens.of(logits)
            forward = self.along_sample.divergence(self._read(base, start, self.sample))
            answers = greedy(base, self.prompts, start, self.draws.shape[1], self.ends)[0]
            differs = (logits.argmax(-1) != self.choices).cpu()
            sample = self._sampled(base, start)
            own = Predictions(self._read(base, start, sample))
        reverse = own.divergence(self._read(self.pair.tuned, self.start, sample))
        counted = self.answers.counted.cpu()
        return Likeness(
            forward=_path(self.sample, forward),
            reverse=_path(sample, reverse),
            variation=Divergences(variation.cpu(), counted),
            disagreement=Divergences(differs.double(), counted),
            next_tokens=next_tokens,
            answers=answers.tokens,
        )

    def _read(self, model: nn.Module, start: Prefilled, generated: Generated) -> Tensor:
        return continuation_logits(model, self.prompts, start, generated)

    def _sampled(self, model: nn.Module, start: Prefilled) -> Generated:
        """Sample from `model`; its samples are read again in one pass, as the other reads them."""
        return sampled(model, self.prompts, start, self.draws, self.ends)[0]


def _path(generated: Generated, nats: Tensor) -> Path:
    return Path(generated.tokens, Divergences(nats.cpu(), generated.counted.cpu()))
