"""Short trainings beside each other: what each takes off the loss, by place and size."""

from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from toolkit.tables.drawing import BLACK, LOCATION_STYLE, LOCATIONS, PURPLE, STYLE, WIDTH, Plot


def gains(frame: pd.DataFrame, chosen: str | None = None) -> Figure:
    """Draw the gain of every trial over the number of its parameters, with its standard error.

    Colours and markers say where it acts; `chosen` has a ring around it.
    """
    with matplotlib.rc_context(STYLE):
        rows = frame[frame.kind != "none"]
        figure = Plot(figsize=(WIDTH, 4.2), layout="constrained")
        axes = figure.subplots()
        for index, (place, some) in enumerate(rows.groupby("location", sort=False)):
            some = some.sort_values("parameters")
            aside = some.parameters * 1.03**index  # bars of one size stand beside each other
            axes.errorbar(aside, some.gain, some.gain_sem, markersize=7, **_style(str(place)))
            rings = some.method == chosen
            axes.plot(aside[rings], some.gain[rings], "o", ms=17, fillstyle="none", color=BLACK)
        axes.axhline(0, color="#555555", linewidth=1)
        axes.set_xscale("log")
        axes.set(xlabel="parameters", ylabel="nats a token")
        axes.set_title("Estimate: what a short training takes off\nthe loss of held-out responses")
        axes.legend(loc="best")
    return figure


def _style(place: str) -> dict[str, Any]:
    if place == "heads":
        return {"color": PURPLE, "marker": "D", "label": "heads"}
    if not place:
        return {"color": BLACK, "marker": "P", "label": "LoRA", "linestyle": "none"}
    return {**LOCATION_STYLE[place], "label": LOCATIONS[place]}
