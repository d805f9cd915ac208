"""Ranks spread over blocks: what each direction of each block explains, and what it is worth."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Unpack

import torch

from toolkit.analysis.linear_fit import LinearFit, explained, fit_linear
from toolkit.analysis.rank_budget import spread
from toolkit.documents.batches import Batch
from toolkit.documents.corpus import Corpus, Reading
from toolkit.errors import InputError
from toolkit.evaluation.injection import Propagation
from toolkit.fitting.closed_form import require
from toolkit.fitting.fit_statistics import PAIRS, STATE, TARGET, values_of
from toolkit.fitting.from_moments import adapter_from
from toolkit.fitting.spec import FitSpec
from toolkit.lockstep.driver import march_through
from toolkit.lockstep.march import March, Step
from toolkit.models.deltas import delta
from toolkit.models.pair import ModelPair
from toolkit.runtime.processes import Processes
from toolkit.runtime.progress import progress
from toolkit.statistics import Moments, MomentSums

PROBE_RANK = 8  # of the map whose error is put into each block
PROBE_TOKENS = 512


@dataclass(frozen=True)
class BlockErrors:
    """Hold what a post-block map leaves in each block, and what that costs at the end.

    left: by block and rank, the energy of the forced delta that is left on held-out documents, as
        a share of the stream's energy: the relative error after the block, squared.
    gains: by block and direction, what it explains on fit documents, as the same share.
    costs: by block, nats per token for each unit of `left`, measured with the error that the map
        of rank 8 makes on fit documents, put into that block of the tuned model alone.
    step_gains: by block, its relative error after it over that before it (1 for the first block),
        when the error is the one that the map of the block before makes.
    """

    left: tuple[tuple[float, ...], ...]
    gains: tuple[tuple[float, ...], ...]
    costs: tuple[float, ...]
    step_gains: tuple[float, ...]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> "BlockErrors":
        """Collect the rows of all blocks, in their order."""
        left, gains = (tuple(tuple(row[name]) for row in rows) for name in ("left", "gains"))
        # A row says how the error grows in the next block.
        steps = [1.0, *(row["step_gain"] for row in rows)][: len(rows)]
        return cls(left, gains, tuple(row["cost"] for row in rows), tuple(steps))


@dataclass(frozen=True)
class ForcedFit:
    """One block's forced fit at all ranks, from fit documents, and what it is judged by.

    moments: of the variables `x` and `t` on fit and on held-out documents. energy: of the stream
    after the block, on the same two sides. Held-out parts are None where there are no such
    documents.
    """

    layer: int
    x: str
    t: str
    fit: LinearFit
    moments: tuple[Moments, Moments | None]
    energy: tuple[float, float | None]

    @classmethod
    def of(
        cls,
        layer: int,
        x: str,
        t: str,
        fit: LinearFit,
        on_fit: Moments,
        on_held_out: Moments | None,
    ) -> "ForcedFit":
        """Take a fit after the block at all ranks, where `x` is the stream itself."""
        energy = (on_fit.energy(x), on_held_out.energy(x) if on_held_out else None)
        return cls(layer, x, t, fit, (on_fit, on_held_out), energy)

    @property
    def gains(self) -> list[float]:
        """Tell what each direction explains of the target's energy on fit documents, falling.

        As a share of the stream's energy: the scale that the next norm reads on.
        """
        c_tx = self.moments[0].covariance[self.t, self.x]
        directions = self.fit.directions
        energies = (directions.T @ self.fit.full @ c_tx.T @ directions).diagonal()
        return (energies / self.energy[0]).tolist()

    @property
    def left(self) -> list[float]:
        """What each rank leaves of the target on held-out documents, over the stream's energy."""
        moments, energy = self.moments[1], self.energy[1]
        if moments is None or energy is None:
            raise ValueError("there are no held-out documents")
        whole = moments.energy(self.t)
        ranks = range(self.fit.directions.shape[1] + 1)
        shares = explained(self.fit, moments, self.x, self.t, whole, ranks)
        return [(1 - shares[rank]) * whole / energy for rank in ranks]


