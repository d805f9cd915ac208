"""The tuned model's continuations of prompts, made once, which other models are compared with."""

import copy
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
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
PASS = 128  # tokens in whose time a pass reads the model's weights, about


class PromptBatch:
    """A batch of prompts, and what the tuned model makes of it; each part when it is first needed.

    `rows` are their numbers among all prompts. Its tokens stay. Its predictions, which are as large
    as the vocabulary, are dropped by `release` and computed again from the tokens, in one pass,
    when they are asked for again.
    """

    def __init__(
        self, model: Any, rows: Sequence[int], prompts: Prompts, n_new: int, ends: Sequence[int]
    ) -> None:
        self.model, self.rows, self.prompts = model, tuple(rows), prompts
        self.n_new, self.ends = n_new, ends
        self.outcomes: dict[Any, dict[str, Tensor]] = {}  # of candidates that every comparison has
        self._generated: Generated | None = None
        self._start: Prefilled | None = None
        self._read: Predictions | None = None
        self._own: Predictions | None = None

    @property
    def name(self) -> str:
        """Tell it from other batches of a reference; files of interrupted runs have the name."""
        return f"{zlib.crc32(str(self.rows).encode()):08x}"

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
    """The tuned model's greedy continuations of `prompts`, `batch_size` or fewer at a time.

    Made once in a run and handed to every comparison of it. A batch has prompts of like length;
    without a `batch_size` there may be any number of them. What is found is in the prompts' order.
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
        self.batches = [
            PromptBatch(
                tuned,
                rows,
                make_prompts([prompts[row] for row in rows], pad_id, device),
                n_new,
                ends,
            )
            for rows in like_lengths([len(prompt) for prompt in prompts], batch_size)
        ]

    @property
    def places(self) -> list[int]:
        """Tell where each prompt, in their order, stands among those of all batches."""
        return np.argsort([row for batch in self.batches for row in batch.rows]).tolist()

    def joined(self, parts: Sequence[Divergences]) -> Divergences:
        """Return the divergences of all batches, in the prompts' order."""
        return Divergences.join(list(parts)).of_prompts(self.places)

    def remember(self, tokens: Sequence[Sequence[int]]) -> None:
        """Take the tokens that the tuned model generated before from the first prompts.

        A batch of which all prompts are known is not generated again.
        """
        for batch in self.batches:
            if max(batch.rows) < len(tokens):
                rows = [tokens[row] for row in batch.rows]
                batch.restore(padded(rows, batch.n_new, batch.prompts.ids))

    def for_a_first_look(self) -> "Reference":
        """Return some of the prompts alone; what is made of them is made for both."""
        some = copy.copy(self)
        some.batches = self.batches[first_looked_at([len(batch.rows) for batch in self.batches])]
        return some

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
        return self.joined(parts)


def like_lengths(lengths: Sequence[int], most: int | None = PROMPTS_A_BATCH) -> list[list[int]]:
    """Group prompts, by their number, in batches of `most` or fewer that are read soonest.

    A batch is as long as its longest prompt, and takes `PASS` tokens more; the longest come first,
    so that what does not fit into memory fails soon.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    least, begins = [0], [0]  # of the first in `order`: tokens, and their last batch's begin
    for end in range(1, len(order) + 1):
        first = max(0, end - most) if most else 0
        options = [
            (least[begin] + PASS + (end - begin) * lengths[order[begin]], begin)
            for begin in range(first, end)
        ]
        tokens, begin = min(options)
        least.append(tokens)
        begins.append(begin)
    batches, end = list[list[int]](), len(order)
    while end:
        batches.insert(0, sorted(order[begins[end] : end]))
        end = begins[end]
    return batches


def first_looked_at(sizes: Sequence[int]) -> slice:
    """Return which batches, of these sizes, a first look is at: all of few prompts, or a large one.

    Of those that are as large it is the one of middling length.
    """
    if sum(sizes) <= PROMPTS_A_BATCH:
        return slice(None)
    largest = [place for place, size in enumerate(sizes) if size == max(sizes)]
    chosen = largest[len(largest) // 2]
    return slice(chosen, chosen + 1)


def padded(rows: Sequence[Sequence[int]], n_new: int, like: Tensor) -> Generated:
    """Return the counted tokens of each row as `Generated`; what follows an end does not count."""
    ids = like.new_zeros(len(rows), n_new)
    counted = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        counted[row, : len(tokens)] = True
    return Generated(ids, counted)
