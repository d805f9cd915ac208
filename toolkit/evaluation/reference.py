"""The tuned model's continuations of prompts, made once, which other models are compared with."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.analysis.divergence import Divergences, Predictions
from toolkit.documents.corpus import pad_token
from toolkit.models.generation import (
    Generated,
    Prefilled,
    Prompts,
    continuation_logits,
    end_tokens,
    greedy,
    make_prompts,
    prefill,
)
from toolkit.models.locations import causal_lm, n_embeddings

PROMPTS_A_BATCH = 16  # that are generated from together


class PromptBatch:
    """A batch of prompts, and what the tuned model makes of it; each part when it is first needed.

    Its tokens stay. Its predictions, which are as large as the vocabulary, are dropped by `release`
    and computed again from the tokens, in one pass, when they are asked for again.
    """

    def __init__(self, model: Any, prompts: Prompts, n_new: int, ends: Sequence[int]) -> None:
        self.model, self.prompts, self.n_new, self.ends = model, prompts, n_new, ends
        self.outcomes: dict[Any, dict[str, Tensor]] = {}  # of candidates that every comparison has
        self._generated: Generated | None = None
        self._start: Prefilled | None = None
        self._read: Predictions | None = None
        self._own: Predictions | None = None

    @property
    def generated(self) -> Generated:
        """The tuned model's greedy tokens."""
        if self._generated is None:
            self._generate()
        assert self._generated is not None
        return self._generated

    @property
    def read(self) -> Predictions:
        """The tuned model's predictions as it reads its own tokens."""
        if self._read is None:
            logits = continuation_logits(self.model, self.prompts, self._prefill(), self.generated)
            self._read = Predictions(logits)
            self._start = None  # the tokens are there: the cache has served its purpose
        return self._read

    @property
    def own(self) -> Predictions:
        """The tuned model's predictions as it generated its tokens one by one."""
        if self._own is None:
            self._generate()
        assert self._own is not None
        return self._own

    def restore(self, generated: Generated) -> None:
        """Take tokens that were generated before, by the same model from the same prompts."""
        if self._generated is None:
            self._generated = generated

    def release(self) -> None:
        """Drop all that is as large as the vocabulary."""
        self._start = self._read = self._own = None

    def _prefill(self) -> Prefilled:
        if self._start is None:
            self._start = prefill(self.model, self.prompts)
        return self._start

    def _generate(self) -> None:
        generated, logits = greedy(self.model, self.prompts, self._prefill(), self.n_new, self.ends)
        self._generated, self._own = generated, Predictions(logits)


class Reference:
    """The tuned model's greedy continuations of `prompts`, in batches of `batch_size` (None: one).

    Made once in a run and handed to every comparison of it.
    """

    def __init__(
        self,
        tuned: nn.Module,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        n_new: int = 32,
        batch_size: int | None = PROMPTS_A_BATCH,
    ) -> None:
        model = causal_lm(tuned)
        device, ends = next(tuned.parameters()).device, end_tokens(model, tokenizer)
        pad_id = pad_token(tokenizer, n_embeddings(model))
        size = batch_size or max(len(prompts), 1)
        self.batches = [
            PromptBatch(
                tuned,
                make_prompts(prompts[i : i + size], pad_id, device),
                n_new,
                ends,
            )
            for i in range(0, len(prompts), size)
        ]

    def remember(self, tokens: Sequence[Sequence[int]]) -> None:
        """Take the tokens that the tuned model generated before from the first prompts.

        A batch of which all prompts are known is not generated again.
        """
        start = 0
        for batch in self.batches:
            rows = tokens[start : start + len(batch.prompts.ids)]
            if len(rows) < len(batch.prompts.ids):
                return
            batch.restore(padded(rows, batch.n_new, batch.prompts.ids))
            start += len(rows)

    def beginning(self) -> "Reference":
        """Return the first batch of prompts alone; what is made of it is made for both."""
        first = copy.copy(self)
        first.batches = self.batches[:1]
        return first

    @torch.no_grad()
    def divergence(self, model: nn.Module) -> Divergences:
        """Measure KL(tuned ‖ model) in nats a token, `model` reading the tuned model's tokens.

        Memory is that of one batch of prompts, however many there are.
        """
        parts = []
        for batch in self.batches:
            start = prefill(model, batch.prompts)
            logits = continuation_logits(model, batch.prompts, start, batch.generated)
            parts.append(Divergences(batch.read.divergence(logits), batch.generated.counted))
            batch.release()
        return Divergences.join(parts)


def padded(rows: Sequence[Sequence[int]], n_new: int, like: Tensor) -> Generated:
    """Return the counted tokens of each row as `Generated`; what follows an end does not count."""
    ids = like.new_zeros(len(rows), n_new)
    counted = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        counted[row, : len(tokens)] = True
    return Generated(ids, counted)
