"""The table ``distributions``: how alike the models are beyond one path."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    BLACK,
    BLUE,
    ORANGE,
    add_reference,
    finish,
    house_style,
    log_scale,
    make_panels,
)
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import UNMEASURED, nats

MODELS: dict[str, dict[str, Any]] = {
    "base": {"color": BLACK, "marker": "o", "label": "base"},
    "recommended": {"color": BLUE, "marker": "s", "label": "recommended"},
    "runner-up": {"color": ORANGE, "marker": "^", "label": "runner-up"},
}
NATS = {
    "kl": "on the tuned model's\ngreedy tokens",
    "sampled_kl": "on samples of\nthe tuned model",
    "reverse_kl": "reversed, on samples\nof the model itself",
}
SHARES = {
    "agreement": "same most\nlikely token",
    "overlap": "overlap of\npredictions",
    "exact": "same greedy\nanswer",
}


@house_style("How alike the models are, beyond one path")
def plot(frame: pd.DataFrame) -> Figure:
    """Nats a token along three paths, and shares of agreement, one mark a model."""
    figure, (distances, shares) = make_panels(2)
    frame = frame[frame.phase == "all"]
    frame = frame.assign(overlap=1 - frame.total_variation, overlap_sem=frame.total_variation_sem)
    for place, (model, style) in enumerate(MODELS.items()):
        rows = frame[frame.model == model]
        if len(rows):
            _marks(distances, rows.iloc[0], list(NATS), place, style)
            _marks(shares, rows.iloc[0], list(SHARES), place, style)
    distances.set_title("Distance from the tuned model")
    log_scale(distances)
    shares.set_title("Agreement with the tuned model")
    add_reference(shares, 1, "the tuned model itself")
    for axes, names, label in (
        (distances, NATS, "nats per token"),
        (shares, SHARES, "share"),
    ):
        axes.set_xticks(range(len(names)), list(names.values()))
        axes.set_xlim(-0.5, len(names) - 0.5)
        finish(axes, "", label, drop=46)
    if shares.lines and shares.get_ylabel():
        shares.set_ylim(-0.04, 1.12)
    return figure


def _marks(axes: Axes, row: pd.Series, names: list[str], place: int, style: dict[str, Any]) -> None:
    """Draw one model's values side by side with those of others, whiskers one standard error."""
    at = np.arange(len(names)) + 0.16 * (place - 1)
    values, errors = (
        np.array([float(row[f"{name}{end}"]) for name in names]) for end in ("", "_sem")
    )
    given = np.isfinite(values)
    if given.any():
        errors = np.where(np.isfinite(errors), errors, 0.0)
        axes.errorbar(at[given], values[given], yerr=errors[given], linestyle="none",
                      markersize=7, elinewidth=1.3, **style)  # fmt: skip


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    rows = frame[frame.phase == "all"].set_index("model")
    if "base" not in rows.index or not np.isfinite(float(rows.sequence_kl["base"])):
        return UNMEASURED
    base = rows.loc["base"]
    if not rows[["kl", "sequence_kl", "reverse_sequence_kl"]].any(axis=None):
        return "Nothing changed: the models predict the same along every path."
    steered = rows.loc["recommended"] if "recommended" in rows.index else None

    def both(name: str, share: bool = False) -> str:
        without, *steering = (
            f"{row[name]:.0%}" if share else nats(row[name], row[f"{name}_sem"])
            for row in ((base,) if steered is None else (base, steered))
        )
        return f"{without} unsteered{''.join(f', {words} steered' for words in steering)}"

    return (
        "Nats of a whole sequence from the tuned model, along its own samples: "
        f"{both('sequence_kl')}; in the other direction, along the model's samples: "
        f"{both('reverse_sequence_kl')}. The most likely token is the tuned model's: "
        f"{both('agreement', True)}; the whole greedy answer: {both('exact', True)}. Held by the "
        f"tenth of the tokens with most nats: {both('top_tenth', True)}."
    )


_SEM = "its standard error, over prompts"
SPEC = TableSpec(
    name="distributions",
    title="Whole distributions, not one path",
    reading=(
        "Above, KL per token along the tuned model's greedy tokens, along continuations sampled "
        "from it at temperature 1, and, in the other direction, KL(x ‖ tuned) along those sampled "
        "from the model x itself. Overlap is 1 − total variation. Whiskers are one standard error "
        "over prompts, none of which chose the recommendation where there are enough of them."
    ),
    columns={
        "model": "`base`, `recommended` or `runner-up`: what is compared with the tuned model",
        "phase": "`all`, or, where there are several, tokens of `thinking` or `answer` alone",
        "n_prompts": "prompts",
        "n_tokens": "tokens that the tuned model generates greedily",
        "kl": "nats per token, `KL(tuned ‖ x)` along the tuned model's greedy tokens",
        "kl_sem": _SEM,
        "agreement": "share of these tokens where both models' most likely token is the same",
        "agreement_sem": _SEM,
        "total_variation": "`½ Σ |p − q|` over the vocabulary, mean over these tokens",
        "total_variation_sem": _SEM,
        "top_tenth": "share of the nats held by the tenth of these tokens that has most of them",
        "n_samples": "continuations sampled from each model, one a prompt",
        "sampled_kl": "nats per token, `KL(tuned ‖ x)` along samples of the tuned model",
        "sampled_kl_sem": _SEM,
        "sequence_kl": (
            "nats per sequence: the mean over samples of the tuned model of the sum of `KL(tuned ‖ "
            "x)`; unbiased for the KL of whole continuations, to their end or `new_tokens` tokens"
        ),
        "sequence_kl_sem": _SEM,
        "reverse_kl": "nats per token, `KL(x ‖ tuned)` along samples of x",
        "reverse_kl_sem": _SEM,
        "reverse_sequence_kl": "nats per sequence, likewise",
        "reverse_sequence_kl_sem": _SEM,
        "first_difference": (
            "index of the first token that differs in the two greedy answers, mean over prompts "
            "where one does"
        ),
        "exact": "share of prompts whose greedy answers are the same to the end",
        "exact_sem": _SEM,
    },
    plot=plot,
    finding=finding,
    place=1,
)
