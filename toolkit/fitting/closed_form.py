"""Adapters without a gradient: fitted block by block as the march passes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.adapters.adapter import Adapter, columns
from toolkit.adapters.collection import Adapters, Fit
from toolkit.adapters.linear import Linear
from toolkit.analysis.linear_fit import Rank, fit_linear
from toolkit.documents.batches import Batch, make_batches
from toolkit.documents.tokens import Positions, encode_all
from toolkit.errors import InputError
from toolkit.fitting.from_moments import adapter_from, loreft_from
from toolkit.fitting.regression import Tokens, match
from toolkit.lockstep.march import March, Step
from toolkit.models.edits import target_of
from toolkit.models.pair import ModelPair
from toolkit.runtime.progress import progress
from toolkit.statistics import Moments, MomentSums

STATE, TARGET = "state", "target"
FITTED_AT = ("heads", "pre_mlp", "post_mlp", "post_block")
FITS = ("free", "forced", "sequential", "blended")
STEERED = ("sequential", "blended")  # fits that read a stream of their own
FITTED_KINDS = ("vector", "linear", "loreft", "nonlinear")


@dataclass(frozen=True)
class Plan:
    """What to fit in every block: a kind of adapter at a location.

    `fit`: ``forced`` supplies what each block contributes by itself; ``sequential`` what is still
    missing behind the adapters of earlier blocks; ``free`` the whole difference of the two models'
    own states, upstream changes again in every block; ``blended`` the block's own contribution and
    the share `blend` of what earlier blocks left missing (0 and 1 are nearly the other two).
    `rank` is one for all blocks, or one for each. A non-linear adapter starts from the linear fit
    and is regressed on the block's tokens.
    """

    location: str
    kind: str
    rank: Rank | tuple[int, ...]
    fit: Fit
    blend: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in FITTED_KINDS:
            raise InputError(f"kind is {self.kind!r}: expected one of {', '.join(FITTED_KINDS)}")
        if self.fit not in FITS:
            raise InputError(f"fit is {self.fit!r}: expected {', '.join(FITS)}")
        if self.location not in FITTED_AT:
            expected = ", ".join(FITTED_AT)
            raise InputError(f"location is {self.location!r}: adapters are fitted at {expected}")
        least = 1 if self.kind in ("loreft", "nonlinear") else 0
        for rank in self.rank if isinstance(self.rank, tuple) else (self.rank,):
            if rank != "full" and not (isinstance(rank, int) and rank >= least):
                raise InputError(
                    f'rank is {rank!r}: expected a whole number from {least} up, or "full"'
                )

    @property
    def name(self) -> str:
        ranks = "-".join(map(str, self.rank)) if isinstance(self.rank, tuple) else str(self.rank)
        return f"{self.fit}-{self.blend}-{self.location}-{self.kind}-{ranks}"

    def rank_at(self, layer: int) -> Rank:
        return self.rank[layer] if isinstance(self.rank, tuple) else self.rank


def fit_adapters(
    pair: ModelPair,
    documents: Iterable[Any],
    plans: Sequence[Plan],
    positions: Positions = "all",
    max_length: int = 512,
    batch_tokens: int = 2048,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[Plan, Adapters]:
    """Fit every plan on the fit documents, in one march; no gradient is taken through a model.

    Raises InputError where a location does not apply to the family or the documents do not suffice.
    """
    for plan in plans:
        require(pair, plan.location)
        if isinstance(plan.rank, tuple) and len(plan.rank) != pair.n_layers:
            raise InputError(
                f"{len(plan.rank)} ranks for {pair.n_layers} blocks: give one, or one for each"
            )
    batches = fit_batches(pair, documents, positions, max_length, batch_tokens, seed)
    return _march(pair, batches, plans, seed, show_progress)


def require(pair: ModelPair, location: str) -> None:
    """Raise InputError, with the reason, where the family has no such location."""
    if reason := pair.unavailable.get(location):
        raise InputError(f"this family has no {location!r}: {reason}")


def fit_batches(
    pair: ModelPair,
    documents: Iterable[Any],
    positions: Positions,
    max_length: int,
    batch_tokens: int,
    seed: int,
) -> list[Batch]:
    """The fit documents, in batches."""
    encoded = [d for d in encode_all(documents, pair.tokenizer, max_length) if not d.held_out]
    pad_id = pair.tokenizer.pad_token_id or 0
    return make_batches(encoded, positions, batch_tokens, pad_id, pair.device, seed)


@torch.no_grad()
def _march(
    pair: ModelPair,
    batches: list[Batch],
    plans: Sequence[Plan],
    seed: int,
    show_progress: bool,
) -> dict[Plan, Adapters]:
    locations = {plan.location for plan in plans} | {"post_block"}
    locations |= {target_of(location) for location in locations}
    march = March(
        pair.base_runner,
        pair.tuned_runner,
        batches,
        tuple(sorted(locations)),
        steered={plan.name: plan.location for plan in plans if plan.fit in STEERED},
        free=any(plan.fit == "free" for plan in plans),
    )
    fitted: dict[Plan, dict[int, Adapter]] = {plan: {} for plan in plans}
    left = pair.n_layers * len(batches)
    with progress("fitting block by block", left, show_progress) as advance:
        for layer in march.layers():
            sums = {plan: Sums(plan) for plan in plans}
            for step in march.steps(layer):
                for plan in plans:
                    sums[plan].update(step)
                advance()
            for plan in plans:
                fitted[plan][layer] = sums[plan].adapter(layer, pair.dtype, seed)
            steered = [plan for plan in plans if plan.fit in STEERED]
            march.advance(layer, {p.name: _steering(fitted[p][layer], pair) for p in steered})
    return {
        plan: Adapters(plan.location, by_layer, plan.fit, {"blend": plan.blend})
        for plan, by_layer in fitted.items()
    }


def _steering(adapter: Adapter, pair: ModelPair) -> Callable[[Tensor], Tensor]:
    """`adapter` where the models are, on states in its own precision, as `steer` attaches it."""
    adapter.to(pair.device)
    dtype = next(adapter.parameters()).dtype
    return lambda states: adapter(states.to(dtype))


class Sums:
    """What one plan needs of one block: moments, and for a non-linear one the tokens themselves.

    `more` are moments that are asked for beside those of a fit.
    """

    def __init__(self, plan: Plan, more: Sequence[tuple[str, str]] = ()) -> None:
        self.plan = plan
        self.moments = MomentSums([(STATE, STATE), (TARGET, STATE), *more])
        self.tokens: list[Tokens] = []

    def update(self, step: Step) -> None:
        states, targets = pairs(step, self.plan)
        self.moments.update({STATE: states, TARGET: targets})
        if self.plan.kind == "nonlinear":
            self.tokens.append(Tokens(states, targets))

    def adapter(self, layer: int, dtype: torch.dtype, seed: int) -> Adapter:
        rank = 0 if self.plan.kind == "vector" else self.plan.rank_at(layer)
        moments = self.moments.result()
        width = len(moments.mean[STATE])
        if rank != "full" and rank > width:
            raise InputError(
                f"rank {rank} is more than the {width} dimensions at {self.plan.location}"
            )
        if self.plan.kind == "loreft":
            return loreft_from(moments, STATE, TARGET, rank, dtype)
        if self.plan.kind != "nonlinear":
            return _linear(moments, rank, dtype)
        # Regressed where the tokens are, and in their precision: the model's may be a half.
        tokens = Tokens.join(self.tokens)
        linear = _linear(moments, columns(rank, width), tokens.states.dtype)
        assert isinstance(linear, Linear)
        return match(linear.to(tokens.states.device), tokens, seed).to(dtype)


def pairs(step: Step, plan: Plan) -> tuple[Tensor, Tensor]:
    """The state that an adapter reads and what it is to supply, of the counted tokens."""
    if plan.fit == "free":
        return step.source("free", plan.location), step.delta("free", plan.location)
    target = target_of(plan.location)
    own = step.delta("forced", target)
    if plan.fit == "forced":
        return step.source("forced", plan.location), own
    missing = step.sequential_delta(plan.name, target)
    if plan.fit == "blended":
        missing = own + plan.blend * (missing - own)
    return step.steered[plan.name][plan.location], missing


def _linear(moments: Moments, rank: Rank, dtype: torch.dtype) -> Adapter:
    widest = 0 if rank == "full" else rank
    return adapter_from(fit_linear(moments, STATE, TARGET, max_rank=widest), rank, dtype)
