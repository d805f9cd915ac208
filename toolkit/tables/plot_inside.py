"""Plots of the tables that look inside a block; see `toolkit.tables.plot`."""

from collections.abc import Callable
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LAYER_LABEL,
    LOCATION_STYLE,
    LOCATIONS,
    ORANGE,
    PURPLE,
    REFERENCE,
    SKY,
    VERMILLION,
    add_band,
    clip_shares,
    draw_line,
    finish,
    house_style,
    log_scale,
    make_panels,
)

SHOWN_BUDGETS = (0.03, 0.3)
RANK_STYLE: dict[Any, dict[str, Any]] = {
    0: {"color": GREY, "marker": "D", "linestyle": ":", "label": "one vector"},
    1: {"color": ORANGE, "marker": "s", "linestyle": "--", "label": "rank 1"},
    8: {"color": BLUE, "marker": "o", "linestyle": "-", "label": "rank 8"},
    32: {"color": GREEN, "marker": "^", "linestyle": "-.", "label": "rank 32"},
    "full": {"color": BLACK, "marker": "v", "linestyle": "-", "label": "full rank"},
}


@house_style("What one steering map for all tokens can do")
def shared_reach(frame: pd.DataFrame) -> Figure:
    """Held-out share that one affine map before the MLP brings about, by layer and rank."""
    figure, panels = make_panels(4, 3.5)
    titles = {
        ("mlp_in", "down"): "The down projection's change, steered at the MLP's input",
        ("mlp_in", "exact"): "The MLP's whole change, steered at the MLP's input",
        ("pre_mlp", "block"): "The block's forced delta, steered before the MLP",
    }
    for axes, ((location, target), title) in zip(panels, titles.items(), strict=False):
        rows = frame[(frame.location == location) & (frame.target == target)]
        for rank, style in RANK_STYLE.items():
            _with_error(axes, rows[rows["rank"] == rank], style)
        axes.set_title(f"{title}:\none map for all tokens")
        _shares(axes)
    by_place = panels[3]
    for place, style in LOCATION_STYLE.items():
        rows = frame[(frame.location == place) & (frame.target == "block") & (frame["rank"] == 8)]
        _with_error(by_place, rows, {**style, "label": LOCATIONS[place]})
    by_place.set_title("The block's forced delta, one map of rank 8, by location")
    _shares(by_place)
    return figure


def _with_error(axes: Axes, rows: pd.DataFrame, style: dict[str, Any]) -> None:
    rows = rows.sort_values("layer")
    error = rows.explained_heldout_sem.fillna(0)
    low, high = rows.explained_heldout - error, rows.explained_heldout + error
    add_band(axes, rows.layer, low, high, style["color"])
    draw_line(axes, rows, "layer", "explained_heldout", **style)


def _shares(axes: Axes) -> None:
    clip_shares(axes)
    axes.axhline(0, color=GREY, linewidth=1, label=REFERENCE)
    finish(axes, LAYER_LABEL, "explained, held out", 3, layers=True)


@house_style("What share of the block's change each location reaches")
def forced_reach(frame: pd.DataFrame) -> Figure:
    """Share of the block's forced delta that a free vector per token reaches, by location."""
    figure, panels = make_panels(len(SHOWN_BUDGETS), 3.6)
    block = frame[frame.target == "block"]
    for axes, budget in zip(panels, SHOWN_BUDGETS, strict=True):
        rows = block[block.budget == budget]
        for location in ("pre_mlp", "post_block"):
            label = {"pre_mlp": "pre-MLP", "post_block": "post-MLP and post-block"}[location]
            style = {**LOCATION_STYLE[location], "label": label}
            draw_line(axes, rows[rows.location == location], "layer", "explained", **style)
        heads = rows[rows.location == "heads"].groupby("layer", as_index=False).explained
        drawn = (("max", "best single head", "-."), ("median", "median head", ":"))
        for how, label, dashes in drawn:
            draw_line(axes, heads.agg(how), "layer", "explained", color=PURPLE, marker="D",
                  linestyle=dashes, label=label)  # fmt: skip
        axes.set_title(f"Reached by a vector a token of {100 * budget:g}% of the stream's norm")
        axes.set_ylim(0, 1.05)
        finish(axes, LAYER_LABEL, "share of the forced delta", 2, layers=True)
    return figure


@house_style("What the norms do to a small change")
def normalisation(frame: pd.DataFrame) -> Figure:
    """Relative gains of the norms around the MLP, by layer."""
    figure, (axes,) = make_panels(1, 4.0)
    drawn: dict[str, dict[str, Any]] = {
        "norm_gain": {"color": BLUE, "marker": "o", "label": "norm before the MLP, any direction"},
        "radial_gain": {"color": VERMILLION, "marker": "v", "linestyle": ":",
                        "label": "the same, the stream's own direction"},
        "post_gain": {"color": GREEN, "marker": "^", "linestyle": "-.",
                      "label": "norm behind the MLP"},
        "attention_share": {"color": BLACK, "marker": "s", "linestyle": "--",
                            "label": "attention's contribution / stream"},
    }  # fmt: skip
    for name, style in drawn.items():
        draw_line(axes, frame, "layer", name, **style)
    axes.set_title("A 1% change of the stream, seen behind the norm (%)")
    log_scale(axes)
    finish(axes, LAYER_LABEL, "relative gain (no unit)", 1, layers=True)
    return figure


