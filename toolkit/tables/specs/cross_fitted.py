"""The table ``cross_fitted``: what forced maps recover where every document judges."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    EDGE,
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
from toolkit.tables.model_points import draw_points, name_ticks
from toolkit.tables.series import rank_words, sorted_ranks
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import NAMES, NOTHING, share_words

NOT_ASKED = "Not applicable: maps were not fitted by folds (--cross-fit 5 does so)."


@house_style("What forced maps recover, judged by every document")
def plot(frame: pd.DataFrame) -> Figure:
    """Draw what is recovered by rank and place, with its interval."""
    figure, (axes,) = make_panels(1, 4.0)
    ranks = sorted_ranks(frame["rank"])
    for index, (location, rows) in enumerate(by_location(frame, "location")):
        style = LOCATION_STYLE[location] | {"label": LOCATIONS[location]}
        places = [ranks.index(rank) + 0.12 * (index - 1) for rank in rows["rank"]]
        value, far = rows.recovered, rows.recovered < LOWEST
        below, above = value - rows.recovered_low, rows.recovered_high - value
        drawn = (value.mask(far, EDGE), below.mask(far, 0), above.mask(far, 0))
        draw_points(axes, places, *drawn, **style)
        for place, number, out in zip(places, value, far, strict=True):
            if out:
                number_at_edge(axes, place, number, style["color"])
    axes.set_title("Recovered by forced maps, judged by every document")
    name_ticks(axes, [rank_words(rank) for rank in ranks])
    clip_shares(axes)
    if len(drawn_heights(axes)):
        add_reference(axes, 1, "the tuned model")
    finish(axes, "", "recovered, with its 95 % interval", 3)
    return figure


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    if not frame.recovered.notna().any():
        return NOT_ASKED
    if not frame.base_kl.any():
        return NOTHING.replace("delta", "divergence")
    said = []
    for location, rows in by_location(frame, "location"):
        parts = [_words(row) for row in rows.to_dict("records")]
        said.append(f"{NAMES[location]} {', '.join(parts)}")
    return (
        f"On the prompts of {frame.n_prompts.max():.0f} documents, fit and held-out ones, forced "
        "maps that a document's own fold had no part in recover (95 % intervals in brackets): "
        f"{'; '.join(said)}."
    )


def _words(row: dict[Any, Any]) -> str:
    size = f"rank {row['rank']}" if row["rank"] else "a vector"
    said = f"{share_words(row['recovered'])} with {size}"
    if pd.isna(row["recovered_low"]):  # of one prompt
        return said
    low, high = share_words(row["recovered_low"]), share_words(row["recovered_high"])
    return f"{said} ({low} to {high})"


SPEC = TableSpec(
    name="cross_fitted",
    title="What forced maps recover, judged by every document",
    reading=(
        "All documents, fit and held-out ones, are dealt into folds by their content. Forced maps "
        "are fitted on all folds but one, and judged on the prompts of that one; so every document "
        "judges, and none judges a map that it had a part in. Beside the forced fits of the first "
        "section, which few held-out prompts judge, look at the width of the intervals. Maps of "
        "two folds share most of their documents, which intervals over prompts do not count."
    ),
    columns={
        "location": "`pre_mlp`, `post_mlp` or `post_block`",
        "kind": "`vector` or `linear`",
        "rank": "rank of the maps, one in every block; 0 for a vector",
        "recovered": "`1 − KL(tuned ‖ steered) / KL(tuned ‖ base)` over the prompts of all folds",
        "recovered_sem": "its standard error, over prompts (jackknife)",
        "recovered_low": "lower end of its 95 % interval (t over prompts)",
        "recovered_high": "upper end of the same",
        "kl": "`KL(tuned ‖ steered)`, nats a token, along the tuned model's greedy tokens",
        "base_kl": "`KL(tuned ‖ base)` along the same tokens",
        "n_prompts": "prompts that judged: of every document, or of `--max-prompts` a fold",
    },
    plot=plot,
    finding=finding,
    place=18,
)
