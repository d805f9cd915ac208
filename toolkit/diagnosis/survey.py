"""The survey: what one march over the documents tells about every block.

For each block in turn, statistics are gathered from the march's steps, analysed, and dropped;
what stays are rows of tables and the adapters that were fitted. With several processes each
gathers from its own documents, the sums are added up, and the analyses are spread.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from toolkit.adapters.adapter import Adapter
from toolkit.analysis.linear_fit import MAX_RANK, LinearFit, explained, fit_linear, ranks_below
from toolkit.analysis.norms import branch_norms
from toolkit.analysis.spectrum import spectrum
from toolkit.blocks.parts import BlockParts
from toolkit.diagnosis.block_statistics import (
    MODES,
    SIDES,
    BlockStatistics,
    Samples,
    source,
    target,
)
from toolkit.diagnosis.cross_fit import FoldStatistics
from toolkit.diagnosis.mlp_statistics import MLPStatistics
from toolkit.diagnosis.place_rows import places_tasks
from toolkit.diagnosis.reach_rows import parts_tasks
from toolkit.evaluation.allocation import ForcedFit
from toolkit.fitting.block_result import BlockResult
from toolkit.fitting.closed_form import steering
from toolkit.fitting.from_moments import adapter_from
from toolkit.fitting.spec import FitSpec
from toolkit.fitting.weight_change import InputSums, pieces_tasks
from toolkit.lockstep.driver import march_through
from toolkit.lockstep.march import March, Mode
from toolkit.models.edits import target_of
from toolkit.models.pair import ModelPair
from toolkit.runtime.processes import ALONE, Processes, Rota
from toolkit.statistics import Moments, SketchedSums

Row = dict[str, Any]


# What one task of a block gives: rows by table, adapters by spec.
Found = tuple[Mapping[str, Sequence[Row]], Mapping[FitSpec, Adapter]]
Task = Callable[[], Found]
# Gives the rows ``block_errors`` from a fit: source, target, the fit, and moments of both sides.
ErrorRows = Callable[[str, str, LinearFit, Moments, Moments], list[Row]]


@dataclass(frozen=True)
class SurveyPlan:
    """Hold what a survey gathers and fits in every block.

    specs: the adapters to fit; the sequential ones must be the march's steered streams, by name.
    samples: how many tokens a block are looked at by themselves, and how many fit shared maps (half
    as many judge them). sketch: width of a random projection through which moments are seen (None:
    they are exact). errors: gives the rows ``block_errors`` of a block from its forced fit (None:
    they are not asked for). weights: take what low-rank changes of the weights are made of. folds:
    of the documents, each of which forced maps are fitted without (0: none).
    """

    branches: tuple[str, ...]
    specs: Sequence[FitSpec]
    samples: tuple[int, int] = (0, 0)
    sketch: int | None = None
    errors: Callable[[ForcedFit], list[Row]] | None = None
    weights: bool = False
    folds: int = 0

    @property
    def sequential(self) -> list[FitSpec]:
        """The specs that read a stream of their own."""
        return [spec for spec in self.specs if spec.is_steered]


def survey(
    march: March,
    plan: SurveyPlan,
    parts_reader: Sequence[BlockParts] | None,
    pair: ModelPair,
    advance: Callable[[], None] = lambda: None,
    keep: Callable[[int, BlockStatistics], None] | None = None,
    processes: Processes = ALONE,
) -> Iterator[BlockResult]:
    """March on, and yield what each block gave as soon as it is passed.

    `parts_reader` has the blocks' MLPs and their changes (None: the family has none to be read).
    `keep` is handed each block's sums. Each of `processes` marches its own batches, and all yield
    the same.
    """

    looking, rota = ExitStack(), Rota(processes)

    def listen(layer: int) -> dict[str, Any]:
        samples = Samples(*plan.samples) if parts_reader else None
        listeners: dict[str, Any] = {
            "block": BlockStatistics(
                plan.branches, plan.sequential, samples, processes, plan.sketch
            )
        }
        if parts_reader:
            listeners["mlp"] = MLPStatistics(parts_reader[layer], processes)
        if plan.folds:
            listeners["folds"] = FoldStatistics(plan.specs, plan.folds, processes, plan.sketch)
        if plan.weights:
            inputs = InputSums.of(pair, layer, processes)
            listeners["inputs"] = looking.enter_context(inputs)
        return listeners

    def conclude(layer: int, found: dict[str, Any]) -> tuple[BlockResult, Any]:
        sums = found["block"]
        if keep:
            keep(layer, sums)
        parallel = pair.base_runner.parallel
        errors = partial(_errors, plan.errors, layer) if plan.errors else None
        tasks = block_tasks(sums, plan.specs, pair.dtype, parallel, errors)
        tasks += [partial(_sequential_fit, sums, spec, layer, pair.dtype) for spec in sums.fits]
        if plan.folds:
            tasks += found["folds"].tasks(pair.dtype)
        if parts_reader:
            tasks += _parts_tasks(found["mlp"], sums.samples)
            if places := sums.samples.places():
                through = [spec for spec in plan.specs if spec.target == "block"]
                parts = found["mlp"].parts
                tasks += places_tasks(parts, places, through, parallel, pair.dtype)
        weights: list[Callable[[], Any]] = []
        if plan.weights:
            weights += pieces_tasks(pair, layer, found["inputs"])
        looking.close()  # what listens to the weights' inputs
        result, everything = BlockResult(layer), rota.spread([*tasks, *weights])
        for rows, adapters in everything[: len(tasks)]:
            result.add(rows, adapters)
        for place, pieces in everything[len(tasks) :]:
            for fit, piece in pieces.items():
                result.pieces.setdefault(fit, {})[place] = piece
        return result, steering(result.adapters, pair)

    with looking:
        yield from march_through(march, listen, conclude, processes, advance)


def analyse(layer: int, sums: BlockStatistics) -> BlockResult:
    """Norms, spectra and linear fits of one block."""
    result = BlockResult(layer)
    for task in block_tasks(sums):
        result.add(*task())
    return result


def block_tasks(
    sums: BlockStatistics,
    specs: Sequence[FitSpec] = (),
    dtype: torch.dtype = torch.float32,
    parallel: bool = False,
    errors: ErrorRows | None = None,
) -> list[Task]:
    """Return what gives one block's norms, spectra, linear fits, and free and forced adapters.

    `parallel`: the family's MLP reads nothing of what attention adds. `errors` reads the forced fit
    after the block, which then has every rank.
    """
    tasks: list[Task] = [partial(_norms, sums)]
    tasks += [partial(_spectrum, sums, place, mode) for place in sums.branches for mode in MODES]
    for mode, location, aims in _fits(sums.branches):
        wanted = [
            spec
            for spec in specs
            if (spec.fit, spec.location, spec.target) == (mode, location, "own")
            and _aim(spec, parallel) in aims
        ]
        reads = errors if (mode, location) == ("forced", "post_block") else None
        tasks.append(partial(_linear_fit, sums, wanted, dtype, mode, location, aims, reads))
    return tasks


def _norms(sums: BlockStatistics) -> Found:
    return {"norms": [asdict(row) for row in branch_norms(sums.norms.result())]}, {}


def _spectrum(sums: BlockStatistics, location: str, mode: Mode) -> Found:
    x, t = source(location), target(location)
    pairs = [(x, x), (t, t)]
    on_fit, on_held_out = (sums.moments[mode, side] for side in SIDES)
    moments = on_fit.result(pairs).pooled(on_held_out.result(pairs), pairs)
    result = spectrum(moments.second_moment(t), moments.mean[t], moments.energy(x), moments.n)
    labels = {"location": location, "mode": mode}
    rows = {"spectrum": [{**labels, **asdict(result)}]}
    if isinstance(on_fit, SketchedSums):
        rows["sketch"] = [{**labels, "state": on_fit.share(x), "delta": on_fit.share(t)}]
    return rows, {}


def _linear_fit(
    sums: BlockStatistics,
    specs: Sequence[FitSpec],
    dtype: torch.dtype,
    mode: Mode,
    location: str,
    aims: Sequence[str],
    errors: ErrorRows | None = None,
) -> Found:
    x, t = source(location), target("post_block" if "block" in aims else location)
    on_fit, on_held_out = sides = [
        sums.moments[mode, side].result([(x, x), (t, x), (t, t)]) for side in SIDES
    ]
    fit = fit_linear(on_fit, x, t, max_rank=len(on_fit.mean[t]) if errors else MAX_RANK)
    ranks = ranks_below(len(fit.t_mean))
    shares = [explained(fit, m, x, t, m.energy(t), ranks) for m in sides]
    rows = [
        {
            "source": location,
            "target": aim,
            "mode": mode,
            "rank": rank,
            "explained_fit": shares[0][rank],
            "explained_heldout": shares[1][rank],
        }
        for aim in aims
        for rank in ranks
    ]
    adapters = {spec: adapter_from(fit, spec.rank_at(0), dtype) for spec in specs}
    found = {"linear_fit": rows}
    if errors:
        found["block_errors"] = errors(x, t, fit, on_fit, on_held_out)
    return found, adapters


def _errors(rows: Callable[[ForcedFit], list[Row]], layer: int, *fitted: Any) -> list[Row]:
    return rows(ForcedFit.of(layer, *fitted))


def _aim(spec: FitSpec, parallel: bool) -> str:
    """Return the table's name of the delta that an adapter is to supply."""
    before = target_of(spec.location, parallel) == "resid_mid"
    return "own" if spec.fit == "free" or before else "block"


def _fits(branches: tuple[str, ...]) -> Iterator[tuple[Mode, str, tuple[str, ...]]]:
    """(mode, source, names of the target) of every fit in the table."""
    for location in branches:
        yield "free", location, ("own",)
        if location == "post_block":  # its own delta is the block's
            yield "forced", location, ("own", "block")
        else:
            yield "forced", location, ("own",)
            yield "forced", location, ("block",)


def _sequential_fit(sums: BlockStatistics, spec: FitSpec, layer: int, dtype: torch.dtype) -> Found:
    return {}, {spec: sums.fits[spec].adapter(layer, dtype)}


def _parts_tasks(mlp: MLPStatistics, sample: Samples) -> list[Task]:
    tasks: list[Task] = [lambda: (mlp.rows(), {})]
    for name, rows in parts_tasks(mlp.parts, *sample.result()).items():
        tasks.append(partial(_parts_rows, name, rows))
    return tasks


def _parts_rows(name: str, rows: Callable[[], list[Row]]) -> Found:
    return {name: rows()}, {}