class _ForcedStatistics:
    """Accumulates, by side, the moments of a forced fit and those of the stream after the block."""

    def __init__(self, spec: FitSpec) -> None:
        self.spec = spec
        self.moments: dict[bool, MomentSums] = {}
        self.streams: dict[bool, MomentSums] = {}

    def update(self, step: Step) -> None:
        """Add one batch."""
        side = step.batch.held_out
        if side not in self.moments:
            self.moments[side] = MomentSums([*PAIRS, (TARGET, TARGET)])
            self.streams[side] = MomentSums([(STATE, STATE)])
        self.moments[side].update(values_of(step, self.spec))
        self.streams[side].update({STATE: step.source("forced", "post_block")})

    def start(self) -> None:
        """Nothing: one process sees all documents."""

    def reduce(self, processes: Processes) -> None:
        """Nothing: one process sees all documents."""
        assert processes.size == 1

    def result(self, layer: int) -> ForcedFit:
        """Return the forced fit of block `layer`."""
        moments = {side: sums.result() for side, sums in self.moments.items()}
        energy = {side: sums.result().energy(STATE) for side, sums in self.streams.items()}
        fit = fit_linear(moments[False], STATE, TARGET, max_rank=len(moments[False].mean[TARGET]))
        sides = (moments[False], moments.get(True))
        return ForcedFit(layer, STATE, TARGET, fit, sides, (energy[False], energy.get(True)))


@torch.no_grad()
def forced_fits(
    pair: ModelPair, batches: Sequence[Batch], location: str, show_progress: bool = False
) -> Iterator[ForcedFit]:
    """March, and yield every block's forced fit at `location` at all ranks."""
    spec = FitSpec(location, "linear", "full", "forced")
    branch = {"pre_mlp"} if location == "heads" else set()
    locations = tuple(sorted({location, "post_block"} | branch))
    march = March(pair.base_runner, pair.tuned_runner, batches, locations, free=False)

    def listen(layer: int) -> dict[str, _ForcedStatistics]:
        return {"forced": _ForcedStatistics(spec)}

    def conclude(layer: int, found: dict[str, _ForcedStatistics]) -> tuple[ForcedFit, Any]:
        return found["forced"].result(layer), {}

    n_steps = pair.n_layers * len(batches)
    with progress("looking at ranks", n_steps, show_progress) as advance:
        yield from march_through(march, listen, conclude, advance=advance)


def allocated(
    pair: ModelPair,
    documents: Iterable[Any] | Corpus,
    spec: FitSpec,
    show_progress: bool = False,
    **reading: Unpack[Reading],
) -> FitSpec:
    """Spread the parameters of `spec` over blocks where they explain most.

    Each direction of a block's forced fit explains some of its delta's energy; as shares of the
    stream's energy directions of different blocks compare, and the largest are taken. Every block
    keeps one.
    """
    if not isinstance(spec.rank, int) or spec.rank < 1:
        raise InputError(f"rank is {spec.rank!r}: a whole number above 0 can be spread over blocks")
    require(pair, spec.location)
    batches = pair.corpus(documents, **reading).fit_batches
    gains = [found.gains for found in forced_fits(pair, batches, spec.location, show_progress)]
    return replace(spec, rank=spread(gains, spec.rank * pair.n_layers))


class BlockErrorRows:
    """Makes the row ``block_errors`` of a block from its forced fit after the block.

    The row has what `BlockErrors` has of one block. The probe's states are taken when the first
    block asks for them.
    """

    def __init__(self, pair: ModelPair, corpus: Corpus) -> None:
        self.pair, self.corpus = pair, corpus

    @cached_property
    def _probe(self) -> Propagation:
        return Propagation(self.pair.tuned_runner, probe_batch(self.corpus.batches))

    def __call__(self, found: ForcedFit) -> list[dict[str, Any]]:
        cost, step_gain = _cost(self.pair, self._probe, found)
        return [{"left": found.left, "gains": found.gains, "cost": cost, "step_gain": step_gain}]


def block_errors(
    pair: ModelPair,
    documents: Iterable[Any] | Corpus,
    show_progress: bool = False,
    **reading: Unpack[Reading],
) -> BlockErrors:
    """Measure what post-block maps of each rank leave in each block, and what an error costs."""
    require(pair, "post_block")
    corpus = pair.corpus(documents, **reading)
    rows = BlockErrorRows(pair, corpus)
    fits = forced_fits(pair, corpus.batches, "post_block", show_progress)
    return BlockErrors.of([row for found in fits for row in rows(found)])


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
    call = blocks.call(layer, probe.batch, own=True)
    state, _ = blocks.run(layer, call, probe.entering[layer], ())
    rank = min(PROBE_RANK, found.fit.directions.shape[1])
    adapter = adapter_from(found.fit, rank, state.dtype).to(state.device)
    error = adapter(state) - delta(probe.leaving[layer], state).to(state.dtype)
    growth = probe.inject(layer, "post_block", error)
    if growth.errors[0] == 0:
        return 0.0, 1.0
    return growth.kl / growth.errors[0] ** 2, growth.to_next
