"""Divergence from the tuned model by generated token, and why the linearised oracle looked bad.

Fits of rank 8 after every block: free (the post's linearised oracle: the difference of the two
models' own states, fitted at every block), forced and sequential; and a ReFT that was trained on
the task. On the tuned model's tokens; on each model's own tokens, as published (Llama-3.2-1B, read
off the post's plot); and, below, how far the steered state is from the tuned one, block by block:
the free fit adds the changes of all earlier blocks again at every block.
"""

from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toolkit.jobs.figures import PAIRS
from toolkit.tables.drawing import (
    BLACK,
    FIT_STYLE,
    GREY,
    LAYER_LABEL,
    PURPLE,
    STYLE,
    add_band,
    add_reference,
    draw_line,
    finish,
    log_scale,
    make_panels,
)

COMMAND = "python data/recipes/sequential_kl.py "
MADE_BY = (
    COMMAND + "--base SmolLM2-135M-Instruct --tuned data/smollm2-gsm8k-lora "
    "--trained data/smollm2-gsm8k-reft --out data/sequential-kl/smollm2",
    COMMAND + "--base gemma-3-270m --tuned data/gemma3-gsm8k-lora "
    "--out data/sequential-kl/gemma3 --new-tokens 24",
)
LINES = {
    "none": {"color": BLACK, "linestyle": "-", "marker": "D", "label": "no steering"},
    "free": FIT_STYLE["free"] | {"marker": "v", "label": "free fit (linearised oracle)"},
    "forced": FIT_STYLE["forced"] | {"marker": "s", "label": "forced fit"},
    "sequential": FIT_STYLE["sequential"] | {"marker": "o", "label": "sequential fit"},
    "trained": {"color": PURPLE, "linestyle": "-.", "marker": "^", "label": "ReFT, trained"},
}
PUBLISHED = {
    "reft": {"color": GREY, "linestyle": "-.", "label": "ReFT (published)"},
    "linear_oracle": {"color": GREY, "linestyle": ":", "label": "linearised oracle (published)"},
}


def draw(data: Path) -> dict[str, Figure]:
    published = pd.read_csv(data / "published" / "sequential_kl.csv")
    with matplotlib.rc_context(STYLE):
        return {name: _pair(data / "sequential-kl", name, published) for name in PAIRS}


def _pair(folder: Path, name: str, published: pd.DataFrame) -> Figure:
    frame, drift = (pd.read_csv(folder / f"{name}{kind}.csv") for kind in ("", "-drift"))
    frame["fit"] = frame.fit.where(frame.kind != "none", "none")
    figure, (tuned, own, way) = make_panels(3, 3.9)
    figure.suptitle(PAIRS[name].name, fontsize=11.5, color=GREY)
    _curves(tuned, frame[frame.forcing == "tuned"])
    tuned.set_title("On the tuned model's tokens")
    for column, style in PUBLISHED.items():
        shown = published[published[column] > 0]
        draw_line(own, shown, "token_index", column, **style)
    _curves(own, frame[frame.forcing == "own"])
    own.set_title("On each model's own tokens, as in the post")
    for axes in (tuned, own):
        log_scale(axes)
        finish(axes, "generated token (from 0)", "KL, nats per token", 2, layers=True)
    for fit, rows in drift.groupby("fit", sort=False):
        draw_line(way, rows, "layer", "missed", **LINES[fit])
    log_scale(way)
    add_reference(way, 1, "no steering")
    way.set_title("Distance of the steered state from the tuned one")
    finish(way, LAYER_LABEL, "of base's distance", 2, layers=True)
    return figure


def _curves(axes: Axes, frame: pd.DataFrame) -> None:
    for fit, style in LINES.items():
        rows = frame[frame.fit == fit].sort_values("token_index")
        low, high = rows.kl_mean - rows.kl_sem, rows.kl_mean + rows.kl_sem
        add_band(axes, rows.token_index, low.clip(lower=1e-4), high, style["color"])
        draw_line(axes, rows, "token_index", "kl_mean", **style)
