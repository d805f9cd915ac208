"""The table ``response_loss``: what each model loses on the documents' responses."""

import pandas as pd
from matplotlib.figure import Figure

from toolkit.tables.drawing import finish, house_style, make_panels
from toolkit.tables.model_points import draw_models
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import by_model, plus_minus

NO_RESPONSES = "Not applicable: none of the documents that report has a response."


@house_style("Loss on the documents' responses")
def plot(frame: pd.DataFrame) -> Figure:
    """Loss by model, and how far each is from the tuned one."""
    figure, (loss, difference) = make_panels(2, 3.0)
    for axes, column in ((loss, "loss"), (difference, "difference")):
        sem = frame[f"{column}_sem"]
        ends = {"low": frame[column] - sem, "high": frame[column] + sem}
        draw_models(axes, frame.assign(**ends), column, "low", "high")
    loss.set_title("Loss on held-out responses, ± one standard error")
    finish(loss, "", "nats a token", 1)
    difference.set_title("The same less that of the tuned model, paired")
    finish(difference, "", "nats a token", 1)
    return figure


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    if not frame.loss.notna().any():
        return NO_RESPONSES
    rows = by_model(frame)
    base, tuned = rows["base"], rows["tuned"]
    text = (
        f"On the responses of {base['n_documents']:.0f} held-out documents the base loses "
        f"{base['loss']:.3f} nats a token and the tuned model {tuned['loss']:.3f}"
    )
    ours = rows.get("recommended")
    if ours is not None:
        text += f"; with the recommended adapters it is {ours['loss']:.3f}"
        if ours["closed"] == ours["closed"]:
            share = plus_minus(ours["closed"], ours["closed_sem"])
            return f"{text}, which closes {share} of the gap."
    if base["difference"] <= 0:
        text += "; there is no gap to close: the tuned model does not lose less than the base"
    return f"{text}."


SPEC = TableSpec(
    name="response_loss",
    title="Loss on the documents' responses",
    reading=(
        "The mean of −log p over the tokens of the responses that held-out documents have, each "
        "model reading prompt and response. Nothing is generated: it asks what the documents say, "
        "not what the tuned model would."
    ),
    columns={
        "model": "`base`, `tuned`, `recommended` or `runner-up`",
        "loss": "mean of `−log p` over the responses' tokens, nats a token",
        "loss_sem": "its standard error, over documents",
        "difference": "`loss` less that of the tuned model, nats a token",
        "difference_sem": "its standard error over documents, paired",
        "closed": (
            "`1 − (loss − loss_tuned) / (loss_base − loss_tuned)`: 1 the tuned model, 0 the base; "
            "empty where the tuned model's loss is not below the base's"
        ),
        "closed_sem": "standard error of `closed`, over documents",
        "n_documents": "held-out documents with a response, of those that report",
        "n_tokens": "tokens of their responses",
    },
    plot=plot,
    finding=finding,
    place=16,
)
