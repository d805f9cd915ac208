"""All sums of one block: what listens to the march."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Self

from torch import Tensor

from toolkit.blocks.parts import PlaceSample, Sample
from toolkit.fitting.fit_statistics import FitStatistics
from toolkit.fitting.spec import FitSpec
from toolkit.lockstep.march import Mode, Step
from toolkit.runtime.processes import ALONE, Processes
from toolkit.statistics import Frame, MomentSums, NormSums, Reservoir, SketchedSums
from toolkit.statistics.frame import shared_frames

SIDES = (False, True)  # fit and held-out
MODES: tuple[Mode, ...] = ("free", "forced")
MLP_INPUT = "mlp_in"
SUBLAYER_STATES = ("resid_mid", "heads")  # of the forced stream, where a block's tail can be read
Sums = MomentSums | SketchedSums


def source(location: str) -> str:
    """Return the moments' name of the base state at `location`."""
    return f"{location}.state"


def target(location: str) -> str:
    """Return the moments' name of the delta at `location`."""
    return f"{location}.delta"


def moment_pairs(mode: Mode, branches: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return the products that the tables of one mode need."""
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


PLACE_TOKENS = 5120  # on which places are compared; as many, or all, of the fit tokens


class Samples:
    """The tokens of one block that are looked at by themselves, and those that shared maps see.

    `tokens` are looked at one by one; `shared` are those on which maps at the MLP's input are
    fitted. Where there are any, places are compared on the same `PLACE_TOKENS` tokens. Half as many
    judge.
    """

    def __init__(self, tokens: int, shared: int, places: int = PLACE_TOKENS) -> None:
        self.tokens = Reservoir(tokens)
        self.fit, self.held_out = Reservoir(shared), Reservoir(shared // 2)
        places = places if shared else 0
        self.fit_places, self.held_out_places = Reservoir(places), Reservoir(places // 2)

    def update(self, step: Step) -> None:
        """Add one batch."""
        values = {"h": step.base[MLP_INPUT]}
        if "resid_mid" in step.forced:
            values |= {
                "stream": step.forced["resid_mid"],
                "attended": step.forced["pre_mlp"],
                "heads": step.forced["heads"],
                "forced_delta": step.delta("forced", "post_block"),
            }
        held_out = step.batch.held_out
        for reservoir in (self.tokens, self.held_out if held_out else self.fit):
            reservoir.update(values, step.batch.keys)
        places = self.held_out_places if held_out else self.fit_places
        if places.size and step.forced.keys() >= _PLACES:
            forced = {name: step.forced[name] for name in _PLACES}
            forced["forced_delta"] = step.delta("forced", "post_block")
            places.update(forced, step.batch.keys)

    def reduce(self, processes: Processes) -> None:
        """Sample from the tokens of all processes."""
        for reservoir in (self.tokens, self.fit, self.held_out):
            reservoir.reduce(processes)
        for reservoir in (self.fit_places, self.held_out_places):
            reservoir.reduce(processes)

    def result(self) -> tuple[Sample, Sample, Sample]:
        """Single tokens; fit and held-out tokens for shared maps."""
        tokens, fit, held_out = (
            Sample(**r.result()) for r in (self.tokens, self.fit, self.held_out)
        )
        return tokens, fit, held_out

    def places(self) -> tuple[PlaceSample, PlaceSample] | None:
        """Fit and held-out tokens on which places are compared; None where a family lacks one."""
        sides = (self.fit_places, self.held_out_places)
        if not all(side.seen for side in sides):
            return None
        fit, held_out = (PlaceSample(**side.result()) for side in sides)
        return fit, held_out


_PLACES = {"pre_mlp", "post_mlp", "post_block"}


class BlockStatistics:
    """Accumulates all sums of one block over the documents of all `processes`.

    Their frames are those of the first batch of the first process. `fits` are the sequential fits,
    each with statistics of its own; `sketch` is the width of the projections through which moments
    are seen (None: they are exact).
    """

    def __init__(
        self,
        branches: tuple[str, ...],
        fits: Sequence[FitSpec] = (),
        samples: Samples | None = None,
        processes: Processes = ALONE,
        sketch: int | None = None,
    ) -> None:
        self.branches, self.samples, self.processes = branches, samples, processes
        self.sketch = sketch
        self.moments: dict[tuple[Mode, bool], Sums] = {}
        self.fits = {spec: FitStatistics(spec, processes, sketch) for spec in fits}
        self.norms = NormSums()

    def update(self, step: Step) -> None:
        """Add one batch."""
        values = {mode: self._values(step, mode) for mode in MODES}
        if not self.moments:
            steered = {
                spec.name: statistics.values(step)
                for spec, statistics in self.fits.items()
                if spec.name in step.steered
            }
            self._begin({"free": values["free"], "forced": values["forced"], **steered})
        for mode in MODES:
            self.moments[mode, step.batch.held_out].update(values[mode])
        for statistics in self.fits.values():
            statistics.update(step)
        self.norms.update(self._vectors(step, values))
        if self.samples:
            self.samples.update(step)

    def start(self) -> None:
        """Take the first process's frames where this one had no document."""
        if not self.moments:
            self._begin({})

    def reduce(self, processes: Processes) -> None:
        """Add up the sums of all `processes`: then each holds them all."""
        self.start()
        for sums in (*self.moments.values(), *self.fits.values()):
            sums.reduce(processes)
        self.norms.reduce(processes)
        if self.samples:
            self.samples.reduce(processes)

    def state(self) -> dict[str, Tensor]:
        """The sums that the tables need (exact ones), as tensors by name, for `from_state`."""
        tensors = {f"norms/{name}": value for name, value in self.norms.state().items()}
        for (mode, held_out), sums in self.moments.items():
            assert isinstance(sums, MomentSums)
            side = "heldout" if held_out else "fit"
            tensors |= {f"{mode}/{side}/{name}": value for name, value in sums.state().items()}
        return tensors

    @classmethod
    def from_state(cls, branches: tuple[str, ...], state: Mapping[str, Tensor]) -> Self:
        """Return the sums that gave `state`, without sequential ones and sample."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        sums = cls(branches)
        sums.norms = NormSums.from_state(part("norms/"))
        for mode, held_out in product(MODES, SIDES):
            side = "heldout" if held_out else "fit"
            sums.moments[mode, held_out] = MomentSums.from_state(part(f"{mode}/{side}/"))
        return sums

    def _begin(self, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """One frame for each vector in all processes, and empty sums in them."""
        frames = shared_frames(values, self.processes)
        for mode, held_out in product(MODES, SIDES):
            pairs = moment_pairs(mode, self.branches)
            self.moments[mode, held_out] = self._sums(pairs, frames[mode])
        for spec, statistics in self.fits.items():
            # A first batch of held-out documents alone has no steered states.
            statistics.begin(frames.get(spec.name))

    def _sums(self, pairs: list[tuple[str, str]], frames: Mapping[str, Frame] | None) -> Sums:
        if self.sketch:
            return SketchedSums(pairs, self.sketch, frames)
        return MomentSums(pairs, frames)

    def _values(self, step: Step, mode: Mode) -> dict[str, Tensor]:
        values = {}
        for location in self.branches:
            values[source(location)] = step.source(mode, location)
            values[target(location)] = step.delta(mode, location)
        return values

    def _vectors(
        self, step: Step, values: Mapping[Mode, Mapping[str, Tensor]]
    ) -> dict[tuple[str, str], Tensor]:
        """Return the vectors whose norms are asked for, by (of, location)."""
        found = {}
        for location in self.branches:
            found["base", location] = step.base[location]
            found["tuned", location] = step.tuned[location]
            for mode in MODES:
                found[f"delta_{mode}", location] = values[mode][target(location)]
        return found
