"""The survey: what one march over the documents tells about every block.

For each block in turn, statistics are gathered from the march's steps, analysed, and dropped;
what stays are rows of tables and the adapters that were fitted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from toolkit.analysis.first_order import FirstOrderSums
from toolkit.analysis.linear_fit import Rank, explained, fit_linear, ranks_below
from toolkit.analysis.norms import branch_norms
from toolkit.analysis.spectrum import spectrum
from toolkit.inside import reachability_rows
from toolkit.lockstep import March, Mode, Step, target_of, wide
from toolkit.mlp import MLP, MLPChange
from toolkit.statistics import Moments, MomentSums, NormSums, Reservoir
from toolkit.steering import adapter_from
from toolkit.steering.adapters import Adapter, Fit

MODES: tuple[Mode, ...] = ("free", "forced")
MLP_INPUT = "mlp_in"
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
class BlockSurvey:
    """What is kept of one block: rows by table, adapters by recipe."""

    layer: int
    rows: dict[str, list[Row]] = field(default_factory=dict)
    adapters: dict[Recipe, Adapter] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockStatistics:
    """One block's moments by mode: on fit and on held-out documents, and (of each state and each
    delta with itself) on both.
    """

    fit: dict[Mode, Moments]
    held_out: dict[Mode, Moments]
    everything: dict[Mode, Moments]


def source(location: str) -> str:
    """The moments' name of the base state at `location`."""
    return f"{location}.state"


def target(location: str) -> str:
    """The moments' name of the delta at `location`."""
    return f"{location}.delta"


def moment_pairs(mode: Mode, branches: tuple[str, ...]) -> list[tuple[str, str]]:
    """The products that the tables of one mode need."""
    pairs = []
    for location in branches:
        pairs += [
            (source(location), source(location)),
            (target(location), source(location)),
            (target(location), target(location)),
        ]
        if mode == "forced" and location != "post_block":
            pairs.append((target("post_block"), source(location)))
    return pairs


