"""Candidates put in place of fine-tuning: how near the steered model comes to the tuned one."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from toolkit.analysis.divergence import Divergences, Predictions
from toolkit.errors import InputError
from toolkit.evaluation.candidates import (
    ALWAYS,
    NONE,
    ORACLE,
    Candidate,
    in_groups,
    side_by_side,
)
from toolkit.evaluation.reference import PROMPTS_A_BATCH, PromptBatch, Reference
from toolkit.models.generation import (
    Generated,
    continuation_logits,
    greedy,
    prefill,
    whole_logits,
)
from toolkit.models.hooks import capture, constant, replace
from toolkit.models.pair import ModelPair
from toolkit.runtime.processes import ALONE, Processes

Forcing = Literal["tuned", "own"]
Tensors = dict[str, Tensor]
FORCINGS: tuple[Forcing, ...] = ("tuned", "own")
ForcingsOf = Callable[[Candidate], Sequence[Forcing]]
# In readings of the prompts and the tuned model's tokens, about as measured with the shipped pair.
HEAD = 0.1  # the head and divergences
GENERATION = 3.0  # of a group's tokens, one by one


@dataclass
class Evaluation:
    """Divergences from the tuned model, by candidate and forcing, and each candidate's tokens.

    Under forcing ``tuned`` all models read the tuned model's tokens; under ``own`` each reads its
    own greedy tokens, so that after the first differing token contexts differ too. `tokens` holds
    each candidate's own greedy tokens by prompt, where they were generated; the tuned model's are
    under None. `oracle_agrees`: the oracle chose every token that the tuned model chose.
    """

    divergences: dict[tuple[Candidate, Forcing], Divergences] = field(default_factory=dict)
    tokens: dict[Candidate | None, list[list[int]]] = field(default_factory=dict)
    oracle_agrees: bool = True

    def join(self, other: "Evaluation") -> None:
        """Take over what another evaluation of the same prompts found."""
        self.divergences |= other.divergences
        self.tokens |= other.tokens
        self.oracle_agrees &= other.oracle_agrees

    def of_prompts(self, rows: Sequence[int]) -> "Evaluation":
        """Return what was found on the prompts `rows` alone."""
        return Evaluation(
            {key: found.of_prompts(rows) for key, found in self.divergences.items()},
            {key: [said[row] for row in rows] for key, said in self.tokens.items()},
            self.oracle_agrees,
        )

    def add(self, candidate: Candidate | None, outcome: Tensors) -> None:
        """Add what one batch of prompts gave for `candidate`; None is the tuned model itself."""
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
# many parameters: all but three say how, and have defaults
def evaluate(
    pair: ModelPair,
    prompts: Sequence[Sequence[int]] | Reference,
    candidates: Sequence[Candidate],
    n_new: int = 32,
    *,
    forcings: Sequence[Forcing] | ForcingsOf = ("tuned",),
    batch_size: int = PROMPTS_A_BATCH,
    advance: Callable[[], None] = lambda: None,
    seen: Callable[[Candidate | None, Tensors], None] = lambda *_: None,
    kept: MutableMapping[str, Tensors] | None = None,
    processes: Processes = ALONE,
) -> Evaluation:
    """Compare `candidates` with the tuned model on its greedy continuations of `prompts`.

    `prompts` are tokens, or a `Reference` that has the continuations already (`n_new` and
    `batch_size` are then its own). No steering and the oracle are always among the candidates; a
    reference remembers what they gave. `forcings` are those of all candidates, or give each its
    own. Candidates that steer one block are compared under tuned forcing only, starting from that
    block. Those that generate go through the model in groups, in one batch. `kept` holds what each
    batch of prompts gave for each candidate: what is there already is not run again; `seen` is told
    of each as it comes. All `processes` share the groups of a batch, which are the same however
    many processes there are.
    """
    reference = reference_of(pair, prompts, n_new, batch_size)
    kept = {} if kept is None else kept
    evaluation = Evaluation()
    of = forcings if callable(forcings) else lambda _: forcings
    everyone = _everyone(candidates)
    works = _works(pair, reference, everyone, of, kept, processes)
    for batch, work in zip(reference.batches, works, strict=True):
        comparison = _Comparison(pair, batch, of)

        def outcomes(group: Sequence[int], comparison: _Comparison = comparison) -> list[Tensors]:
            names = _names(comparison.batch, group)
            members = [everyone[index] for index in group]
            if not all(name in kept for name in names):
                for name, found in zip(names, comparison.outcomes(members), strict=True):
                    kept[name] = found
            for candidate, name in zip(members, names, strict=True):
                advance()
                seen(candidate, kept[name])
            return [kept[name] for name in names]

        (tuned,) = _names(batch, [everyone.index(None)])
        if tuned in kept:
            comparison.restore(kept[tuned])
        tasks = [partial(outcomes, group) for group in work.groups]
        by_index = {
            index: found
            for group, some in zip(work.groups, processes.spread(tasks, work.costs), strict=True)
            for index, found in zip(group, some, strict=True)
        }
        for index, candidate in enumerate(everyone):
            evaluation.add(candidate, by_index[index])
            if candidate in ALWAYS:
                batch.outcomes[candidate] = by_index[index]
        batch.release()
    evaluation = evaluation.of_prompts(reference.places)
    if evaluation.oracle_agrees and "own" in of(NONE):  # it then reads the same tokens under both
        evaluation.divergences[ORACLE, "own"] = evaluation.divergences[ORACLE, "tuned"]
    return evaluation


def reference_of(
    pair: ModelPair,
    prompts: Sequence[Sequence[int]] | Reference,
    n_new: int = 32,
    batch_size: int = PROMPTS_A_BATCH,
) -> Reference:
    """Make the pair's reference for `prompts`; a reference comes back as it is."""
    if isinstance(prompts, Reference):
        return prompts
    return Reference(pair.tuned, pair.tokenizer, prompts, n_new, batch_size)


