"""The table ``prompts``: the prompts that hold most of the difference."""

import pandas as pd
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    BLACK,
    BLUE,
    draw_line,
    finish,
    house_style,
    log_scale,
    make_panels,
)
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import UNMEASURED


@house_style("Which prompts hold the difference")
def plot(frame: pd.DataFrame) -> Figure:
    """Draw each prompt's nats, base and steered, in the order of the base's."""
    figure, (axes,) = make_panels(1)
    rows = frame.sort_values("base", ascending=False, kind="stable").assign(
        order=range(1, len(frame) + 1)
    )
    for name, label, color, marker in (
        ("base", "no steering (what fine-tuning changed)", BLACK, "o"),
        ("steered", "recommended (what steering leaves)", BLUE, "s"),
    ):
        draw_line(axes, rows, "order", name, color=color, marker=marker, label=label,
                  linestyle=":")  # fmt: skip
    axes.set_title("Which prompts hold the difference")
    log_scale(axes)
    finish(axes, "prompts, that with most nats first", "nats per answer", 1, layers=True)
    return figure


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    if not frame.base.notna().any():
        return UNMEASURED
    if not frame.base.any():
        return "Nothing changed: no prompt has a distance."
    most = frame.loc[frame.base.idxmax()]
    said = (
        f"Of {len(frame)} prompts, number {most.prompt:.0f} holds {most.base_share:.0%} of what "
        "fine-tuning changed"
    )
    if frame.steered.any() and frame.steered.notna().any():
        left = frame.loc[frame.steered.idxmax()]
        said += f", number {left.prompt:.0f} {left.steered_share:.0%} of what steering leaves"
    return f"{said}."


SPEC = TableSpec(
    name="prompts",
    title="Where it sits: prompts",
    reading=(
        "The nats of tokens.csv, of all tokens, summed over each prompt's answer. A prompt whose "
        "two marks are close is one that steering does little for."
    ),
    columns={
        "prompt": "number of the prompt, from 0, in the order of the documents",
        "text": "the prompt, in quotes",
        "n_tokens": "tokens that the tuned model generates greedily",
        "base": "nats, the sum of KL(tuned ‖ base) over them",
        "base_share": "of the nats of all prompts",
        "steered": "nats, the sum of KL(tuned ‖ recommended) over them",
        "steered_share": "of the nats of all prompts",
    },
    plot=plot,
    finding=finding,
    place=1,
)
