"""Fitted maps put in place of the oracle: how near the steered model comes to the tuned one."""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from toolkit.adapters.attach import steer
from toolkit.analysis.divergence import Divergences, Predictions
from toolkit.evaluation.candidates import ALWAYS, ORACLE, Candidate
from toolkit.models.generation import (
    Generated,
    Prompts,
    continuation_logits,
    end_tokens,
    greedy,
    make_prompts,
    prefill,
    whole_logits,
)
from toolkit.models.hooks import capture, constant, replace
from toolkit.models.pair import ModelPair
from toolkit.runtime.processes import ALONE, Processes

Forcing = Literal["tuned", "own"]
Tensors = dict[str, Tensor]
PROMPTS_A_BATCH = 16  # that are generated from together
FORCINGS: tuple[Forcing, ...] = ("tuned", "own")


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

    def add(self, candidate: Candidate | None, outcome: Tensors) -> None:
        """What one batch of prompts gave for `candidate`; None is the tuned model itself."""
        if "said.ids" in outcome:
            rows = zip(outcome["said.ids"], outcome["said.counted"], strict=True)
            self.tokens.setdefault(candidate, []).extend(ids[c].tolist() for ids, c in rows)
        if "agrees" in outcome:
            self.oracle_agrees &= bool(outcome["agrees"])
        for forcing in FORCINGS:
            if candidate and f"{forcing}.nats" in outcome:
                part = Divergences(outcome[f"{forcing}.nats"], outcome[f"{forcing}.counted"])
                known = self.divergences.get((candidate, forcing))
                parts = [known, part] if known else [part]
                self.divergences[candidate, forcing] = Divergences.join(parts)


@torch.no_grad()
def evaluate(
    pair: ModelPair,
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Candidate],
    n_new: int = 32,
    batch_size: int = PROMPTS_A_BATCH,
    advance: Callable[[], None] = lambda: None,
    kept: MutableMapping[str, Tensors] | None = None,
    processes: Processes = ALONE,
) -> Evaluation:
    """Compare `candidates` with the tuned model on greedy continuations of `prompts`.

    No steering and the oracle are always among them. Candidates that steer one block are compared
    under tuned forcing only, starting from that block. `kept` holds what each batch of prompts gave
    for each candidate: what is there already is not run again. All `processes` share the
    candidates of a batch, so that batches are the same in every world.
    """
    ends = end_tokens(pair.tuned_runner.model, pair.tokenizer)
    pad_id = pair.tokenizer.pad_token_id or 0
    kept = {} if kept is None else kept
    evaluation = Evaluation()
    for start in range(0, len(prompts), batch_size):
        batch = make_prompts(prompts[start : start + batch_size], pad_id, pair.device)
        round_ = PromptBatch(pair, batch, n_new, ends)

        def outcome(index: int, candidate: Candidate | None, start: int = start, round_=round_):
            name = f"{start:05}-{index:04}"
            if name not in kept:
                kept[name] = round_.outcome(candidate)
            advance()
            return kept[name]

        asked = [*ALWAYS, *candidates]
        tasks = [partial(outcome, index, candidate) for index, candidate in enumerate(asked)]
        for candidate, found in zip(asked, processes.spread(tasks), strict=True):
            evaluation.add(candidate, found)
    if evaluation.oracle_agrees:  # then it reads the same tokens under both forcings
        evaluation.divergences[ORACLE, "own"] = evaluation.divergences[ORACLE, "tuned"]
    return evaluation


