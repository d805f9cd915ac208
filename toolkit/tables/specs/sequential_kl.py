"""The table ``sequential_kl``: divergence along the generation."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from toolkit.tables.drawing import (
    BLACK,
    FIT_STYLE,
    ORANGE,
    PURPLE,
    add_band,
    draw_line,
    drawn_heights,
    finish,
    house_style,
    make_panels,
)
from toolkit.tables.series import rank_words, sorted_ranks
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import UNMEASURED


@house_style("Divergence from the tuned model, token by token")
def plot(frame: pd.DataFrame) -> Figure:
    """KL from the tuned model by generated token, for none, oracle and fits in all blocks."""
    figure, panels = make_panels(2, 3.3)
    titles = {
        "tuned": "KL from the tuned model, on the tuned model's tokens",
        "own": "The same, on each model's own tokens",
    }
    frame = frame[(frame.layers == "all") & frame.location.isin(["", "post_block"])]
    for axes, (forcing, title) in zip(panels, titles.items(), strict=True):
        axes.set_title(title)
        for label, rows, style in _curves(frame[frame.forcing == forcing]):
            add_band(axes, rows.token_index, rows.kl_mean - rows.kl_sem, rows.kl_mean + rows.kl_sem,
                  style["color"])  # fmt: skip
            draw_line(axes, rows, "token_index", "kl_mean", label=label, **style)
        _nats_scale(axes)
        finish(axes, "generated token (from 0)", "nats per token", 2, layers=True)
    return figure


def _curves(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, dict[str, Any]]]:
    """(label, rows, style): no steering, the oracle, and each fit at one small rank."""
    for kind, label, style in (
        ("none", "no steering (base model)", {"color": BLACK, "linestyle": "-"}),
        ("oracle", "oracle (tuned states written in)", {"color": PURPLE, "linestyle": "-."}),
    ):
        rows = frame[frame.kind == kind].sort_values("token_index")
        if len(rows):
            yield label, rows, style
    linear = frame[frame.kind == "linear"]
    small = [rank for rank in sorted_ranks(linear["rank"]) if rank != "full" and rank <= 8]
    wanted = [(fit, rank) for fit in FIT_STYLE for rank in small[-1:]]
    for fit, rank in [*wanted, ("free", "full")]:
        rows = linear[(linear.fit == fit) & (linear["rank"] == rank)].sort_values("token_index")
        if len(rows):
            apart = {"linestyle": (0, (5, 1, 1, 1)), "color": ORANGE} if rank == "full" else {}
            yield f"{fit}, {rank_words(rank)}", rows, FIT_STYLE[fit] | apart


def _nats_scale(axes: Axes) -> None:
    """Logarithmic down to zero, so that huge and tiny values read; linear within a decade."""
    heights = drawn_heights(axes)
    top = heights.max(initial=0.0)
    if top <= 0:
        return
    axes.set_ylim(bottom=0)
    shown = heights[heights > 1e-5 * top]  # the oracle's curve is 0 but for rounding
    if np.quantile(shown, 0.05) < 0.1 * top:
        floor = 10 ** np.floor(np.log10(np.quantile(shown, 0.02)))
        axes.set_yscale("symlog", linthresh=floor, linscale=0.5)
        axes.set_ylim(bottom=-0.1 * floor)
        axes.yaxis.set_minor_locator(NullLocator())


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    tuned = frame[frame.forcing == "tuned"]
    base = tuned[tuned.kind == "none"]
    if not base.kl_mean.notna().any():
        return UNMEASURED
    if not base.kl_mean.any():
        return "Nothing changed: every model says the same with the same certainty."

    def mean(fit: str, rank: Any) -> float | None:
        rows = tuned[
            (tuned.location == "post_block")
            & (tuned.fit == fit)
            & (tuned["rank"] == rank)
            & (tuned.layers == "all")
        ]
        return _weighted(rows) if len(rows) else None

    shown = [("free", 8), ("free", "full"), ("forced", 8), ("sequential", 8)]
    nats = {(fit, rank): mean(fit, rank) for fit, rank in shown}
    parts = [
        f"{value:.3g} with the {fit} {'full-rank fit' if rank == 'full' else f'fit of rank {rank}'}"
        for (fit, rank), value in nats.items()
        if value is not None
    ]
    oracle = _weighted(tuned[tuned.kind == "oracle"])
    free, forced = nats["free", 8], nats["forced", 8]
    overshoots = free is not None and forced is not None and free > forced
    why = " The free fit adds at every block what earlier blocks were already steered to supply."
    return (
        f"The base model is {_weighted(base):.3g} nats per generated token from the tuned one; "
        f"post-block in all blocks it is {', '.join(parts)}, and {oracle:.1e} with the "
        f"oracle.{why if overshoots else ''}"
    )


def _weighted(rows: pd.DataFrame) -> float:
    """The mean over all tokens: every prompt that reaches an index counts once there."""
    return float((rows.kl_mean * rows.n_prompts).sum() / rows.n_prompts.sum())


SPEC = TableSpec(
    name="sequential_kl",
    title="Divergence along the generation",
    reading=(
        "KL(tuned ‖ x) in nats at each generated token, mean over held-out prompts. Under tuned "
        "forcing all models read the tuned model's tokens; under own forcing each reads its own, "
        "so that after the first differing token they are asked about different texts."
    ),
    columns={
        "location": "as in `steerability.csv`",
        "kind": "as in `steerability.csv`",
        "rank": "as in `steerability.csv`",
        "fit": "as in `steerability.csv`",
        "layers": "as in `steerability.csv`",
        "forcing": "`tuned`: all models read the tuned model's tokens; `own`: each its own",
        "token_index": "index of the generated token, from 0",
        "kl_mean": "nats, mean over prompts",
        "kl_sem": "nats, standard error over prompts",
        "n_prompts": "prompts that reach this index; fewer later on",
        "target": (
            "what the adapter is fitted to supply: `own`, what is missing where it adds; `block`, "
            "before the MLP what is missing after the block, fitted through the MLP"
        ),
    },
    plot=plot,
    finding=finding,
    place=1,
)
