"""The survey: what one march over the documents tells about every block.

For each block in turn, statistics are gathered from the march's steps, analysed, and dropped;
what stays are rows of tables and the adapters that were fitted. With several processes each
gathers from its own documents, the sums are added up, and the analyses are spread.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from toolkit.adapters.adapter import Adapter
from toolkit.adapters.collection import Fit
from toolkit.analysis.linear_fit import Rank, explained, fit_linear, ranks_below
from toolkit.analysis.norms import branch_norms
from toolkit.analysis.shared_map import SHARED_RANKS
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
from toolkit.diagnosis.mlp_statistics import EXPLAINED, MLPStatistics
from toolkit.diagnosis.reach_rows import parts_tasks
from toolkit.fitting.from_moments import adapter_from
from toolkit.lockstep.march import March, Mode
from toolkit.models.edits import target_of
from toolkit.runtime.processes import ALONE, Processes
from toolkit.statistics import SketchedSums

Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How one adapter of a block is fitted."""

    location: str
    rank: Rank
    fit: Fit

    @property
    def name(self) -> str:
        return f"{self.fit}-{self.location}-{self.rank}"


@dataclass
class BlockResult:
    """What is kept of one block: rows by table, adapters by recipe."""

    layer: int
    rows: dict[str, list[Row]] = field(default_factory=dict)
    adapters: dict[Recipe, Adapter] = field(default_factory=dict)

    def add(self, found: "Found") -> None:
        for name, rows in found.rows.items():
            self.rows.setdefault(name, []).extend({"layer": self.layer, **row} for row in rows)
        self.adapters |= found.adapters


@dataclass(frozen=True)
class Found:
    """What one task of a block gave."""

    rows: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    adapters: Mapping[Recipe, Adapter] = field(default_factory=dict)


Task = Callable[[], Found]


def survey(
    march: March,
    branches: tuple[str, ...],
    recipes: Sequence[Recipe],
    parts_reader: Sequence[BlockParts] | None,
    samples: tuple[int, int],
    dtype: torch.dtype,
    advance: Callable[[], None] = lambda: None,
    keep: Callable[[int, BlockStatistics], None] | None = None,
    processes: Processes = ALONE,
    sketch: int | None = None,
) -> Iterator[BlockResult]:
    """March on, and yield what each block gave as soon as it is passed.

    `recipes` are the adapters to fit; the sequential ones must be the march's steered streams, by
    name. `insides` are the blocks' MLPs and their changes (None: the family has none to be read).
    `samples` says how many tokens a block are looked at by themselves, and how many fit shared
    maps (half as many judge them). `keep` is handed each block's sums. In a `processes` of several
    processes each marches its own batches, and all yield the same. `sketch` is the width of a
    random projection through which moments are seen (None: they are exact).
    """
    sequential = [recipe for recipe in recipes if recipe.fit == "sequential"]
    for layer in march.layers():
        sample = Samples(*samples) if parts_reader else None
        sums = BlockStatistics(branches, march.steered, sample, processes, sketch)
        with march.resident(layer):
            parts = parts_reader[layer] if parts_reader else None
            mlp_sums = MLPStatistics(parts, processes) if parts else None
            for step in march.steps(layer):
                sums.update(step)
                if mlp_sums:
                    mlp_sums.update(step)
                advance()
            sums.reduce()
            if keep:
                keep(layer, sums)
            tasks = block_tasks(sums, recipes, dtype)
            tasks += [partial(_sequential_fit, sums, recipe, dtype) for recipe in sequential]
            if parts and mlp_sums and sample:
                mlp_sums.reduce()
                tasks += _parts_tasks(parts, mlp_sums, sample)
            found = BlockResult(layer)
            for part in processes.spread(tasks):
                found.add(part)
            march.advance(layer, {recipe.name: found.adapters[recipe] for recipe in sequential})
        if parts:
            found.rows.setdefault("shared_reach", []).extend(after_mlp_rows(found.rows))
        yield found


