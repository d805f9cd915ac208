"""Ranks spread over blocks: what each direction of each block explains, and what it is worth."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from toolkit.analysis.linear_fit import LinearFit, explained, fit_linear
from toolkit.analysis.rank_budget import spread
from toolkit.documents.batches import Batch, make_batches
from toolkit.documents.tokens import Positions, encode_all
from toolkit.errors import InputError
from toolkit.evaluation.injection import Propagation
from toolkit.fitting.closed_form import STATE, TARGET, Plan, Sums, fit_batches, require
from toolkit.fitting.from_moments import adapter_from
from toolkit.lockstep.march import March
from toolkit.models.deltas import delta
from toolkit.models.edits import target_of
from toolkit.models.pair import ModelPair
from toolkit.runtime.progress import progress
from toolkit.statistics import Moments, MomentSums

PROBE_RANK = 8  # of the map whose error is put into each block
PROBE_TOKENS = 512


@dataclass(frozen=True)
class BlockErrors:
    """What a post-block map leaves in each block, and what that costs at the end.

    left: by block and rank, the energy of the forced delta that is left on held-out documents, as
        a share of the stream's energy: the relative error behind the block, squared.
    gains: by block and direction, what it explains on fit documents, as the same share.
    costs: by block, nats per token for each unit of `left`, measured with the error that the map
        of rank 8 makes on fit documents, put into that block of the tuned model alone.
    step_gains: by block, its relative error behind over that in front (1 for the first block),
        when the error is the one that the map of the block before makes.
    """

    left: tuple[tuple[float, ...], ...]
    gains: tuple[tuple[float, ...], ...]
    costs: tuple[float, ...]
    step_gains: tuple[float, ...]


@dataclass(frozen=True)
class ForcedFit:
    """One block's forced fit: from fit documents; its moments there and on held-out documents.

    `energy` is that of the stream behind the block, on the same two sides; held-out parts are None
    where there are no such documents.
    """

    layer: int
    fit: LinearFit
    moments: tuple[Moments, Moments | None]
    energy: tuple[float, float | None]

    @property
    def gains(self) -> list[float]:
        """What each direction explains of the target's energy on fit documents, falling.

        As a share of the stream's energy: the scale that the next norm reads on.
        """
        c_tx = self.moments[0].covariance[TARGET, STATE]
        directions = self.fit.directions
        energies = (directions.T @ self.fit.full @ c_tx.T @ directions).diagonal()
        return (energies / self.energy[0]).tolist()

    @property
    def left(self) -> list[float]:
        """What each rank leaves of the target on held-out documents, over the stream's energy."""
        moments, energy = self.moments[1], self.energy[1]
        if moments is None or energy is None:
            raise ValueError("there are no held-out documents")
        whole = moments.energy(TARGET)
        ranks = range(self.fit.directions.shape[1] + 1)
        shares = explained(self.fit, moments, STATE, TARGET, whole, ranks)
        return [(1 - shares[rank]) * whole / energy for rank in ranks]


@torch.no_grad()
def forced_fits(
    pair: ModelPair, batches: Sequence[Batch], location: str, show_progress: bool = False
) -> Iterator[ForcedFit]:
    """March, and yield every block's forced fit at `location` at all ranks."""
    target = target_of(location)
    locations = tuple(sorted({location, target, "post_block"}))
    march = March(pair.base_runner, pair.tuned_runner, batches, locations, free=False)
    plan = Plan(location, "linear", "full", "forced")
    sides = {batch.held_out for batch in batches}
    left = pair.n_layers * len(batches)
    with progress("looking at ranks", left, show_progress) as advance:
        for layer in march.layers():
            sums = {side: Sums(plan, [(TARGET, TARGET)]) for side in sides}
            streams = {side: MomentSums([(STATE, STATE)]) for side in sides}
            for step in march.steps(layer):
                sums[step.batch.held_out].update(step)
                streams[step.batch.held_out].update({STATE: step.source("forced", "post_block")})
                advance()
            march.advance(layer, {})
            moments = {side: found.moments.result() for side, found in sums.items()}
            energy = {side: found.result().energy(STATE) for side, found in streams.items()}
            width = len(moments[False].mean[TARGET])
            yield ForcedFit(
                layer,
                fit_linear(moments[False], STATE, TARGET, max_rank=width),
                (moments[False], moments.get(True)),
                (energy[False], energy.get(True)),
            )