class BlockSums:
    """All sums of one block: the listener of the march."""

    def __init__(self, branches: tuple[str, ...], steered: Mapping[str, str], sample: int) -> None:
        self.branches = branches
        self.moments = {
            (mode, held_out): MomentSums(moment_pairs(mode, branches))
            for mode in MODES
            for held_out in (False, True)
        }
        self.sequential = {
            name: MomentSums([("state", "state"), ("delta", "state")]) for name in steered
        }
        self.steered = steered
        self.norms = NormSums()
        self.sample = Reservoir(sample)

    def update(self, step: Step) -> None:
        """Add one batch."""
        norms: dict[tuple[str, str], Tensor] = {}
        for mode in MODES:
            values = {}
            for location in self.branches:
                values[source(location)] = step.source(mode, location)
                values[target(location)] = step.delta(mode, location)
                norms[f"delta_{mode}", location] = values[target(location)]
                if mode == "free":
                    norms["base", location] = values[source(location)]
                    tuned = step.tuned[location][step.batch.counted]
                    norms["tuned", location] = wide(tuned)
            self.moments[mode, step.batch.held_out].update(values)
        self.norms.update(norms)
        for name, location in self.steered.items():
            if name in step.steered:
                self.sequential[name].update(
                    {
                        "state": step.steered_source(name, location),
                        "delta": step.missing(name, target_of(location)),
                    }
                )
        if MLP_INPUT in step.base:
            self.sample.update(wide(step.base[MLP_INPUT][step.batch.counted]), step.batch.keys)

    def state(self) -> dict[str, Tensor]:
        """The sums that the tables need, as tensors by name, for `from_state`."""
        tensors = {f"norms/{name}": value for name, value in self.norms.state().items()}
        for (mode, held_out), sums in self.moments.items():
            side = "heldout" if held_out else "fit"
            tensors |= {f"{mode}/{side}/{name}": value for name, value in sums.state().items()}
        return tensors

    @classmethod
    def from_state(cls, branches: tuple[str, ...], state: Mapping[str, Tensor]) -> Self:
        """The sums that gave `state`, without sequential ones and sample."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        sums = cls(branches, {}, 0)
        sums.norms = NormSums.from_state(part("norms/"))
        for mode, held_out in sums.moments:
            side = "heldout" if held_out else "fit"
            sums.moments[mode, held_out] = MomentSums.from_state(part(f"{mode}/{side}/"))
        return sums

    def statistics(self) -> BlockStatistics:
        fit = {mode: self.moments[mode, False].result() for mode in MODES}
        held_out = {mode: self.moments[mode, True].result() for mode in MODES}
        described = [(name(x), name(x)) for x in self.branches for name in (source, target)]
        everything = {mode: fit[mode].pooled(held_out[mode], described) for mode in MODES}
        return BlockStatistics(fit, held_out, everything)


def survey(
    march: March,
    branches: tuple[str, ...],
    recipes: Sequence[Recipe],
    mlps: Sequence[tuple[MLP, MLPChange]] | None,
    sample: int,
    dtype: torch.dtype,
    advance: Callable[[], None] = lambda: None,
    keep: Callable[[int, BlockSums], None] | None = None,
) -> Iterator[BlockSurvey]:
    """March on, and yield what each block gave as soon as it is passed.

    `recipes` are the adapters to fit; the sequential ones must be the march's steered streams, by
    name. `mlps` are the base model's MLPs and their changes (None: the family has none to be read).
    `sample` tokens a block serve reachability. `keep` is handed each block's sums.
    """
    for layer in march.layers():
        sums = BlockSums(branches, march.steered, sample)
        first_order = FirstOrderSums(*mlps[layer]) if mlps else None
        for step in march.steps(layer):
            sums.update(step)
            if first_order:
                first_order.update(wide(step.base[MLP_INPUT][step.batch.counted]))
            advance()
        if keep:
            keep(layer, sums)
        found = analyse(layer, sums, recipes, dtype)
        for recipe in recipes:
            if recipe.fit == "sequential":
                moments = sums.sequential[recipe.name].result()
                rank = recipe.rank if recipe.rank != "full" else 0
                fit = fit_linear(moments, "state", "delta", max_rank=rank)
                found.adapters[recipe] = adapter_from(fit, recipe.rank, dtype)
        if mlps and first_order:
            found.rows["first_order"] = [{"layer": layer, **asdict(first_order.result())}]
            found.rows["reachability"] = reachability_rows(
                layer, *mlps[layer], sums.sample.result()
            )
        march.advance(layer, {recipe.name: found.adapters[recipe] for recipe in _steered(recipes)})
        yield found


def _steered(recipes: Sequence[Recipe]) -> list[Recipe]:
    return [recipe for recipe in recipes if recipe.fit == "sequential"]


def analyse(
    layer: int,
    sums: BlockSums,
    recipes: Sequence[Recipe] = (),
    dtype: torch.dtype = torch.float32,
) -> BlockSurvey:
    """Norms, spectra, linear fits and the free and forced adapters of `recipes`, of one block."""
    statistics, branches = sums.statistics(), sums.branches
    found = BlockSurvey(layer)
    norms = branch_norms(sums.norms.result())
    found.rows["norms"] = [{"layer": layer, **asdict(row)} for row in norms]
    found.rows["spectrum"] = spectrum_rows(layer, statistics, branches)
    found.rows["linear_fit"] = []
    for mode, location, aims in _fits(branches):
        x, t = source(location), target("post_block" if "block" in aims else location)
        fit = fit_linear(statistics.fit[mode], x, t)
        ranks = ranks_below(len(fit.t_mean))
        on_fit, on_held_out = (
            explained(fit, moments[mode], x, t, moments[mode].energy(t), ranks)
            for moments in (statistics.fit, statistics.held_out)
        )
        found.rows["linear_fit"] += [
            {
                "layer": layer,
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
        for recipe in recipes:
            wanted = "own" if mode == "free" or target_of(location) == location else "block"
            if (recipe.fit, recipe.location) == (mode, location) and wanted in aims:
                found.adapters[recipe] = adapter_from(fit, recipe.rank, dtype)
    return found


def _fits(branches: tuple[str, ...]) -> Iterator[tuple[Mode, str, tuple[str, ...]]]:
    """(mode, source, names of the target) of every fit in the table."""
    for location in branches:
        yield "free", location, ("own",)
        if location == "post_block":  # its own delta is the block's
            yield "forced", location, ("own", "block")
        else:
            yield "forced", location, ("own",)
            yield "forced", location, ("block",)


def spectrum_rows(layer: int, statistics: BlockStatistics, branches: tuple[str, ...]) -> list[Row]:
    rows = []
    for location in branches:
        for mode, moments in statistics.everything.items():
            t = target(location)
            result = spectrum(
                moments.second_moment(t),
                moments.mean[t],
                moments.energy(source(location)),
                moments.n,
            )
            rows.append({"layer": layer, "location": location, "mode": mode, **asdict(result)})
    return rows
