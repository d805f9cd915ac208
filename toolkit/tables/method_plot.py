"""Methods of adaptation beside each other: accuracy with its interval, and what each costs."""

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from toolkit.tables.drawing import BLACK, GREY, LOCATION_STYLE, PURPLE, STYLE, WIDTH, Plot

HEADS = {"color": PURPLE, "marker": "D"}
WEIGHTS = {"color": BLACK, "marker": "P"}


def methods(frame: pd.DataFrame, chance: float | None = None) -> Figure:
    """Accuracy of every method, the best on top; whiskers are 95 % intervals.

    Colours and markers say where a method acts. The base model and chance are lines.
    """
    with matplotlib.rc_context(STYLE):
        rows = frame[frame.kind != "none"].sort_values("accuracy").reset_index(drop=True)
        figure = Plot(figsize=(WIDTH, 1.3 + 0.34 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, row in rows.iterrows():
            style = _style(row)
            whisker = [[row.accuracy - row.accuracy_low], [row.accuracy_high - row.accuracy]]
            filled = "white" if row.kind in ("tuned",) else style["color"]
            axes.errorbar(row.accuracy, place, xerr=whisker, fmt=style["marker"], markersize=7,
                          color=style["color"], markerfacecolor=filled, elinewidth=1.3)  # fmt: skip
        axes.set_yticks(range(len(rows)), [_label(row) for _, row in rows.iterrows()])
        _line(axes, frame[frame.kind == "none"].accuracy.mean(), "base")
        if chance is not None:
            _line(axes, chance, "chance")
        axes.set(xlabel="accuracy on test questions (95 % interval)")
        axes.set_title("Accuracy, by method and size")
        axes.grid(axis="y", visible=False)
        axes.set_ylim(-0.7, len(rows) - 0.3)
    return figure


def _label(row: pd.Series) -> str:
    return f"{row.method}   {row.parameters:,}"


def _style(row: pd.Series) -> dict[str, str]:
    if row.location == "heads":
        return HEADS
    return LOCATION_STYLE.get(row.location, WEIGHTS)


def _line(axes, value: float, words: str) -> None:
    if value == value:
        axes.axvline(value, color=GREY, linewidth=1)
        axes.annotate(
            words, (value, 0), xycoords=("data", "axes fraction"), xytext=(3, 4), rotation=90,
            textcoords="offset points", color="#555555", fontsize=10.5,
        )  # fmt: skip