def n_comparisons(
    pair: ModelPair,
    reference: Reference,
    candidates: Sequence[Candidate],
    forcings: ForcingsOf,
    kept: Mapping[str, Tensors] | None,
    processes: Processes,
) -> int:
    """Count how often `evaluate` advances in this process."""
    everyone = _everyone(candidates)
    return sum(
        len(group)
        for work in _works(pair, reference, everyone, forcings, kept or {}, processes)
        for group, rank in zip(work.groups, processes.owners(work.costs), strict=True)
        if rank == processes.rank
    )


def _everyone(candidates: Sequence[Candidate]) -> list[Candidate | None]:
    """Return all that is compared, each once; raises InputError where two have one key."""
    everyone: dict[Candidate | None, Candidate | None] = {one: one for one in ALWAYS}
    for candidate in candidates:
        known = everyone.setdefault(candidate, candidate) or candidate
        if known.adapters is not candidate.adapters or known.weights is not candidate.weights:
            raise InputError(
                f"two candidates have the key {candidate.key!r}: give each its own, by "
                "Candidate.of(adapters, key=...)"
            )
    return list(everyone)


@dataclass(frozen=True)
class _Work:
    """Hold what processes share of a batch: groups of candidates, by index, and what each costs.

    `costs` are in readings of the prompts.
    """

    groups: list[list[int]]
    costs: list[float]


def _works(
    pair: ModelPair,
    reference: Reference,
    everyone: Sequence[Candidate | None],
    forcings: ForcingsOf,
    kept: Mapping[str, Tensors],
    processes: Processes,
) -> list[_Work]:
    """Return what is to be done on each batch, as the first process finds it.

    Others may look when some of it is done.
    """

    def cost(batch: PromptBatch, group: Sequence[int]) -> float:
        if all(name in kept for name in _names(batch, group)):
            return 0.0
        left = _left([everyone[index] for index in group], batch, forcings)
        return _cost(left, pair.n_layers, forcings)

    def works() -> list[_Work]:
        found = []
        for batch in reference.batches:
            groups = _groups(everyone, batch, forcings)
            found.append(_Work(groups, [cost(batch, group) for group in groups]))
        return found

    return processes.from_first(works)


def _names(batch: PromptBatch, group: Sequence[int]) -> list[str]:
    """Return the names under which the outcomes of a group on a batch of prompts are kept."""
    return [f"{batch.name}-{index:04}" for index in group]


def _groups(
    everyone: Sequence[Candidate | None], batch: PromptBatch, of: ForcingsOf
) -> list[list[int]]:
    """Group the candidates that generate, by their index; all others go alone.

    So does no steering, in batches like the tuned model's: a batch of another size rounds
    differently, and of two models that are the same nothing is to be recovered.
    """
    shares = [
        candidate is not None
        and candidate != NONE
        and candidate.shares
        and candidate.layers == "all"
        and "own" in of(candidate)
        for candidate in everyone
    ]
    return in_groups(shares, len(batch.rows))


def _cost(left: Sequence[Candidate | None], n_layers: int, forcings: ForcingsOf) -> float:
    """Return about what the members of a group cost of which nothing is known, in readings.

    The tuned model's tokens are made in every process. The oracle reads both models. Steering one
    block begins there. A group generates once for all its members.
    """
    if not left or (first := left[0]) is None:
        return 0.0
    if first == ORACLE:
        return 2.0
    if first.layers != "all":
        return 1 - first.layers / n_layers + HEAD
    return len(left) + (GENERATION if "own" in forcings(first) else 0.0)


def _left(
    members: Sequence[Candidate | None], batch: PromptBatch, forcings: ForcingsOf
) -> list[Candidate | None]:
    """Return those `members` of a group of which an earlier comparison does not know all."""

    def known(candidate: Candidate | None) -> bool:
        if candidate not in batch.outcomes:
            return False
        outcome = batch.outcomes[candidate]
        if candidate is None or "agrees" in outcome:  # the oracle has but one forcing
            return True
        return all(f"{forcing}.nats" in outcome for forcing in forcings(candidate))

    return [candidate for candidate in members if not known(candidate)]