def allocated(
    pair: ModelPair,
    documents: Iterable[Any],
    plan: Plan,
    positions: Positions = "all",
    max_length: int = 512,
    batch_tokens: int = 2048,
    seed: int = 0,
    show_progress: bool = False,
) -> Plan:
    """`plan` with the same parameters in all, spread over blocks where they explain most.

    Each direction of a block's forced fit explains some of its delta's energy; as shares of the
    stream's energy directions of different blocks compare, and the largest are taken. Every block
    keeps one.
    """
    if not isinstance(plan.rank, int) or plan.rank < 1:
        raise InputError(f"rank is {plan.rank!r}: a whole number above 0 can be spread over blocks")
    require(pair, plan.location)
    batches = fit_batches(pair, documents, positions, max_length, batch_tokens, seed)
    gains = [found.gains for found in forced_fits(pair, batches, plan.location, show_progress)]
    return replace(plan, rank=spread(gains, plan.rank * pair.n_layers))


def block_errors(
    pair: ModelPair,
    documents: Iterable[Any],
    max_length: int = 512,
    batch_tokens: int = 2048,
    seed: int = 0,
    show_progress: bool = False,
) -> BlockErrors:
    """What post-block maps of each rank leave in each block, and what an error there costs."""
    require(pair, "post_block")
    encoded = encode_all(documents, pair.tokenizer, max_length)
    pad_id = pair.tokenizer.pad_token_id or 0
    batches = make_batches(encoded, "all", batch_tokens, pad_id, pair.device, seed)
    probe = Propagation(pair.tuned_runner, probe_batch(batches))
    left, gains, costs, steps = [], [], [], [1.0]
    for found in forced_fits(pair, batches, "post_block", show_progress):
        left.append(tuple(found.left))
        gains.append(tuple(found.gains))
        cost, step = _cost(pair, probe, found)
        costs.append(cost)
        steps.append(step)
    return BlockErrors(tuple(left), tuple(gains), tuple(costs), tuple(steps[:-1]))


def probe_batch(batches: Sequence[Batch], n_tokens: int = PROBE_TOKENS) -> Batch:
    """The first documents of the fit batch with the longest ones: about `n_tokens` in all."""
    batch = max((b for b in batches if not b.held_out), key=lambda b: b.ids.shape[1])
    lengths = batch.mask.sum(1).cumsum(0)
    n = max(int((lengths <= n_tokens).sum()), 1)
    ids, mask, counted = (part[:n] for part in (batch.ids, batch.mask, batch.counted))
    return Batch(ids, mask, counted, batch.keys[: int(counted.sum())], False)


@torch.no_grad()
def _cost(pair: ModelPair, probe: Propagation, found: ForcedFit) -> tuple[float, float]:
    """Nats for each unit of the error's relative energy, and its growth in the next block."""
    layer, blocks = found.layer, pair.base_runner
    call = blocks.call(layer, probe.batch)
    state, _ = blocks.run(layer, call, probe.entering[layer], ())
    rank = min(PROBE_RANK, found.fit.directions.shape[1])
    adapter = adapter_from(found.fit, rank, state.dtype).to(state.device)
    error = adapter(state) - delta(probe.leaving[layer], state).to(state.dtype)
    growth = probe.inject(layer, "post_block", error)
    if growth.errors[0] == 0:
        return 0.0, 1.0
    return growth.kl / growth.errors[0] ** 2, growth.to_next
