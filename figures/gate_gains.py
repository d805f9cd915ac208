"""The two gains of a gated MLP in a Llama and in a Gemma: how large they are, and where.

|σ'(a_g) ⊙ a_u| and |σ(a_g)| are what a small change of the MLP's input is multiplied by, neuron by
neuron, on its way through the gate and through the up projection. Base models, on a dozen GSM8K
documents: first all blocks together, then each block's median, shaded over the middle half. The
peaks of |σ| are the depths of the activations' own minima, 0.28 (SiLU) and 0.17 (GELU).
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from toolkit.jobs.figures import PAIRS
from toolkit.tables.drawing import STYLE, add_band, draw_line, finish, log_scale, make_panels

MADE_BY = ("python data/recipes/gate_gains.py --out data/gate-gains",)
NAMES = {"gate": "$|\\sigma'(a_g) \\odot a_u|$", "up": "$|\\sigma(a_g)|$"}
THROUGH = {"gate": "gain through the gate, ", "up": "gain through the up projection, "}


def draw(data: Path) -> Figure:
    histogram = pd.read_csv(data / "gate-gains" / "histogram.csv")
    quantiles = pd.read_csv(data / "gate-gains" / "quantiles.csv")
    with rc_context(STYLE):
        figure, panels = make_panels(4, 3.1)
        for quantity, axes, by_depth in zip(NAMES, panels[:2], panels[2:], strict=True):
            _sizes(axes, histogram[histogram.quantity == quantity])
            axes.set_title("All blocks: " + THROUGH[quantity] + NAMES[quantity])
            finish(axes, "size (a logarithmic scale)", "share per power of ten")
            _medians(by_depth, quantiles[quantiles.quantity == quantity])
            by_depth.set_title("By block: " + THROUGH[quantity] + NAMES[quantity])
            finish(by_depth, "depth (0: first block, 1: last)", "median size")
    return figure


def _sizes(axes: Axes, rows: pd.DataFrame) -> None:
    """The density over the logarithm; sizes outside the bins count in its scale only."""
    for family, pair in PAIRS.items():
        ours = rows[rows.family == family]
        share = ours["count"] / ours["count"].sum()
        width = ours.log10_high - ours.log10_low
        table = ours.assign(middle=ours.log10_low + width / 2, density=share / width)
        bins = table[np.isfinite(width)].groupby("middle", as_index=False).density.sum()
        draw_line(axes, bins, "middle", "density", label=pair.name, **pair.style)
    axes.set_xlim(-4, 2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda power, _: f"{10**power:g}"))
    axes.set_ylim(bottom=0)


def _medians(axes: Axes, rows: pd.DataFrame) -> None:
    for family, pair in PAIRS.items():
        ours = rows[rows.family == family]
        ours = ours.assign(depth=ours.layer / ours.layer.max())
        add_band(axes, ours.depth, ours.q25, ours.q75, pair.style["color"])
        draw_line(axes, ours, "depth", "q50", label=pair.name, **pair.style)
    log_scale(axes)
