"""The table ``elsewhere``: what happens to prompts that the fine-tune is not about."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    EDGE,
    LOWEST,
    add_reference,
    clip_shares,
    drawn_heights,
    finish,
    house_style,
    log_scale,
    make_panels,
)
from toolkit.tables.model_points import MODEL_STYLE, draw_points, name_ticks
from toolkit.tables.spec import TableSpec
from toolkit.tables.words import NOTHING, OWN_PROMPTS, by_model, plus_minus

NO_PROMPTS = "Not applicable: no prompts from elsewhere were given (--elsewhere FILE)."


@house_style("Elsewhere")
def plot(frame: pd.DataFrame) -> Figure:
    """Distances from tuned and from base, and what is recovered, by file."""
    figure, (tuned, base, share) = make_panels(3, 3.0)
    _by_file(tuned, frame[frame.model != "tuned"], "kl")
    tuned.set_title("How far each model is from the tuned one")
    _by_file(base, frame[frame.model != "base"], "kl_base")
    base.set_title("How far each model is from the base")
    for axes in (tuned, base):
        log_scale(axes)
        finish(axes, "", "nats a token", 3)
    steered = frame[~frame.model.isin(["base", "tuned"])]
    far = steered.recovered < LOWEST
    columns = ("recovered", "recovered_low", "recovered_high")
    edge = {column: steered[column].mask(far, EDGE) for column in columns}
    _by_file(share, steered.assign(**edge), "recovered", ("recovered_low", "recovered_high"))
    share.set_title("Recovered, with its 95 % interval")
    if far.any():
        words = f"at the edge: below {LOWEST:g}".replace("-", "−")
        share.text(0.01, 0.03, words, transform=share.transAxes, fontsize="small")
    clip_shares(share)
    if len(drawn_heights(share)):
        add_reference(share, 1, "the tuned model")
    finish(share, "", "recovered", 2)
    return figure


def _by_file(
    axes: Axes, frame: pd.DataFrame, column: str, interval: tuple[str, str] | None = None
) -> None:
    files, models = list(frame.file.unique()), list(frame.model.unique())
    for index, model in enumerate(models):
        rows = frame[frame.model == model]
        value = rows[column]
        if interval:
            below, above = value - rows[interval[0]], rows[interval[1]] - value
        else:
            below = above = rows[f"{column}_sem"]
        places = [files.index(file) + 0.12 * (index - (len(models) - 1) / 2) for file in rows.file]
        draw_points(axes, places, value, below, above, label=model, **MODEL_STYLE[model])
    name_ticks(axes, files)


def finding(frame: pd.DataFrame) -> str:
    """Say what the table shows, in a sentence with its numbers."""
    away = frame[frame.file != OWN_PROMPTS]
    if not away.kl.notna().any():
        return NO_PROMPTS
    if not away.kl.any():
        return NOTHING.replace("delta", "divergence")
    home = by_model(frame[frame.file == OWN_PROMPTS])
    here = f" (here {home['base']['kl']:.3g})" if home else ""
    said = []
    for file, rows in away.groupby("file", sort=False):
        models = by_model(rows)
        base, ours = models["base"], models.get("recommended")
        text = (
            f"On {base['n_prompts']:.0f} prompts of {file} fine-tuning moved the model by "
            f"{base['kl']:.3g} nats a token{here}"
        )
        if ours is not None:
            share = plus_minus(ours["recovered"], ours["recovered_sem"])
            own = f" (here {plus_minus(home['recommended']['recovered'], None)})" if home else ""
            text += f", and the recommended adapters by {ours['kl_base']:.3g}"
            if ours["recovered"] < LOWEST:
                text += f", to {ours['kl']:.3g} from the tuned model: there is little to recover"
            else:
                text += f": they recover {share}{own}"
        said.append(text)
    return f"{'. '.join(said)}."


SPEC = TableSpec(
    name="elsewhere",
    title="Prompts that the fine-tune is not about",
    reading=(
        "KL along the tokens that the tuned model generates from prompts of --elsewhere. A small "
        "distance of tuned from base says that fine-tuning stayed where it belongs; adapters that "
        "recover much there do what it did, wanted or not."
    ),
    columns={
        "file": f"the file of prompts; `{OWN_PROMPTS}` are those of the run that report",
        "model": "`base`, `tuned`, `recommended` or `runner-up`: x",
        "kl": "`KL(tuned ‖ x)`, nats a token, along the tuned model's greedy tokens",
        "kl_sem": "its standard error, over prompts",
        "kl_base": "`KL(base ‖ x)`, nats a token, along the same tokens",
        "kl_base_sem": "its standard error, over prompts",
        "recovered": "`1 − KL(tuned ‖ x) / KL(tuned ‖ base)` on these prompts",
        "recovered_sem": "its standard error, over prompts",
        "recovered_low": "lower end of its 95 % interval (t over prompts)",
        "recovered_high": "upper end of the same",
        "n_prompts": "prompts, the first 24 of the file",
        "n_tokens": "generated tokens that count",
    },
    plot=plot,
    finding=finding,
    place=17,
)
