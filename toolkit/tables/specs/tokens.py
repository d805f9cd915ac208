"""The table ``tokens``: the tokens that hold most of the difference."""

import pandas as pd
from matplotlib.figure import Figure

from toolkit.tables.drawing import BLACK, BLUE, GREY, draw_line, finish, house_style, make_panels
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import UNMEASURED

EVEN = "if all tokens had as much"
LISTS = {
    "changed": {"color": BLACK, "marker": "o", "label": "what fine-tuning changed"},
    "left": {"color": BLUE, "marker": "s", "label": "what steering leaves"},
}


@house_style("How few tokens hold the difference")
def plot(frame: pd.DataFrame) -> Figure:
    """Draw the cumulative share of the nats over tokens, those with most of them first."""
    figure, (axes,) = make_panels(1)
    for of, style in LISTS.items():
        rows = frame[frame["of"] == of].sort_values("place")
        if len(rows):
            n = int(rows.n_tokens.max()) if rows.n_tokens.notna().all() else len(rows)
            label = f"{style['label']} (of {n} tokens)"
            held = pd.DataFrame({"place": rows.place, "held": rows.share.cumsum()})
            draw_line(axes, held, "place", "held", **{**style, "label": label})
    if frame.n_tokens.max() > 0:
        even = [0, frame.place.max() / frame.n_tokens.max()]
        axes.plot([0, frame.place.max()], even, color=GREY, linestyle=":", label=EVEN)
    axes.set_title("How few tokens hold the difference")
    axes.set_ylim(0, 1.04)
    finish(axes, "number of tokens, those with most first", "share of all nats", 1)
    return figure


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    if not frame.nats.notna().any():
        return UNMEASURED
    if not frame.nats.any():
        return "Nothing changed: no token has a distance."
    parts = []
    for of, name in (("changed", "fine-tuning changed"), ("left", "steering leaves")):
        rows = frame[frame["of"] == of].sort_values("place")
        if not rows.nats.any():
            continue
        held = rows.share.cumsum()
        third = held[held >= 1 / 3]
        n = rows.place[third.index[0]] if len(third) else len(rows)
        share = third.iloc[0] if len(third) else held.iloc[-1]
        parts.append(
            f"{n:.0f} of {rows.n_tokens.iloc[0]:.0f} tokens hold {share:.0%} of what {name} (most "
            f"in the token {rows.token.iloc[0]} of prompt {rows.prompt.iloc[0]:.0f}, "
            f"{rows.nats.iloc[0]:.2g} nats)"
        )
    return f"{'; '.join(parts)}."


SPEC = TableSpec(
    name="tokens",
    title="Where it sits: tokens",
    reading=(
        "KL(tuned ‖ base), what fine-tuning changed, and KL(tuned ‖ steered), what the recommended "
        "steering leaves, at each of the tuned model's greedy tokens on the reporting prompts. A "
        "curve that rises at once says that few tokens decide; the table names them."
    ),
    columns={
        "of": "`changed`: by KL(tuned ‖ base); `left`: by KL(tuned ‖ recommended)",
        "place": "1 has the most nats; 40 tokens of each list at most",
        "prompt": "number of the prompt, as in `prompts.csv`",
        "token_index": "index of the generated token, from 0",
        "token": "what the tuned model generates there, in quotes",
        "phase": "`thinking` or `answer`",
        "nats": "nats at this token",
        "share": "of the nats of all tokens",
        "n_tokens": "tokens in all",
        "context": "the twelve tokens before it, in quotes",
        "next_tuned": "the tuned model's five most likely next tokens, with their probabilities",
        "next_base": "the base model's",
        "next_steered": "those of the base model under the recommended steering",
    },
    plot=plot,
    finding=finding,
    place=1,
)
