"""Fitted maps put in place of the oracle: how near the steered base model comes to the tuned one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from toolkit.analysis.linear_fit import Rank
from toolkit.analysis.sequential_kl import Divergences, kl_divergence
from toolkit.generation import (
    Generated,
    Prompts,
    continuation_logits,
    end_tokens,
    generate,
    make_prompts,
)
from toolkit.hooks import Site, capture, replace
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
    own greedy tokens, so that after the first differing token contexts differ too. `texts` holds
    each candidate's own greedy tokens by prompt; the tuned model's are under None.
    """

    divergences: dict[tuple[Candidate, Forcing], Divergences] = field(default_factory=dict)
    tokens: dict[Candidate | None, list[list[int]]] = field(default_factory=dict)

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
        _Round(pair, batch, n_new, ends, pad_id, evaluation).run(candidates, advance)
    return evaluation


class _Round:
    """One batch of prompts."""

    def __init__(
        self,
        pair: ModelPair,
        prompts: Prompts,
        n_new: int,
        ends: Sequence[int],
        pad_id: int,
        evaluation: Evaluation,
    ) -> None:
        self.pair, self.prompts, self.evaluation = pair, prompts, evaluation
        self.n_new, self.ends, self.pad_id = n_new, ends, pad_id
        self.base, self.sites = pair.base_blocks.model, pair.base_blocks.sites
        self.generated, self.own_logits = self._generate(pair.tuned)
        evaluation.said(None, self.generated)
        with capture(_outputs(pair.tuned_blocks.sites.blocks)) as self.tuned_states:
            self.tuned_logits = self._continue(pair.tuned)

    def run(self, candidates: Sequence[Candidate], advance: Callable[[], None]) -> None:
        with capture(_inputs(self.sites.blocks)) as states:
            self._compare(NONE, "tuned", self._continue(self.base))
        self._own(NONE)
        with self._oracle():
            oracle_logits = self._continue(self.base)
        self._compare(ORACLE, "tuned", oracle_logits)
        self._own_oracle(oracle_logits)
        advance()
        for candidate in candidates:
            assert candidate.adapters is not None
            with ExitStack() as stack:
                if candidate.layers != "all":
                    layer = candidate.layers
                    started = self.pair.base_blocks.started_at(layer, states[str(layer)])
                    stack.enter_context(started)
                stack.enter_context(steer(self.base, candidate.adapters, self.sites))
                self._compare(candidate, "tuned", self._continue(self.base))
            if candidate.layers == "all":
                self._own(candidate)
            advance()

    def _own(self, candidate: Candidate) -> None:
        with ExitStack() as stack:
            if candidate.adapters:
                stack.enter_context(steer(self.base, candidate.adapters, self.sites))
            generated, logits = self._generate(self.base)
        self.evaluation.said(candidate, generated)
        counted = generated.counted & self.generated.counted
        divergences = Divergences(kl_divergence(self.own_logits, logits), counted)
        self.evaluation.add(candidate, "own", divergences)

    def _own_oracle(self, logits: Tensor) -> None:
        """If the oracle chooses every token that the tuned model chose, both forcings are one."""
        chosen = logits.argmax(-1) == self.generated.ids
        if bool((chosen | ~self.generated.counted).all()):
            self._compare(ORACLE, "own", logits)

    def _compare(self, candidate: Candidate, forcing: Forcing, logits: Tensor) -> None:
        nats = kl_divergence(self.tuned_logits, logits)
        part = Divergences(nats, self.generated.counted)
        self.evaluation.add(candidate, forcing, part)

    def _generate(self, model: torch.nn.Module) -> tuple[Generated, Tensor]:
        return generate(model, self.prompts, self.n_new, self.ends, self.pad_id)

    def _continue(self, model: torch.nn.Module) -> Tensor:
        return continuation_logits(model, self.prompts, self.generated)

    @contextmanager
    def _oracle(self) -> Iterator[None]:
        """Every block output of the base model overwritten with the tuned model's."""
        with ExitStack() as stack:
            for name, site in _outputs(self.sites.blocks).items():
                stack.enter_context(replace(site, _constant(self.tuned_states[name])))
            yield


def _constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: value


def _outputs(blocks: Sequence[torch.nn.Module]) -> dict[str, Site]:
    return {str(layer): Site(block, "output") for layer, block in enumerate(blocks)}


def _inputs(blocks: Sequence[torch.nn.Module]) -> dict[str, Site]:
    return {str(layer): Site(block, "input") for layer, block in enumerate(blocks)}