@house_style("One change of the MLP's input for gate and up together")
def inner_pair(frame: pd.DataFrame) -> Figure:
    """Held-out share of what gate and up received that a change of h could give both."""
    figure, (axes,) = make_panels(1, 3.8)
    for rank, style in RANK_STYLE.items():
        label = "full (and a vector a token)" if rank == "full" else style["label"]
        _with_error(axes, frame[frame["rank"] == rank], {**style, "label": label})
    axes.set_title("What one change of h gives of both (ΔW_g h, ΔW_u h)")
    clip_shares(axes)
    axes.axhline(0, color=GREY, linewidth=1, label=REFERENCE)
    finish(axes, LAYER_LABEL, "explained, held out", 3, layers=True)
    return figure


@house_style("How far first order holds")
def first_order_scale(frame: pd.DataFrame) -> Figure:
    """What first order leaves of the MLP's change when the update is scaled, by layer."""
    figure, (axes,) = make_panels(1, 4.0)
    styles = [
        {"color": SKY, "marker": "D", "linestyle": ":"},
        {"color": GREEN, "marker": "^", "linestyle": "-."},
        {"color": BLACK, "marker": "o", "linestyle": "-"},
        {"color": ORANGE, "marker": "s", "linestyle": "--"},
        {"color": VERMILLION, "marker": "v", "linestyle": ":"},
    ]
    scales = sorted(frame["scale"].dropna().unique())
    for scale, style in zip(scales, styles, strict=False):
        rows = frame[frame["scale"] == scale]
        draw_line(axes, rows, "layer", "remainder", label=f"ΔW × {scale:g}", **style)
    axes.set_title("What first order leaves of the MLP's change, by its size")
    log_scale(axes)
    finish(axes, LAYER_LABEL, "remainder (share of energy)", 3, layers=True)
    return figure


@house_style("What an edit of the MLP's output can do")
def mlp_fit(frame: pd.DataFrame) -> Figure:
    """The best ReFT of each rank on the down projection's change; how linear the MLP is."""
    figure, (bound, linear) = make_panels(2, 3.4)
    for rank, style in RANK_STYLE.items():
        label = {0: "one vector", "full": "full rank"}.get(rank, f"rank {rank}")
        rows = frame[(frame.target == "down") & (frame["rank"] == rank)]
        draw_line(bound, rows, "layer", "explained_heldout", **{**style, "label": label})
    bound.set_title("The most that a ReFT after the MLP explains of ΔW_d m")
    clip_shares(bound)
    finish(bound, LAYER_LABEL, "explained, held out", 3, layers=True)
    rows = frame[frame.target == "mlp_out"]
    draw_line(linear, rows, "layer", "explained_heldout", color=VERMILLION, marker="o",
          label="best affine map of the MLP's input")  # fmt: skip
    linear.set_title("How linear the base model's MLP is on these tokens")
    clip_shares(linear)
    finish(linear, LAYER_LABEL, "R², held out", 1, layers=True)
    return figure


@house_style("How large and how concentrated each matrix's change is")
def weights(frame: pd.DataFrame) -> Figure:
    """2-norms and effective ranks of every matrix's change, by layer."""
    figure, (norms, ranks) = make_panels(2, 3.9)
    colors = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK)
    marks, dashes = "os^vD<>", ("-", "--", "-.", ":")
    for i, (module, rows) in enumerate(frame.groupby("module", sort=False)):
        style = {"color": colors[i % 7], "marker": marks[i % 7], "linestyle": dashes[i % 4]}
        name = str(module).split(".")[-1]
        draw_line(norms, rows, "layer", "norm_2", label=name, **style)
        draw_line(ranks, rows, "layer", "k90", label=name, **style)
    norms.set_title("The largest singular value of ΔW")
    log_scale(norms)
    finish(norms, LAYER_LABEL, "‖ΔW‖₂", 4, layers=True)
    ranks.set_title("Directions that hold 90% of ΔW")
    ranks.set_ylim(bottom=0)
    finish(ranks, LAYER_LABEL, "number of singular values", 4, layers=True)
    return figure


INSIDE_PLOTS: dict[str, Callable[..., Figure]] = {
    "shared_reach": shared_reach,
    "forced_reach": forced_reach,
    "normalisation": normalisation,
    "inner_pair": inner_pair,
    "first_order_scale": first_order_scale,
    "mlp_fit": mlp_fit,
    "weights": weights,
}
