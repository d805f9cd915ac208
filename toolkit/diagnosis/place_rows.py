"""Places beside each other: one map for all tokens that supplies the block's delta from each.

All places are fitted and judged on the same tokens. What is added after the MLP arrives, so a map
there is a linear fit. What is added before it passes through the MLP too: that is the shared map's
problem, whose maps are adapters as well. In a family whose MLP reads nothing of what attention
adds, whatever is added before the MLP arrives too.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from toolkit.adapters.adapter import Adapter
from toolkit.adapters.linear import Linear
from toolkit.adapters.vector import FixedVector
from toolkit.analysis.linear_fit import Rank, fit_linear, ranks_below
from toolkit.analysis.shared_map import Problem, SharedMap, explained, fit_shared
from toolkit.blocks.parts import BlockParts, PlaceSample
from toolkit.diagnosis.reach_rows import Judged, Row, validating
from toolkit.fitting.spec import FitSpec
from toolkit.statistics import MomentSums

PLACE_RANKS: tuple[Rank, ...] = (0, 8, "full")
Found = tuple[dict[str, list[Row]], dict[FitSpec, Adapter]]
ITERATIONS = 1  # of every rank on from the one before: with thousands of tokens that is most of it


def places_tasks(
    parts: BlockParts,
    sides: tuple[PlaceSample, PlaceSample],
    specs: Sequence[FitSpec],
    parallel: bool,
    dtype: torch.dtype,
) -> list[Callable[[], Found]]:
    """Return what gives the rows of ``shared_reach`` with target ``block``: a task for each place.

    `specs` are the adapters before the MLP that supply the block's delta through the block.
    """
    tasks: list[Callable[[], Found]] = []
    if specs or not parallel:
        tasks.append(partial(_through_the_block, parts, sides, specs, parallel, dtype))
    for location in ("pre_mlp", "post_mlp", "post_block")[not parallel :]:
        tasks.append(partial(_arriving, location, sides))
    return tasks


def _through_the_block(
    parts: BlockParts,
    sides: tuple[PlaceSample, PlaceSample],
    specs: Sequence[FitSpec],
    parallel: bool,
    dtype: torch.dtype,
) -> Found:
    """Fit the shared maps before the MLP; return their rows, and the adapters of `specs`."""
    fit, held_out = sides
    if not _something(sides):
        zero = fit.pre_mlp.new_zeros(fit.pre_mlp.shape[1], dtype=dtype)
        return {}, {spec: FixedVector(zero.clone()) for spec in specs}
    if parallel or parts.sublayer is None:
        return {}, {}
    sublayer = parts.sublayer.to(fit.pre_mlp.dtype, fit.pre_mlp.device)

    def problem(sample: PlaceSample) -> Problem:
        jacobian = sublayer.to_block(sample.stream)
        return Problem(jacobian, sample.pre_mlp, sample.forced_delta)

    stops = validating(len(fit))
    seen = problem(fit.where(~stops)), problem(fit.where(stops))
    maps = fit_shared(*seen, PLACE_RANKS, ITERATIONS)
    judged = Judged(seen, problem(held_out), sublayer, held_out.stream)
    labels = {"location": "pre_mlp", "target": "block"}
    rows = [{**labels, "rank": rank} | judged.row(shared) for rank, shared in maps.items()]
    adapters = {spec: _adapter(maps[spec.rank_at(0)], spec.rank_at(0), dtype) for spec in specs}
    return {"shared_reach": rows}, adapters


def _arriving(location: str, sides: tuple[PlaceSample, PlaceSample]) -> Found:
    """Return the rows of maps of the state at `location`, whose output arrives."""
    something = _something(sides)
    rows = list(_arriving_rows(location, *sides)) if something else [_nothing(location, *sides)]
    return {"shared_reach": rows}, {}


def _something(sides: tuple[PlaceSample, PlaceSample]) -> bool:
    """Tell whether there is something to supply, on both sides."""
    return all(bool(sample.forced_delta.any()) for sample in sides)


def _nothing(location: str, fit: PlaceSample, held_out: PlaceSample) -> Row:
    """Return the row of a vector where there is nothing to supply."""
    shares = ("explained_fit", "explained_heldout", "explained_heldout_sem", "nonlinear_heldout")
    return {
        "location": location,
        "target": "block",
        "rank": 0,
        **dict.fromkeys((*shares, "size"), 0.0),
        "n_fit": len(fit),
        "n_heldout": len(held_out),
    }


def _adapter(shared: SharedMap, rank: Rank, dtype: torch.dtype) -> Adapter:
    bias = shared.bias.to(dtype, copy=True)
    if shared.matrix is None or rank == "full":
        return (
            FixedVector(bias)
            if shared.matrix is None
            else Linear(shared.matrix.to(dtype, copy=True), None, bias)
        )
    up, down = shared.factors(rank)
    return Linear(up.to(dtype).contiguous(), down.to(dtype).contiguous(), bias)


def _arriving_rows(location: str, fit: PlaceSample, held_out: PlaceSample) -> Iterator[Row]:
    """Yield what a linear map of the state at `location`, whose output arrives, explains."""
    moments = MomentSums([("x", "x"), ("t", "x")])
    moments.update({"x": getattr(fit, location), "t": fit.forced_delta})
    linear = fit_linear(moments.result(), "x", "t")
    for rank in ranks_below(len(linear.t_mean), PLACE_RANKS):
        matrix, bias = linear.matrix(rank), linear.bias(rank)

        def left(
            sample: PlaceSample, m: Tensor = matrix, b: Tensor = bias
        ) -> tuple[Tensor, Tensor]:
            x = getattr(sample, location)
            steering = x @ m.T.to(x) + b.to(x)
            return sample.forced_delta - steering, steering

        share, sem = explained(left(held_out)[0], held_out.forced_delta)
        yield {
            "location": location,
            "target": "block",
            "rank": rank,
            "explained_fit": explained(left(fit)[0], fit.forced_delta)[0],
            "explained_heldout": share,
            "explained_heldout_sem": sem,
            "nonlinear_heldout": share,  # what is added is what is asked for
            "size": float(left(held_out)[1].norm() / held_out.post_block.norm()),
            "n_fit": len(fit),
            "n_heldout": len(held_out),
        }
