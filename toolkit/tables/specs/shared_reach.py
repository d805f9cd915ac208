"""The table ``shared_reach``: what one map before the MLP could reach."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    GREY,
    LAYER_LABEL,
    LOCATION_STYLE,
    LOCATIONS,
    REFERENCE,
    clip_shares,
    finish,
    house_style,
    make_panels,
)
from toolkit.tables.series import RANK_STYLE, draw_with_error
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import NOTHING


@house_style("What one steering map for all tokens can do")
def plot(frame: pd.DataFrame) -> Figure:
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
            draw_with_error(axes, rows[rows["rank"] == rank], style)
        axes.set_title(f"{title}:\none map for all tokens")
        finish_shares(axes)
    by_place = panels[3]
    for place, style in LOCATION_STYLE.items():
        rows = frame[(frame.location == place) & (frame.target == "block") & (frame["rank"] == 8)]
        draw_with_error(by_place, rows, {**style, "label": LOCATIONS[place]})
    by_place.set_title("The block's forced delta, one map of rank 8, by location")
    finish_shares(by_place)
    return figure


def finish_shares(axes: Axes) -> None:
    clip_shares(axes)
    axes.axhline(0, color=GREY, linewidth=1, label=REFERENCE)
    finish(axes, LAYER_LABEL, "explained, held out", 3, layers=True)


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    rows = frame[frame["rank"] == 8].dropna(subset=["explained_heldout"])
    if len(rows) and not frame.explained_fit.any():
        return NOTHING
    parts = []
    for location, target, words in (
        ("mlp_in", "down", "of the down projection's change, steered at the MLP's input"),
        ("mlp_in", "exact", "of the MLP's whole change, steered there"),
        ("pre_mlp", "block", "of the block's forced delta, steered before the MLP"),
        ("post_mlp", "block", "of the same, steered after the MLP"),
    ):
        found = rows[(rows.location == location) & (rows.target == target)].explained_heldout
        if found.notna().any():
            low, high = found.min(), found.max()
            parts.append(f"{found.median():.0%} {words} ({low:.0%} to {high:.0%})")
    if not parts:
        return "Not applicable: no tokens were sampled, or nothing changed."
    return (
        "One map of rank 8 for all tokens explains, on held-out tokens (median and range over "
        f"blocks), {'; '.join(parts)}. This is what an adapter can do; a free vector for every "
        "token is only a bound for it."
    )


SPEC = TableSpec(
    name="shared_reach",
    title="What one map before the MLP could reach",
    reading=(
        "1 − E‖v − J Δ‖² / E‖v‖² on held-out tokens, with one affine map Δ = B x + c for all "
        "tokens, fitted on others; J is each token's Jacobian. The band is one standard error "
        "over tokens. Quote this rather than the bound above."
    ),
    columns={
        "layer": "the block",
        "location": "where one map reads and adds: `mlp_in`, `pre_mlp`, `post_mlp` or `post_block`",
        "target": "from `mlp_in`: `down`, `exact`; from the others: `block`, the forced delta",
        "rank": "0, 1, 8, 32, `full`",
        "explained_fit": "`1 − E‖v − JΔ‖² / E‖v‖²` on sampled fit tokens",
        "explained_heldout": "the same on sampled held-out tokens",
        "explained_heldout_sem": "its standard error, over held-out tokens",
        "nonlinear_heldout": "the same Δ through the real function",
        "size": "`rms‖Δ‖ / rms‖x‖`",
        "n_fit": "sampled fit tokens (`--shared-sample`)",
        "n_heldout": "sampled held-out tokens (half as many)",
    },
    plot=plot,
    finding=finding,
    place=8,
)
