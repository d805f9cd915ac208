"""The table ``steerability``: what steering recovers."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from toolkit.tables.drawing import (
    BLACK,
    EDGE,
    FIT_STYLE,
    LAYER_LABEL,
    LOCATION_STYLE,
    LOCATIONS,
    LOWEST,
    add_reference,
    by_location,
    clip_shares,
    drawn_heights,
    finish,
    house_style,
    make_panels,
    number_at_edge,
)
from toolkit.tables.series import rank_words, sorted_ranks
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import NAMES, NOTHING, UNMEASURED, plus_minus


@house_style("What each fit recovers, and at what cost")
def plot(frame: pd.DataFrame) -> Figure:
    """What each fit recovers by its size; and one block steered alone, by layer."""
    figure, (everywhere, single) = make_panels(2, 4.0)
    fitted = frame[frame.fit.isin(list(FIT_STYLE)) & np.isfinite(frame.recovered)]
    in_all = fitted[(fitted.layers == "all") & (fitted.parameters > 0)]
    everywhere.set_title("Recovered by a fit in all blocks, by its size")
    _everywhere(everywhere, in_all)
    _weights(everywhere, frame[(frame.kind == "lora") & np.isfinite(frame.recovered)])
    finish(everywhere, "parameters of the adapters", "recovered (1: the tuned model)", 2, drop=84)
    alone = fitted[fitted.layers != "all"]
    alone = alone.assign(layer=pd.to_numeric(alone.layers, errors="coerce"))
    ranks = [rank_words(rank) for rank in sorted_ranks(alone["rank"])]
    single.set_title(f"Recovered by steering one block alone ({', '.join(ranks) or 'none'})")
    for location, rows in by_location(alone, "location"):
        style = LOCATION_STYLE[location] | {"label": f"{LOCATIONS[location]}, free"}
        _points(single, rows.sort_values("layer"), "layer", style)
    _share_frame(single)
    finish(single, LAYER_LABEL, "recovered (1: the tuned model)", 3, layers=True)
    return figure


def _everywhere(axes: Axes, frame: pd.DataFrame) -> None:
    through = frame.target == "block"
    series = [
        (f"{LOCATIONS[location]}, {fit}{words}", rows[some], location, fit)
        for location, rows in by_location(frame, "location")
        for fit in FIT_STYLE
        for words, kept in (("", ~through), (", through the MLP", through))
        if (some := (rows.fit == fit) & kept[rows.index]).any()
    ]
    for place, (label, rows, location, fit) in enumerate(series):
        shift = 1.035 ** (place - (len(series) - 1) / 2)  # so that equal points are both seen
        marker = LOCATION_STYLE[location]["marker"]
        style = {**FIT_STYLE[fit], "marker": marker, "label": label, "markersize": 6}
        if label.endswith("through the MLP"):
            style["markerfacecolor"] = "white"
        shifted = rows.assign(x=rows.parameters * shift).sort_values("x")
        _points(axes, shifted, "x", style)
    _share_frame(axes)
    if len(frame):
        _parameter_axis(axes, frame)


def _weights(axes: Axes, frame: pd.DataFrame) -> None:
    """Draw changes of the weights in closed form, the better of both metrics at each size."""
    if frame.empty:
        return
    best = frame.loc[frame.groupby("target").recovered.idxmax()].sort_values("parameters")
    style = {"color": BLACK, "linestyle": "", "marker": "X", "markersize": 8}
    _points(axes, best, "parameters", {**style, "label": "weights, low rank (closed form)"})
    low, high = axes.get_xlim()
    axes.set_xlim(low, max(high, best.parameters.max() * 1.9))


def _parameter_axis(axes: Axes, frame: pd.DataFrame) -> None:
    """Make x logarithmic: ticks are the sizes that were tried, with their ranks where room is."""
    by_rank = frame.groupby(frame["rank"].map(rank_words), sort=False)
    sizes = by_rank[["parameters", "parameters_percent"]].median()
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    named = _apart(sizes.parameters, by_rank.size())
    labels = [
        f"{name.removeprefix('fixed ')}\n{_short(row.parameters)}\n{row.parameters_percent:.2g} %"
        if name in named
        else ""
        for name, row in zip(sizes.index, sizes.itertuples(), strict=True)
    ]
    axes.set_xticks(list(sizes.parameters), labels)
    axes.set_xlim(sizes.parameters.min() / 1.9, sizes.parameters.max() * 1.9)


def _apart(sizes: pd.Series, weights: pd.Series) -> set[str]:
    """Choose names of `sizes` that can be read side by side, those of most `weights` first."""
    places = np.log(sizes)
    room = 0.13 * (places.max() - places.min())
    chosen: set[str] = set()
    for name in weights.sort_values(ascending=False, kind="stable").index:
        if all(abs(places[name] - places[other]) >= room for other in chosen):
            chosen.add(name)
    return chosen


def _short(number: float) -> str:
    """294912 as 295 k."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def _points(axes: Axes, rows: pd.DataFrame, x: str, style: dict[str, Any]) -> None:
    """`recovered` with its standard error; values below LOWEST at the edge, with their number."""
    if rows.empty:
        return
    low = rows.recovered < LOWEST
    heights = rows.recovered.where(~low, EDGE)
    axes.plot(rows[x], heights, **style)
    error = rows.recovered_sem.where(~low & np.isfinite(rows.recovered_sem), 0)
    axes.errorbar(rows[x], heights, error, fmt="none", ecolor=style["color"], elinewidth=1.2)
    arrow = {"marker": "v", "markersize": 8, "linestyle": "", "color": style["color"]}
    axes.plot(rows[x][low], heights[low], **arrow)
    if low.sum() <= 6:
        for place, value in zip(rows[x][low], rows.recovered[low], strict=True):
            number_at_edge(axes, place, value, style["color"])


