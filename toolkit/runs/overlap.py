"""How alike the leading directions of two runs' deltas are, block by block, beside chance."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from toolkit.adapters.adapter import Adapter
from toolkit.adapters.linear import Linear
from toolkit.analysis.subspaces import (
    chance_overlap,
    drawn_overlap,
    leading_directions,
    subspace_overlap,
)
from toolkit.diagnosis.block_statistics import MODES, BlockStatistics, source, target
from toolkit.diagnosis.workspace import kept_blocks, read_block
from toolkit.runs.finished import FinishedRun
from toolkit.runtime.progress import progress
from toolkit.tables.drawing import (
    BLUE,
    GREEN,
    GREY,
    LAYER_LABEL,
    LOCATIONS,
    VERMILLION,
    add_band,
    draw_line,
    finish,
    house_style,
    make_panels,
)
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import share_words

LEADING = 8  # directions; a quarter of the dimensions where there are fewer than 32
STATISTICS, ADAPTERS = "statistics", "adapters"
Row = dict[str, Any]


@dataclass(frozen=True)
class Directions:
    """The leading directions of one delta, `[d, k]` each, about its mean `[d]`.

    `everywhere` are those on all documents, `fit` and `held_out` on either side alone; `states` is
    the covariance of the base model's states there.
    """

    everywhere: Tensor
    fit: Tensor
    held_out: Tensor
    mean: Tensor
    states: Tensor


def overlap_rows(
    runs: Sequence[FinishedRun], show_progress: bool = True
) -> tuple[list[Row], list[str]]:
    """Return the rows of ``overlap.csv``, and what is left out of it and why.

    From the statistics of runs that kept them; of other pairs from their recommended adapters,
    where these are low-rank maps at one location.
    """
    kept = {run.name: kept_blocks(run.folder) for run in runs}
    with_statistics = [run for run in runs if kept[run.name]]
    rows: list[Row] = []
    if with_statistics:
        layers = sorted(kept[with_statistics[0].name])
        with progress("leading directions of deltas", len(layers), show_progress) as advance:
            for layer in layers:
                sums = {r.name: read_block(kept[r.name][layer]) for r in with_statistics}
                rows += list(_of_block(layer, sums))
                advance()
    without = [run for run in runs if not kept[run.name]]
    alone = []  # pairs that nothing can be said of
    for one, other in combinations(runs, 2):
        if one in without or other in without:
            found = list(_of_adapters(one, other))
            rows += found
            alone += [] if found else [f"{one.name} and {other.name}"]
    if not without:
        return rows, []
    said = (
        f"{', '.join(run.name for run in without)} ran without --keep-statistics, which the "
        "directions of deltas need: recommended adapters are compared where both are low-rank maps "
        "at one location"
    )
    return rows, [f"{said}; no overlap of {', of '.join(alone)}" if alone else said]


def _of_block(layer: int, sums: dict[str, BlockStatistics]) -> Iterator[Row]:
    """Yield the rows of one block: each run beside itself, on other documents, and each pair."""
    for location in next(iter(sums.values())).branches:
        for mode in MODES:
            found = {name: directions(s, location, mode) for name, s in sums.items()}
            for name, own in found.items():
                yield {
                    **_labels(name, name, STATISTICS, layer, location, mode),
                    **_alike(own.fit, own.held_out),
                }
            states = next(iter(found.values())).states  # one null for all pairs
            drawn: dict[tuple[int, int], tuple[float, float]] = {}
            for one, other in combinations(found, 2):
                a, b = found[one], found[other]
                ranks = a.everywhere.shape[1], b.everywhere.shape[1]
                if ranks not in drawn:
                    drawn[ranks] = drawn_overlap(states, *ranks)
                mean, high = drawn[ranks]
                yield {
                    **_labels(one, other, STATISTICS, layer, location, mode),
                    **_alike(a.everywhere, b.everywhere),
                    "states": mean,
                    "states_high": high,
                    "mean_cosine": float(torch.cosine_similarity(a.mean, b.mean, 0)),
                }


def directions(sums: BlockStatistics, location: str, mode: Any) -> Directions:
    """Return the leading directions of the delta at `location`, about its mean."""
    delta, state = target(location), source(location)
    pairs = [(delta, delta), (state, state)]
    fit, held_out = (sums.moments[mode, side].result(pairs) for side in (False, True))
    both = fit.pooled(held_out, pairs)
    k = max(1, min(LEADING, len(both.mean[delta]) // 4))
    everywhere, on_fit, on_held_out = (
        leading_directions(moments.covariance[delta, delta], k) for moments in (both, fit, held_out)
    )
    mean, states = both.mean[delta].cpu(), both.covariance[state, state].cpu()
    return Directions(everywhere, on_fit, on_held_out, mean, states)


def _of_adapters(one: FinishedRun, other: FinishedRun) -> Iterator[Row]:
    """Yield the rows of two runs' recommended adapters, where what they write can be compared."""
    ours, theirs = one.adapters, other.adapters
    if not ours or not theirs or ours.location != theirs.location:
        return
    for layer in sorted(ours.by_layer.keys() & theirs.by_layer.keys()):
        a, b = _written(ours.by_layer[layer]), _written(theirs.by_layer[layer])
        if a is None or b is None:
            return
        labels = _labels(one.name, other.name, ADAPTERS, layer, ours.location, "")
        yield {**labels, **_alike(a, b)}


def _written(adapter: Adapter) -> Tensor | None:
    """Return a basis of what a low-rank map writes, about its constant; None of other kinds."""
    if not isinstance(adapter, Linear) or adapter.down is None:
        return None
    return torch.linalg.qr(adapter.up.detach().double().cpu()).Q


