"""The survey: what one march over the documents tells about every block.

For each block in turn, statistics are gathered from the march's steps, analysed, and dropped;
what stays are rows of tables and the adapters that were fitted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from toolkit.analysis.first_order import FirstOrderSums, first_order_terms
from toolkit.analysis.linear_fit import Rank, explained, fit_linear, ranks_below
from toolkit.analysis.norms import branch_norms
from toolkit.analysis.shared_steering import SHARED_RANKS
from toolkit.analysis.spectrum import spectrum
from toolkit.inside import Inside, Sample, inside_rows
from toolkit.lockstep import March, Mode, Step, target_of, wide
from toolkit.statistics import Moments, MomentSums, NormSums, Reservoir
from toolkit.steering import Adapter, adapter_from
from toolkit.steering.adapters import Fit

MODES: tuple[Mode, ...] = ("free", "forced")
MLP_INPUT, OUT = "mlp_in", "mlp_out"  # of the MLP module itself
TAIL_STATES = ("resid_mid", "heads")  # of the forced stream, where a block's tail can be read
EXPLAINED = ("explained_fit", "explained_heldout")
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


class Samples:
    """The tokens of one block that are looked at by themselves, and those that shared maps see."""

    def __init__(self, tokens: int, shared: int) -> None:
        self.tokens = Reservoir(tokens)
        self.fit, self.held_out = Reservoir(shared), Reservoir(shared // 2)

    def update(self, step: Step) -> None:
        """Add one batch."""
        counted = step.batch.counted
        values = {"h": wide(step.base[MLP_INPUT][counted])}
        if "resid_mid" in step.forced:
            values |= {
                "stream": wide(step.forced["resid_mid"][counted]),
                "attended": wide(step.forced["pre_mlp"][counted]),
                "heads": wide(step.forced["heads"][counted]),
                "missing": step.delta("forced", "post_block"),
            }
        values = {name: value.cpu() for name, value in values.items()}
        side = self.held_out if step.batch.held_out else self.fit
        for reservoir in (self.tokens, side):
            reservoir.update(values, step.batch.keys.cpu())

    def result(self) -> tuple[Sample, Sample, Sample]:
        """Single tokens; fit and held-out tokens for shared maps."""
        tokens, fit, held_out = (
            Sample(**r.result()) for r in (self.tokens, self.fit, self.held_out)
        )
        return tokens, fit, held_out


class MLPSums:
    """First-order shares of one block's MLP, and moments of its input and output by side."""

    def __init__(self, inside: Inside) -> None:
        # States of half precision are widened, and the weights that read them with them.
        weight = inside.mlp.down
        precision = (torch.promote_types(weight.dtype, torch.float32), weight.device)
        self.mlp, self.change = inside.mlp.to(*precision), inside.change.to(*precision)
        self.first_order = FirstOrderSums(self.mlp, self.change)
        pairs = [(OUT, OUT), ("down", OUT), (MLP_INPUT, MLP_INPUT), (OUT, MLP_INPUT)]
        self.moments = {held_out: MomentSums(pairs) for held_out in (False, True)}
        self.down_energy = {False: 0.0, True: 0.0}

    def update(self, step: Step) -> None:
        """Add one batch."""
        h = wide(step.base[MLP_INPUT][step.batch.counted])
        terms = first_order_terms(self.mlp, self.change, h)
        self.first_order.add(terms)
        values = {MLP_INPUT: h, OUT: terms.y, "down": terms.down}
        self.moments[step.batch.held_out].update(values)
        self.down_energy[step.batch.held_out] += float(terms.down.square().sum(dtype=torch.float64))

    def rows(self) -> dict[str, list[Row]]:
        """Of the tables ``first_order`` and ``mlp_fit``."""
        fit, held_out = (self.moments[side].result() for side in (False, True))
        energies = [self.down_energy[side] / m.n for side, m in ((False, fit), (True, held_out))]
        rows = [] if not any(energies) else mlp_fit_rows(OUT, "down", fit, held_out, energies)
        # The coefficient of determination is about the mean: what a constant gives is no credit.
        variances = [float(m.covariance[OUT, OUT].trace()) for m in (fit, held_out)]
        about_mean = [v + float(m.mean[OUT].square().sum()) for v, m in
                      zip(variances, (fit, held_out), strict=True)]  # fmt: skip
        for row in mlp_fit_rows(MLP_INPUT, OUT, fit, held_out, about_mean, ("full",)):
            for name, energy, variance in zip(EXPLAINED, about_mean, variances, strict=True):
                row[name] = 1 - (1 - row[name]) * energy / variance if variance else 0.0
            rows.append(row)
        return {"first_order": [asdict(self.first_order.result())], "mlp_fit": rows}


def mlp_fit_rows(
    x: str,
    t: str,
    fit: Moments,
    held_out: Moments,
    energies: Sequence[float],
    ranks: Sequence[Rank] = SHARED_RANKS,
) -> list[Row]:
    """The best affine maps of one vector from another, at every rank; `energies` are ``E‖t‖²``."""
    linear = fit_linear(fit, x, t)
    ranks = ranks_below(len(linear.t_mean), ranks)
    shares = [
        explained(linear, moments, x, t, energy, ranks)
        for moments, energy in zip((fit, held_out), energies, strict=True)
    ]
    return [
        {"source": x, "target": t, "rank": rank}
        | {name: share[rank] for name, share in zip(EXPLAINED, shares, strict=True)}
        for rank in ranks
    ]


class BlockSums:
    """All sums of one block: the listener of the march."""

    def __init__(
        self,
        branches: tuple[str, ...],
        steered: Mapping[str, str],
        samples: "Samples | None" = None,
    ) -> None:
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
        self.samples = samples

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
        if self.samples:
            self.samples.update(step)

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

        sums = cls(branches, {})
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
    insides: Sequence[Inside] | None,
    samples: tuple[int, int],
    dtype: torch.dtype,
    advance: Callable[[], None] = lambda: None,
    keep: Callable[[int, BlockSums], None] | None = None,
) -> Iterator[BlockSurvey]:
    """March on, and yield what each block gave as soon as it is passed.

    `recipes` are the adapters to fit; the sequential ones must be the march's steered streams, by
    name. `insides` are the blocks' MLPs and their changes (None: the family has none to be read).
    `samples` says how many tokens a block are looked at by themselves, and how many fit shared
    maps (half as many judge them). `keep` is handed each block's sums.
    """
    for layer in march.layers():
        sums = BlockSums(branches, march.steered, Samples(*samples) if insides else None)
        mlp_sums = MLPSums(insides[layer]) if insides else None
        for step in march.steps(layer):
            sums.update(step)
            if mlp_sums:
                mlp_sums.update(step)
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
        if insides and mlp_sums and sums.samples:
            for name, rows in mlp_sums.rows().items():
                found.rows[name] = [{"layer": layer, **row} for row in rows]
            found.rows |= inside_rows(layer, insides[layer], *sums.samples.result())
            found.rows.setdefault("shared_reach", []).extend(after_mlp_rows(found.rows))
        march.advance(layer, {recipe.name: found.adapters[recipe] for recipe in _steered(recipes)})
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