class _Comparison:
    """One batch of prompts on both models. What is compared with is made when first needed."""

    def __init__(self, pair: ModelPair, batch: PromptBatch, forcings: ForcingsOf) -> None:
        self.batch, self.forcings, self.prompts = batch, forcings, batch.prompts
        self.runner, self.base, self.tuned = pair.base_runner, pair.base_runner.model, pair.tuned
        self.sites, self.tuned_sites = self.runner.sites, pair.tuned_runner.sites

    def outcomes(self, candidates: Sequence[Candidate | None]) -> list[Tensors]:
        """Return how far each of a group is from the tuned model, and its tokens, by name."""
        known, left = self.batch.outcomes, _left(candidates, self.batch, self.forcings)
        found = zip(left, self._of_group(left) if left else [], strict=True)
        made = {c: {name: tensor.cpu() for name, tensor in one.items()} for c, one in found}
        return [made[c] if c in made else known[c] for c in candidates]

    def _of_group(self, candidates: Sequence[Candidate | None]) -> list[Tensors]:
        first = candidates[0]
        if first is None:
            return [_tokens(self.batch.generated)]
        if first == ORACLE:
            return [self._oracle()]
        if first.layers != "all":
            return [self._single(first, first.layers)]
        return self._everywhere([candidate for candidate in candidates if candidate])

    def restore(self, found: Tensors) -> None:
        """Take the tuned model's tokens from the outcome that an interrupted run kept."""
        device = self.prompts.ids.device
        ids, counted = (found[f"said.{name}"].to(device) for name in ("ids", "counted"))
        self.batch.restore(Generated(ids, counted))

    # Steering one block starts from the base model's states and needs no cache: like is compared
    # with like, so these and the oracle have the tuned model's own uncached pass.

    @cached_property
    def _tuned_states(self) -> tuple[Predictions, dict[str, Tensor]]:
        with capture(self.tuned_sites.leaving) as states:
            logits = whole_logits(self.tuned, self.prompts, self.batch.generated)
        return Predictions(logits), states

    @cached_property
    def _base_states(self) -> dict[str, Tensor]:
        with capture(self.sites.inputs) as states:
            whole_logits(self.base, self.prompts, self.batch.generated)
        return states

    def _everywhere(self, candidates: Sequence[Candidate]) -> list[Tensors]:
        """Compare under every forcing that is asked for, from one reading of the prompts.

        Each of `candidates`, which all generate or do not, has a copy of the prompts.
        """
        batch, n = self.batch, len(candidates)
        found: list[Tensors] = [{} for _ in candidates]
        # The tuned model first: its own predictions come with the tokens, which are made but once.
        tuned = batch.own if "own" in self.forcings(candidates[0]) else None
        prompts, said = self.prompts.times(n), batch.generated.times(n)
        with side_by_side(candidates, self.base, self.sites):
            start = prefill(self.base, prompts)
            logits = continuation_logits(self.base, prompts, start, said)
            for candidate, one, part in zip(candidates, found, logits.chunk(n), strict=True):
                if "tuned" in self.forcings(candidate):
                    nats = batch.read.divergence(part)
                    one |= _compared("tuned", nats, batch.generated.counted)
            del logits, part  # as large as the vocabulary, as are those that come
            if tuned is None:
                return found
            own, logits = greedy(self.base, prompts, start, batch.n_new, batch.ends)
        for one, tokens, part in zip(found, own.parts(n), logits.chunk(n), strict=True):
            both = tokens.counted & batch.generated.counted
            one |= _compared("own", tuned.divergence(part), both) | _tokens(tokens)
        return found

    def _single(self, candidate: Candidate, layer: int) -> Tensors:
        states = self._base_states[str(layer)]
        started = self.runner.started_at(layer, states)
        with started, candidate.attached(self.base, self.sites):
            return self._whole()[0]

    def _oracle(self) -> Tensors:
        """Overwrite every block output of the base model with the tuned model's."""
        states = self._tuned_states[1]
        with ExitStack() as stack:
            for name, site in self.sites.leaving.items():
                stack.enter_context(replace(site, constant(states[name])))
            found, logits = self._whole()
        generated = self.batch.generated
        agrees = (logits.argmax(-1) == generated.ids) | ~generated.counted
        return found | {"agrees": agrees.all()}

    def _whole(self) -> tuple[Tensors, Tensor]:
        logits = whole_logits(self.base, self.prompts, self.batch.generated)
        nats = self._tuned_states[0].divergence(logits)
        return _compared("tuned", nats, self.batch.generated.counted), logits


def _compared(forcing: Forcing, nats: Tensor, counted: Tensor) -> Tensors:
    return {f"{forcing}.nats": nats, f"{forcing}.counted": counted}


def _tokens(generated: Generated) -> Tensors:
    # These names stand in the files of interrupted runs.
    return {"said.ids": generated.ids, "said.counted": generated.counted}