# many parameters: they are the columns that say what a row is of
def _labels(one: str, other: str, origin: str, layer: int, location: str, mode: str) -> Row:
    return {"run": one, "other": other, "source": origin, "layer": layer, "location": location,
            "mode": mode}  # fmt: skip


def _alike(a: Tensor, b: Tensor) -> Row:
    """Return how alike two sets of directions are, beside chance."""
    chance, spread = chance_overlap(a.shape[1], b.shape[1], len(a))
    return {
        "directions": a.shape[1],
        "other_directions": b.shape[1],
        "overlap": subspace_overlap(a, b),
        "chance": chance,
        "chance_sd": spread,
    }


@house_style("Overlap of leading directions")
def plot(frame: pd.DataFrame) -> Figure:
    """Draw the overlap over the blocks, a panel a place: pairs of runs, one run, and chance."""
    shown = _shown(frame)
    places = [location for location in LOCATIONS if (shown.location == location).any()]
    figure, panels = make_panels(len(places), 3.2)
    for axes, location in zip(panels, places, strict=True):
        _draw_place(axes, shown[shown.location == location])
        axes.set_title(f"{LOCATIONS[location]}, {_what(shown)}")
        axes.set_ylim(-0.03, 1.06)
        finish(axes, LAYER_LABEL, "overlap (1: the same)", 2, layers=True)
    return figure


def _shown(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that are drawn: of forced deltas, or of adapters where no pair has these."""
    forced = frame[(frame.source == STATISTICS) & (frame["mode"] == "forced")]
    return forced if (forced.run != forced.other).any() else frame[frame.source == ADAPTERS]


def _what(shown: pd.DataFrame) -> str:
    if (shown.source == ADAPTERS).all():
        return "what recommended adapters write"
    return f"leading {shown.directions.max()} directions of the forced delta"


def _draw_place(axes: Axes, rows: pd.DataFrame) -> None:
    pairs, own = rows[rows.run != rows.other], rows[rows.run == rows.other]
    by_layer = pairs.groupby("layer")
    low, high = by_layer.overlap.min(), by_layer.overlap.max()
    add_band(axes, low.index, low, high, BLUE)
    lines: list[tuple[pd.DataFrame, str, dict[str, Any]]] = [
        (pairs, "overlap", {"color": BLUE, "marker": "o", "label": "two runs"}),
        (own, "overlap", {"color": GREEN, "linestyle": "--", "label": "one run, other documents"}),
        (
            pairs,
            "states",
            {"color": VERMILLION, "linestyle": "-.", "label": "drawn from the states"},
        ),
        (pairs, "chance", {"color": GREY, "linestyle": ":", "label": "chance"}),
    ]
    for part, column, style in lines:
        if len(part):
            means = part.groupby("layer")[column].mean().reset_index()
            draw_line(axes, means, "layer", column, **style)


def finding(frame: pd.DataFrame) -> str:
    """Say how alike the runs' directions are, with what is to be held against it."""
    shown = _shown(frame)
    pairs = shown[shown.run != shown.other]
    if not pairs.overlap.notna().any():
        return "There is no pair of runs whose directions can be compared."
    said = []
    for location in (name for name in LOCATIONS if (pairs.location == name).any()):
        here = pairs[pairs.location == location]
        means = here.groupby(["run", "other"]).overlap.mean()
        text = f"{LOCATIONS[location]} {share_words(here.overlap.mean())}"
        if len(means) > 1:
            (least, most) = ("{} and {}".format(*how) for how in (means.idxmin(), means.idxmax()))
            low, high = share_words(means.min()), share_words(means.max())
            text += f" (least {least} {low}, most {most} {high})"
        text += f", by chance {share_words(here.chance.mean())}"
        own = shown[(shown.run == shown.other) & (shown.location == location)].overlap.mean()
        if np.isfinite(here.states.mean()):
            text += f", drawn from the states {share_words(here.states.mean())}"
            text += f", one run on other documents {share_words(own)}"
            text += f"; cosine of the means {share_words(here.mean_cosine.mean())}"
        said.append(text)
    return f"Overlap of two runs, mean over blocks: {'. '.join(said)}."


SPEC = TableSpec(
    name="overlap",
    title="Overlap of the deltas' leading directions",
    reading=(
        "The mean squared cosine of the principal angles between the leading directions of two "
        "runs' deltas about their means; the band reaches from the least to the most alike pair. "
        "Grey: random directions. Red: directions drawn from the base model's states, the "
        "stricter null. Green: one run's directions on its fit and on its held-out documents; "
        "two runs cannot be told apart by less than that."
    ),
    columns={
        "run": "one run",
        "other": "the other; the same run: its fit documents beside its held-out ones",
        "source": (
            "`statistics`: leading eigenvectors of the delta's covariance (runs with "
            "`--keep-statistics`); `adapters`: what the recommended adapters write"
        ),
        "layer": "the block",
        "location": "where",
        "mode": "free or forced delta; empty for adapters",
        "directions": "number of directions, k: 8, fewer where the delta or the model has fewer",
        "other_directions": "the same of the other",
        "overlap": (
            "`‖UᵀV‖²_F / k`, the mean squared cosine of the principal angles: 1 the same, "
            "0 orthogonal"
        ),
        "chance": "its mean for random directions, k / d",
        "chance_sd": "its standard deviation for random directions",
        "states": (
            "its mean for directions drawn from the covariance of the base model's states there "
            "(those of the first run)"
        ),
        "states_high": "95 % of such draws lie below",
        "mean_cosine": "cosine of the two mean deltas `Eδ`, which the directions leave out",
    },
    plot=plot,
    finding=finding,
    place=1,
)