def n_comparisons(
    n_prompts: int, n_candidates: int, processes: Processes, batch_size: int = PROMPTS_A_BATCH
) -> int:
    """How often `evaluate` advances in this process."""
    a_batch = len(range(processes.rank, n_candidates + len(ALWAYS), processes.size))
    return -(-n_prompts // batch_size) * a_batch


class PromptBatch:
    """One batch of prompts. What candidates are compared with is made when it is first needed."""

    def __init__(self, pair: ModelPair, prompts: Prompts, n_new: int, ends: Sequence[int]) -> None:
        self.prompts, self.n_new, self.ends = prompts, n_new, ends
        self.blocks, self.base, self.tuned = pair.base_runner, pair.base_runner.model, pair.tuned
        self.sites, self.tuned_sites = self.blocks.sites, pair.tuned_runner.sites

    def outcome(self, candidate: Candidate | None) -> Tensors:
        """What `candidate` said and how far from the tuned model it was, as tensors by name."""
        if candidate is None:
            found = _said(self.generated)
        elif candidate == ORACLE:
            found = self._oracle()
        elif candidate.layers == "all":
            found = self._everywhere(candidate)
        else:
            found = self._single(candidate, candidate.layers)
        return {name: tensor.cpu() for name, tensor in found.items()}

    @cached_property
    def _tuned_reading(self) -> tuple[Generated, Predictions, Predictions]:
        """What the tuned model said, and its predictions as it said it and as it reads it."""
        start = prefill(self.tuned, self.prompts)
        generated, own_logits = greedy(self.tuned, self.prompts, start, self.n_new, self.ends)
        read = continuation_logits(self.tuned, self.prompts, start, generated)
        return generated, Predictions(own_logits), Predictions(read)

    @property
    def generated(self) -> Generated:
        return self._tuned_reading[0]

    # Steering one block starts from the base model's states and needs no cache: like is compared
    # with like, so these and the oracle have the tuned model's own uncached pass.

    @cached_property
    def _tuned_states(self) -> tuple[Predictions, dict[str, Tensor]]:
        with capture(self.tuned_sites.outputs) as states:
            logits = whole_logits(self.tuned, self.prompts, self.generated)
        return Predictions(logits), states

    @cached_property
    def _base_states(self) -> dict[str, Tensor]:
        with capture(self.sites.inputs) as states:
            whole_logits(self.base, self.prompts, self.generated)
        return states

    def _everywhere(self, candidate: Candidate) -> Tensors:
        """Both forcings, from one reading of the prompts."""
        generated, own, read = self._tuned_reading
        with self._attached(candidate):
            start = prefill(self.base, self.prompts)
            logits = continuation_logits(self.base, self.prompts, start, generated)
            said, own_logits = greedy(self.base, self.prompts, start, self.n_new, self.ends)
        found = _compared("tuned", read.divergence(logits), generated.counted)
        both = said.counted & generated.counted
        return found | _compared("own", own.divergence(own_logits), both) | _said(said)

    def _single(self, candidate: Candidate, layer: int) -> Tensors:
        states = self._base_states[str(layer)]
        with self.blocks.started_at(layer, states), self._attached(candidate):
            return self._whole()[0]

    def _oracle(self) -> Tensors:
        """Every block output of the base model overwritten with the tuned model's."""
        states = self._tuned_states[1]
        with ExitStack() as stack:
            for name, site in self.sites.outputs.items():
                stack.enter_context(replace(site, constant(states[name])))
            found, logits = self._whole()
        agrees = (logits.argmax(-1) == self.generated.ids) | ~self.generated.counted
        return found | {"agrees": agrees.all()}

    def _whole(self) -> tuple[Tensors, Tensor]:
        logits = whole_logits(self.base, self.prompts, self.generated)
        nats = self._tuned_states[0].divergence(logits)
        return _compared("tuned", nats, self.generated.counted), logits

    @contextmanager
    def _attached(self, candidate: Candidate) -> Iterator[None]:
        if candidate.adapters is None:
            yield
        else:
            with steer(self.base, candidate.adapters, self.sites):
                yield


def _compared(forcing: Forcing, nats: Tensor, counted: Tensor) -> Tensors:
    return {f"{forcing}.nats": nats, f"{forcing}.counted": counted}


def _said(generated: Generated) -> Tensors:
    return {"said.ids": generated.ids, "said.counted": generated.counted}
