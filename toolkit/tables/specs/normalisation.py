"""The table ``normalisation``: what the norms let through."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    BLACK,
    BLUE,
    GREEN,
    LAYER_LABEL,
    VERMILLION,
    draw_line,
    finish,
    house_style,
    log_scale,
    make_panels,
)
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import NO_PATH


@house_style("What the norms do to a small change")
def plot(frame: pd.DataFrame) -> Figure:
    """Relative gains of the norms around the MLP, by layer."""
    figure, (axes,) = make_panels(1, 4.0)
    drawn: dict[str, dict[str, Any]] = {
        "norm_gain": {"color": BLUE, "marker": "o", "label": "norm before the MLP, any direction"},
        "radial_gain": {"color": VERMILLION, "marker": "v", "linestyle": ":",
                        "label": "the same, the stream's own direction"},
        "post_gain": {"color": GREEN, "marker": "^", "linestyle": "-.",
                      "label": "norm after the MLP"},
        "attention_share": {"color": BLACK, "marker": "s", "linestyle": "--",
                            "label": "attention's contribution / stream"},
    }  # fmt: skip
    for name, style in drawn.items():
        draw_line(axes, frame, "layer", name, **style)
    axes.set_title("A 1% change of the stream, seen after the norm (%)")
    log_scale(axes)
    finish(axes, LAYER_LABEL, "relative gain (no unit)", 1, layers=True)
    return figure


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    frame = frame.dropna(subset=["norm_gain"])
    if frame.empty:
        return NO_PATH
    low, high = frame.norm_gain.min(), frame.norm_gain.max()
    return (
        f"A change of 1% of the stream becomes one of {low:.2g}% to {high:.2g}% of the MLP's input;"
        f" along the stream itself of at most {frame.radial_gain.max():.1e}%: the norm takes that "
        f"out. Attention contributes {frame.attention_share.min():.1%} to "
        f"{frame.attention_share.max():.0%} of the stream."
    )


SPEC = TableSpec(
    name="normalisation",
    title="What the norms let through",
    reading=(
        "The size of a change after a norm, relative to the state there, over its size before, "
        "relative to the state before; root mean square over directions, median over tokens."
    ),
    columns={
        "layer": "the block",
        "norm_gain": (
            "relative size of a change after the MLP's norm over that before it, "
            "rms over directions"
        ),
        "radial_gain": "the same for a change along the stream itself; RMSNorm takes it out",
        "post_gain": "the same for a norm after the MLP (Gemma-2/3, OLMo-2); 1 elsewhere",
        "attention_share": "`‖pre_mlp‖ / ‖stream‖`",
        "n_tokens": "sampled tokens",
    },
    plot=plot,
    finding=finding,
    place=11,
)
