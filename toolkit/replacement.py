"""Fitted maps put in place of the oracle: how near the steered model comes to the tuned one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from toolkit.analysis.linear_fit import Rank
from toolkit.analysis.sequential_kl import Divergences, Predictions
from toolkit.generation import (
    Generated,
    Prompts,
    continuation_logits,
    end_tokens,
    greedy,
    make_prompts,
    prefill,
    whole_logits,
)
from toolkit.hooks import capture, constant, replace
from toolkit.pair import ModelPair
from toolkit.steering import Adapters, steer

Forcing = Literal["tuned", "own"]
Layers = int | Literal["all"]


@dataclass(frozen=True)
class Candidate:
    """What stands in for fine-tuning: nothing, the oracle, or adapters.

    `kind` is none, oracle, vector or linear; `layers` is "all" or the one block that is steered.
    """

    kind: str
    location: str = ""
    rank: Rank | None = None
    fit: str = ""
    layers: Layers = "all"
    adapters: Adapters | None = field(default=None, compare=False)

    @classmethod
    def of(cls, adapters: Adapters, layers: Layers = "all") -> "Candidate":
        """Adapters in every block, or (`layers` a number) in that block alone."""
        if layers != "all":
            one = {layers: adapters.by_layer[layers]}
            adapters = Adapters(adapters.location, one, adapters.fit, adapters.info)
        return cls(adapters.kind, adapters.location, adapters.rank, adapters.fit, layers, adapters)

    @property
    def parameters(self) -> int:
        return self.adapters.parameters if self.adapters else 0


NONE = Candidate("none")
ORACLE = Candidate("oracle", "post_block")


@dataclass
class Evaluation:
    """Divergences from the tuned model, by candidate and forcing, and what each candidate said.

    Under forcing ``tuned`` all models read the tuned model's tokens; under ``own`` each reads its
    own greedy tokens, so that after the first differing token contexts differ too. `tokens` holds
    each candidate's own greedy tokens by prompt; the tuned model's are under None.
    `oracle_agrees`: the oracle chose every token that the tuned model chose.
    """

    divergences: dict[tuple[Candidate, Forcing], Divergences] = field(default_factory=dict)
    tokens: dict[Candidate | None, list[list[int]]] = field(default_factory=dict)
    oracle_agrees: bool = True

    def add(self, candidate: Candidate, forcing: Forcing, part: Divergences) -> None:
        known = self.divergences.get((candidate, forcing))
        parts = [known, part] if known else [part]
        self.divergences[candidate, forcing] = Divergences.join(parts)

    def said(self, candidate: Candidate | None, generated: Generated) -> None:
        rows = zip(generated.ids, generated.counted, strict=True)
        self.tokens.setdefault(candidate, []).extend(ids[c].tolist() for ids, c in rows)


@torch.no_grad()
def evaluate(
    pair: ModelPair,
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Candidate],
    n_new: int = 32,
    batch_size: int = 16,
    advance: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Compare `candidates` with the tuned model on greedy continuations of `prompts`.

    No steering and the oracle are always among them. Candidates that steer one block are compared
    under tuned forcing only, starting from that block.
    """
    ends = end_tokens(pair.tuned_blocks.model, pair.tokenizer)
    pad_id = pair.tokenizer.pad_token_id or 0
    evaluation = Evaluation()
    for start in range(0, len(prompts), batch_size):
        batch = make_prompts(prompts[start : start + batch_size], pad_id, pair.device)
        _Round(pair, batch, n_new, ends, evaluation).run(candidates, advance)
    if evaluation.oracle_agrees:  # then it reads the same tokens under both forcings
        evaluation.divergences[ORACLE, "own"] = evaluation.divergences[ORACLE, "tuned"]
    return evaluation


class _Round:
    """One batch of prompts."""

    def __init__(
        self,
        pair: ModelPair,
        prompts: Prompts,
        n_new: int,
        ends: Sequence[int],
        evaluation: Evaluation,
    ) -> None:
        self.prompts, self.n_new, self.ends, self.evaluation = prompts, n_new, ends, evaluation
        self.blocks, self.base, self.tuned = pair.base_blocks, pair.base_blocks.model, pair.tuned
        self.sites, self.tuned_sites = self.blocks.sites, pair.tuned_blocks.sites
        start = prefill(pair.tuned, prompts)
        self.generated, own_logits = greedy(pair.tuned, prompts, start, n_new, ends)
        self.own = Predictions(own_logits)
        self.read = Predictions(continuation_logits(pair.tuned, prompts, start, self.generated))
        evaluation.said(None, self.generated)

    def run(self, candidates: Sequence[Candidate], advance: Callable[[], None]) -> None:
        # Steering one block starts from the base model's states and needs no cache: like is
        # compared with like, so these and the oracle have the tuned model's own uncached pass.
        with capture(self.tuned_sites.outputs) as tuned_states:
            logits = whole_logits(self.tuned, self.prompts, self.generated)
        self.read_whole = Predictions(logits)
        with capture(self.sites.inputs) as base_states:
            whole_logits(self.base, self.prompts, self.generated)
        self._everywhere(NONE)
        self._oracle(tuned_states)
        advance()
        for candidate in candidates:
            if candidate.layers == "all":
                self._everywhere(candidate)
            else:
                self._single(candidate, base_states[str(candidate.layers)])
            advance()

    def _everywhere(self, candidate: Candidate) -> None:
        """Both forcings, from one reading of the prompts."""
        with self._attached(candidate):
            start = prefill(self.base, self.prompts)
            logits = continuation_logits(self.base, self.prompts, start, self.generated)
            said, own_logits = greedy(self.base, self.prompts, start, self.n_new, self.ends)
        self.evaluation.said(candidate, said)
        nats = self.read.divergence(logits)
        self.evaluation.add(candidate, "tuned", Divergences(nats, self.generated.counted))
        both = said.counted & self.generated.counted
        own = Divergences(self.own.divergence(own_logits), both)
        self.evaluation.add(candidate, "own", own)

    def _single(self, candidate: Candidate, states: Tensor) -> None:
        assert candidate.layers != "all"
        with self.blocks.started_at(candidate.layers, states), self._attached(candidate):
            self._add_whole(candidate)

    def _oracle(self, states: dict[str, Tensor]) -> None:
        """Every block output of the base model overwritten with the tuned model's."""
        with ExitStack() as stack:
            for name, site in self.sites.outputs.items():
                stack.enter_context(replace(site, constant(states[name])))
            logits = self._add_whole(ORACLE)
        agrees = logits.argmax(-1) == self.generated.ids
        self.evaluation.oracle_agrees &= bool((agrees | ~self.generated.counted).all())

    def _add_whole(self, candidate: Candidate) -> Tensor:
        logits = whole_logits(self.base, self.prompts, self.generated)
        nats = self.read_whole.divergence(logits)
        self.evaluation.add(candidate, "tuned", Divergences(nats, self.generated.counted))
        return logits

    @contextmanager
    def _attached(self, candidate: Candidate) -> Iterator[None]:
        if candidate.adapters is None:
            yield
        else:
            with steer(self.base, candidate.adapters, self.sites):
                yield