def _share_frame(axes: Axes) -> None:
    clip_shares(axes)
    if len(drawn_heights(axes)):
        add_reference(axes, 1, "the tuned model")
        add_reference(axes, 0, "no steering")


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    rows = frame[frame.kind.isin(["vector", "linear"])]
    if not rows.kl.notna().any():
        return UNMEASURED
    if not frame[frame.kind == "none"].kl.any():
        return NOTHING
    everywhere, single = rows[rows.layers == "all"], rows[rows.layers != "all"]
    parts = []
    for location in ("pre_mlp", "post_mlp", "post_block"):
        for fit in ("forced", "sequential", "free", "distilled"):
            match = everywhere[
                (everywhere.location == location)
                & (everywhere.fit == fit)
                & (everywhere["rank"] == 8)
            ]
            for row in match.itertuples():
                share = plus_minus(row.recovered, row.recovered_sem)
                words = f"{fit} through the MLP" if row.target == "block" else fit
                parts.append(f"{NAMES[location]} {words} {share}")
    text = f"Recovered at rank 8 in all blocks: {'; '.join(parts)}."
    if len(single):
        best = single.loc[single.recovered.idxmax()]
        share = plus_minus(best.recovered, best.recovered_sem)
        text += f" The best single block is {best.layers}, with {share}."
    return text


SPEC = TableSpec(
    name="steerability",
    title="What steering recovers",
    reading=(
        "recovered = 1 − KL(tuned ‖ steered) / KL(tuned ‖ base) over the tokens that the tuned "
        "model generates on held-out prompts; ± is one standard error over prompts. 1 reproduces "
        "the tuned model, 0 is no better than no steering, below 0 is worse."
    ),
    columns={
        "location": "where",
        "kind": "`none`, `oracle`, `vector`, `linear` or `lora` (a low-rank change of the weights)",
        "rank": "the map's rank; of `lora` the rank of all modules, if it is one",
        "fit": (
            "free, forced, sequential or distilled; of `lora` `metric` (cut by what the modules' "
            "inputs are) or `plain` (by singular values)"
        ),
        "layers": "`all`, or the one block that is steered",
        "parameters": "numbers in the adapters (biases too)",
        "parameters_percent": "the same in per cent of the model's",
        "kl": (
            "`KL(tuned ‖ x)`, nats a generated token, all models reading the tuned model's tokens"
        ),
        "kl_sem": "standard error of `kl`, over prompts",
        "recovered": (
            "`1 − KL(tuned ‖ steered) / KL(tuned ‖ base)`: 1 the tuned model, 0 no steering, "
            "below 0 worse"
        ),
        "recovered_sem": "standard error of `recovered`, over prompts",
        "kl_own": (
            "`kl` with each model reading its own greedy tokens; candidates in all blocks only"
        ),
        "kl_own_sem": "standard error of `kl_own`, over prompts",
        "target": (
            "what the adapter is fitted to supply: `own`, what is missing where it adds; `block`, "
            "before the MLP what is missing after the block, fitted through the MLP; of `lora` the "
            "size that it stands beside"
        ),
    },
    plot=plot,
    finding=finding,
    place=0,
)
