"""The table ``task``: how often each model is right."""

import pandas as pd
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    BLUE,
    GREEN,
    clip_shares,
    drawn_heights,
    finish,
    house_style,
    make_panels,
)
from toolkit.tables.model_points import draw_models, draw_points, name_ticks
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import by_model, percent

NO_QUESTIONS = (
    "Not applicable: no questions were given (--task NAME or --answers FILE measures accuracy)."
)


@house_style("How often each model is right")
def plot(frame: pd.DataFrame) -> Figure:
    """Accuracy by model with its interval; and what each keeps and gains."""
    figure, (accuracy, parts) = make_panels(2, 3.2)
    draw_models(accuracy, frame, "accuracy", "accuracy_low", "accuracy_high")
    accuracy.set_title("Accuracy on the test questions, with its 95 % interval")
    if len(drawn_heights(accuracy)):
        accuracy.set_ylim(bottom=min(0.0, frame.accuracy_low.min()))
    finish(accuracy, "", "share of questions right", 1)
    places = pd.Series(range(len(frame)), frame.index)
    for column, shift, of, style in (
        ("kept", -0.08, "the base has right", {"color": BLUE, "marker": "o"}),
        ("gained", 0.08, "only the tuned model has right", {"color": GREEN, "marker": "^"}),
    ):
        none, label = [0.0] * len(frame), f"{column}: of what {of}"
        draw_points(parts, places + shift, frame[column], none, none, label=label, **style)
    parts.set_title("Right answers that each keeps and gains")
    name_ticks(parts, frame.model)
    clip_shares(parts)
    finish(parts, "", "share of those questions", 1)
    return figure


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    if not frame.accuracy.notna().any():
        return NO_QUESTIONS
    rows = by_model(frame)
    base, tuned = rows["base"], rows["tuned"]
    out = f" ({base['left_out']:.0f} that are documents of the data left out)"
    text = (
        f"Of {base['n_questions']:.0f} questions{out if base['left_out'] else ''} the base answers "
        f"{base['accuracy']:.1%} rightly and the tuned model {tuned['accuracy']:.1%}"
    )
    ours = rows.get("recommended")
    if ours is None:
        return f"{text}; no adapters were recommended."
    points = [100 * ours[f"difference{end}"] for end in ("", "_low", "_high")]
    difference = "{:+.1f} points to the tuned model, 95 % interval {:+.1f} to {:+.1f}"
    parts = [
        f"{verb} {percent(ours[name])} of the {ours[f'{name}_of']:.0f} that {whose}"
        for name, verb, whose in (
            ("kept", "keep", "the base has right"),
            ("gained", "gain", "only the tuned model has right"),
        )
        if ours[f"{name}_of"]
    ]
    said = f"; they {' and '.join(parts)}" if parts else ""
    found = difference.format(*points).replace("-", "−")
    return f"{text}; with the recommended adapters it is {ours['accuracy']:.1%} ({found}){said}."


SPEC = TableSpec(
    name="task",
    title="How often each model is right",
    reading=(
        "Greedy answers to test questions, none of which is a document of the data. A difference's "
        "interval is paired: the bootstrap draws questions. An accuracy can stay level while "
        "answers change: kept counts the questions that the base had right, gained those that the "
        "tuned model alone has right."
    ),
    columns={
        "model": "`base`, `tuned`, `recommended` or `runner-up`",
        "accuracy": "share of the questions that it answers rightly, greedily",
        "accuracy_low": "lower end of its 95 % interval (percentile bootstrap over questions)",
        "accuracy_high": "upper end of the same",
        "difference": "`accuracy` less that of the tuned model",
        "difference_low": "lower end of its paired 95 % interval (bootstrap over questions)",
        "difference_high": "upper end of the same",
        "kept": "share that it has right of the questions that the base has right",
        "kept_of": "the number of those questions",
        "gained": "share that it has right of those that the tuned model has right, the base not",
        "gained_of": "the number of those questions",
        "right": "number of questions that it answers rightly",
        "n_questions": "questions that were asked",
        "left_out": "test questions that were not asked since they are documents of the data",
    },
    plot=plot,
    finding=finding,
    place=15,
)
