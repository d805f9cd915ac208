"""The MLP's share of the two branches' norms by depth, beside the curve that the post published.

MLP / (MLP + attention) of mean norms per token: in the base models, and in the forced delta, where
it says how much of what fine-tuning changed in a block steering after the MLP covers. The published
curve is Llama-3.2-1B's, read off the post's plot; depth is relative, since the models differ in it.
"""

from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from toolkit.draw import BLACK, BLUE, ORANGE, STYLE, draw_line, finish, make_panels
from toolkit.figures import MADE_BY_RUNS, shipped_frames

MADE_BY = MADE_BY_RUNS
STYLES = {
    "smollm2": {"color": BLUE, "marker": "o", "label": "SmolLM2-135M"},
    "gemma3": {"color": ORANGE, "marker": "s", "linestyle": "--", "label": "Gemma-3-270m"},
}
PUBLISHED = {"color": BLACK, "marker": "D", "linestyle": ":", "label": "Llama-3.2-1B (published)"}


def draw(data: Path) -> Figure:
    published = pd.read_csv(data / "published" / "norm_ratio.csv")
    frames = shipped_frames(data, "norms")
    with matplotlib.rc_context(STYLE):
        figure, (base, change) = make_panels(2)
        draw_line(base, _by_depth(published), "depth", "percent", **PUBLISHED)
        for name, style in STYLES.items():
            for axes, of in ((base, "base"), (change, "delta_forced")):
                rows = frames[name][frames[name].of == of]
                draw_line(axes, _by_depth(rows), "depth", "percent", **style)
        base.set_title("The MLP's share of the two branches, in the base model")
        change.set_title("The MLP's share of what fine-tuning changed in the block")
        for axes in (base, change):
            axes.set_ylim(0, 100)
            finish(axes, "depth (0: first block, 1: last)", "MLP / (MLP + attention)  (%)")
    return figure


def _by_depth(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(depth=rows.layer / rows.layer.max(), percent=100 * rows.mlp_share)
