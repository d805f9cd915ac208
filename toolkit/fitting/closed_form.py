"""Adapters without a gradient: fitted block by block as the march passes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from toolkit.adapters.adapter import Adapter
from toolkit.adapters.collection import Adapters
from toolkit.blocks.read import heads_at
from toolkit.documents.corpus import Corpus, Reading
from toolkit.errors import InputError
from toolkit.fitting.block_result import BlockResult, KeptMarch
from toolkit.fitting.fit_statistics import FitStatistics
from toolkit.fitting.spec import FitSpec
from toolkit.fitting.through_heads import HeadProjection
from toolkit.lockstep.driver import march_through, shared_out
from toolkit.lockstep.march import March
from toolkit.models.pair import ModelPair
from toolkit.runtime.processes import ALONE, Processes
from toolkit.runtime.progress import progress


@torch.no_grad()
def fit_adapters(
    pair: ModelPair,
    documents: Iterable[Any] | Corpus,
    specs: Sequence[FitSpec],
    *,
    show_progress: bool = False,
    kept: KeptMarch | None = None,
    processes: Processes = ALONE,
    **reading: Unpack[Reading],
) -> dict[FitSpec, Adapters]:
    """Fit every spec on the fit documents, in one march; no gradient is taken through a model.

    `reading` says how documents become tokens, unless they are a `Corpus` already. An open `kept`
    holds what is finished and gives what an interrupted march finished; all `processes` share the
    work. Raises InputError where a location does not apply to the family or the documents do not
    suffice.
    """
    for spec in specs:
        require(pair, spec.location)
        if spec.target != "own":
            raise InputError(f"target {spec.target!r} is fitted by a diagnosis alone")
        if spec.fold is not None:
            raise InputError("maps by folds are fitted by a diagnosis alone")
        if isinstance(spec.rank, tuple) and len(spec.rank) != pair.n_layers:
            raise InputError(
                f"{len(spec.rank)} ranks for {pair.n_layers} blocks: give one, or one for each"
            )
    corpus = pair.corpus(documents, **reading)
    results = kept.to_go_on_from(pair.base_runner) if kept else []
    if len(results) == pair.n_layers:
        return adapters_of(results, specs)
    march = march_for(pair, corpus, specs, processes, kept, len(results))

    def listen(layer: int) -> dict[FitSpec, FitStatistics]:
        at_heads = any(spec.location == "heads" for spec in specs)
        heads = HeadProjection(heads_at(pair.base_runner, layer)) if at_heads else None
        return {spec: FitStatistics(spec, processes, heads=heads) for spec in specs}

    def conclude(layer: int, found: dict[FitSpec, FitStatistics]) -> tuple[BlockResult, Any]:
        tasks = [
            lambda statistics=statistics: statistics.adapter(layer, pair.dtype, corpus.seed)
            for statistics in found.values()
        ]
        result = BlockResult(layer)
        result.add(adapters=dict(zip(found, processes.spread(tasks), strict=True)))
        return result, steering(result.adapters, pair)

    n_steps = (pair.n_layers - len(results)) * len(march.own or ())
    with progress("fitting block by block", n_steps, show_progress) as advance:
        for result in march_through(march, listen, conclude, processes, advance):
            results.append(result)
            if kept:
                kept.finished(result)
    if kept:
        kept.drop_streams()
    return adapters_of(results, specs)


def march_for(
    pair: ModelPair,
    corpus: Corpus,
    specs: Sequence[FitSpec],
    processes: Processes = ALONE,
    kept: KeptMarch | None = None,
    start: int = 0,
) -> March:
    """Make the march over the fit documents that gives `specs` what they read."""
    locations = {spec.location for spec in specs} | {"post_block"}
    if "heads" in locations:  # what they are to supply is taken at the branch that they enter
        locations.add("pre_mlp")
    return March(
        pair.base_runner,
        pair.tuned_runner,
        corpus.fit_batches,
        tuple(sorted(locations)),
        steered={spec.name: spec.location for spec in specs if spec.is_steered},
        free=any(spec.fit == "free" for spec in specs),
        forced=any(spec.fit in ("forced", "blended") for spec in specs),
        own=shared_out(corpus.fit_batches, processes),
        folder=kept.folder if kept else None,
        start=start,
    )


def adapters_of(
    results: Sequence[BlockResult], specs: Sequence[FitSpec]
) -> dict[FitSpec, Adapters]:
    """Collect the adapters of all blocks, by spec."""
    return {
        spec: Adapters(
            spec.location,
            {result.layer: result.adapters[spec] for result in results},
            spec.fit,
            {"blend": spec.blend},
        )
        for spec in specs
    }


def require(pair: ModelPair, location: str) -> None:
    """Raise InputError, with the reason, where the family has no such location."""
    if reason := pair.unavailable.get(location):
        raise InputError(f"this family has no {location!r}: {reason}")


def steering(
    adapters: dict[FitSpec, Adapter], pair: ModelPair
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return what the steered streams of a march take on, by stream."""
    return {spec.name: _on_states(a, pair) for spec, a in adapters.items() if spec.is_steered}


def _on_states(adapter: Adapter, pair: ModelPair) -> Callable[[Tensor], Tensor]:
    """`adapter` where the models are, on states in its own precision, as `steer` attaches it."""
    adapter.to(pair.device)
    dtype = next(adapter.parameters()).dtype
    return lambda states: adapter(states.to(dtype))
