"""What one fit needs of one block: moments of state and target, and the adapter they give."""

from collections.abc import Mapping

import torch
from torch import Tensor

from toolkit.adapters.adapter import Adapter, columns
from toolkit.adapters.linear import Linear
from toolkit.analysis.linear_fit import Rank, fit_linear
from toolkit.errors import InputError
from toolkit.fitting.from_moments import adapter_from, loreft_from
from toolkit.fitting.regression import Tokens, match
from toolkit.fitting.spec import FitSpec
from toolkit.fitting.through_heads import HeadProjection
from toolkit.lockstep.march import Step
from toolkit.runtime.processes import ALONE, Processes
from toolkit.statistics import Frame, Moments, MomentSums, SketchedSums
from toolkit.statistics.frame import shared_frames

STATE, TARGET = "state", "delta"
PAIRS = [(STATE, STATE), (TARGET, STATE)]


class FitStatistics:
    """Accumulates what one `FitSpec` needs of one block.

    A non-linear adapter needs the tokens themselves beside their moments. All `processes` take the
    frames of the first one's first tokens, unless `begin` has set frames. `sketch` is the width of
    a random projection through which moments are seen (None: they are exact). `heads` is the output
    projection of the block, through which an adapter at the heads is fitted.
    """

    def __init__(
        self,
        spec: FitSpec,
        processes: Processes = ALONE,
        sketch: int | None = None,
        heads: HeadProjection | None = None,
    ) -> None:
        self.spec, self.processes, self.sketch = spec, processes, sketch
        self.heads = heads if spec.location == "heads" and spec.fit != "free" else None
        self.moments: MomentSums | SketchedSums | None = None
        self.tokens: dict[int, Tokens] = {}

    def begin(self, frames: Mapping[str, Frame] | None) -> None:
        """Start empty sums in `frames` (None: in those of the first tokens)."""
        if self.sketch:
            self.moments = SketchedSums(PAIRS, self.sketch, frames)
        else:
            self.moments = MomentSums(PAIRS, frames)

    def update(self, step: Step) -> None:
        """Add one batch; held-out documents have no part in a fit."""
        if step.batch.held_out:
            return
        values = self.values(step)
        if self.moments is None:
            self.begin(shared_frames({self.spec.name: values}, self.processes)[self.spec.name])
        assert self.moments is not None
        self.moments.update(values)
        if self.spec.kind == "nonlinear":
            self.tokens[step.index] = Tokens(values[STATE], values[TARGET])

    def values(self, step: Step) -> dict[str, Tensor]:
        """Return `values_of`; at the heads, with the target as they can supply it."""
        values = values_of(step, self.spec)
        if self.heads:
            values[TARGET] = self.heads.target(values[STATE], values[TARGET])
            if self.spec.kind not in ("vector", "linear"):  # these have no metric of their own
                values[TARGET] = self.heads.at_heads(values[TARGET])
        return values

    def start(self) -> None:
        """Take the first process's frames where this one had no document."""
        if self.moments is None:
            self.begin(shared_frames({}, self.processes).get(self.spec.name))

    def reduce(self, processes: Processes) -> None:
        """Add up the sums of all `processes`: then each holds them all."""
        self.start()
        assert self.moments is not None
        self.moments.reduce(processes)
        if self.spec.kind == "nonlinear":
            parts = processes.gathered(self.tokens)
            self.tokens = {index: part for some in parts for index, part in some.items()}

    def result(self) -> Moments:
        """Return the moments of state and target."""
        assert self.moments is not None
        return self.moments.result()

    def adapter(self, layer: int, dtype: torch.dtype, seed: int = 0) -> Adapter:
        """Fit the adapter of block `layer`."""
        rank, moments = self.spec.rank_at(layer), self.result()
        width = len(moments.mean[STATE])
        if rank != "full" and rank > width:
            raise InputError(
                f"rank {rank} is more than the {width} dimensions at {self.spec.location}"
            )
        if self.spec.kind == "loreft":
            return loreft_from(moments, STATE, TARGET, rank, dtype)
        if self.spec.kind != "nonlinear":
            if self.heads is None:
                return _linear(moments, rank, dtype)
            within = self.heads.within(moments, STATE, TARGET)
            return self.heads.back(_linear(within, rank, dtype))
        # Regressed where the tokens are, and in their precision: the model's may be a half.
        tokens = Tokens.join([self.tokens[index] for index in sorted(self.tokens)])
        linear = _linear(moments, columns(rank, width), tokens.states.dtype)
        assert isinstance(linear, Linear)
        return match(linear.to(tokens.states.device), tokens, seed).to(dtype)


def values_of(step: Step, spec: FitSpec) -> dict[str, Tensor]:
    """Return the state that an adapter reads and what it is to supply, `[n_counted, d]` each."""
    if spec.fit == "free":
        state, target = step.source("free", spec.location), step.delta("free", spec.location)
        return {STATE: state, TARGET: target}
    if spec.fit == "forced":
        return {
            STATE: step.source("forced", spec.location),
            TARGET: step.own_delta(spec.location),
        }
    target = step.sequential_delta(spec.name, spec.location)
    if spec.fit == "blended":
        own = step.own_delta(spec.location)
        target = own + spec.blend * (target - own)
    return {STATE: step.steered[spec.name][spec.location], TARGET: target}


def _linear(moments: Moments, rank: Rank, dtype: torch.dtype) -> Adapter:
    widest = 0 if rank == "full" else rank
    return adapter_from(fit_linear(moments, STATE, TARGET, max_rank=widest), rank, dtype)