def after_mlp_rows(rows: Mapping[str, Sequence[Row]]) -> Iterator[Row]:
    """What one map after the MLP brings about: what it adds arrives, so its linear fit says it."""
    for row in rows["linear_fit"]:
        after = row["source"] in ("post_mlp", "post_block")
        asked = row["mode"] == "forced" and row["target"] == "block"
        if after and asked and row["rank"] in SHARED_RANKS:
            kept = {name: row[name] for name in ("layer", "target", "rank", *EXPLAINED)}
            # What is added is what is asked for: the real block is as linear as the map.
            yield {**kept, "location": row["source"], "nonlinear_heldout": row[EXPLAINED[1]]}


def analyse(layer: int, sums: BlockStatistics) -> BlockResult:
    """Norms, spectra and linear fits of one block."""
    found = BlockResult(layer)
    for task in block_tasks(sums):
        found.add(task())
    return found


def block_tasks(
    sums: BlockStatistics, recipes: Sequence[Recipe] = (), dtype: torch.dtype = torch.float32
) -> list[Task]:
    """What gives one block's norms, spectra, linear fits, and free and forced adapters."""
    tasks: list[Task] = [partial(_norms, sums)]
    tasks += [partial(_spectrum, sums, place, mode) for place in sums.branches for mode in MODES]
    tasks += [partial(_linear_fit, sums, recipes, dtype, *fit) for fit in _fits(sums.branches)]
    return tasks


def _norms(sums: BlockStatistics) -> Found:
    return Found({"norms": [asdict(row) for row in branch_norms(sums.norms.result())]})


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
    return Found(rows)


def _linear_fit(
    sums: BlockStatistics,
    recipes: Sequence[Recipe],
    dtype: torch.dtype,
    mode: Mode,
    location: str,
    aims: Sequence[str],
) -> Found:
    x, t = source(location), target("post_block" if "block" in aims else location)
    sides = [sums.moments[mode, side].result([(x, x), (t, x), (t, t)]) for side in SIDES]
    fit = fit_linear(sides[0], x, t)
    ranks = ranks_below(len(fit.t_mean))
    on_fit, on_held_out = (explained(fit, m, x, t, m.energy(t), ranks) for m in sides)
    rows = [
        {
            "source": location,
            "target": aim,
            "mode": mode,
            "rank": rank,
            "explained_fit": on_fit[rank],
            "explained_heldout": on_held_out[rank],
        }
        for aim in aims
        for rank in ranks
    ]
    wanted = "own" if mode == "free" or target_of(location) == location else "block"
    adapters = {
        recipe: adapter_from(fit, recipe.rank, dtype)
        for recipe in recipes
        if (recipe.fit, recipe.location) == (mode, location) and wanted in aims
    }
    return Found({"linear_fit": rows}, adapters)


def _fits(branches: tuple[str, ...]) -> Iterator[tuple[Mode, str, tuple[str, ...]]]:
    """(mode, source, names of the target) of every fit in the table."""
    for location in branches:
        yield "free", location, ("own",)
        if location == "post_block":  # its own delta is the block's
            yield "forced", location, ("own", "block")
        else:
            yield "forced", location, ("own",)
            yield "forced", location, ("block",)


def _sequential_fit(sums: BlockStatistics, recipe: Recipe, dtype: torch.dtype) -> Found:
    moments = sums.sequential[recipe.name].result()
    rank = recipe.rank if recipe.rank != "full" else 0
    fit = fit_linear(moments, "state", "delta", max_rank=rank)
    return Found(adapters={recipe: adapter_from(fit, recipe.rank, dtype)})


def _parts_tasks(parts: BlockParts, mlp_sums: MLPStatistics, sample: Samples) -> list[Task]:
    tasks: list[Task] = [lambda: Found(mlp_sums.rows())]
    for name, rows in parts_tasks(parts, *sample.result()).items():
        tasks.append(partial(_parts_rows, name, rows))
    return tasks


def _parts_rows(name: str, rows: Callable[[], list[Row]]) -> Found:
    return Found({name: rows()})
