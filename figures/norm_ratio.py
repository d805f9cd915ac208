"""The MLP's share of the two branches' norms by depth, beside the curve that the post published.

MLP / (MLP + attention) of mean norms per token: in the base models, and in the forced delta, where
it says how much of what fine-tuning changed in a block steering after the MLP covers. The published
curve is Llama-3.2-1B's, read off the post's plot; depth is relative, since the models differ in it.
"""

from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from toolkit.jobs.figures import PAIRS, PUBLISHED_STYLE
from toolkit.tables.drawing import STYLE, draw_line, finish, make_panels

MADE_BY = (
    "python data/recipes/shipped_runs.py demo-run",
    "python data/recipes/shipped_runs.py gemma-run",
)


def draw(data: Path) -> Figure:
    published = pd.read_csv(data / "published" / "norm_ratio.csv")
    with matplotlib.rc_context(STYLE):
        figure, (base, change) = make_panels(2)
        draw_line(
            base,
            _by_depth(published),
            "depth",
            "percent",
            label="Llama-3.2-1B (published)",
            **PUBLISHED_STYLE,
        )
        for pair in PAIRS.values():
            frame = pair.table(data, "norms")
            for axes, of in ((base, "base"), (change, "delta_forced")):
                rows = _by_depth(frame[frame.of == of])
                draw_line(axes, rows, "depth", "percent", label=pair.name, **pair.style)
        base.set_title("The MLP's share of the two branches, in the base model")
        change.set_title("The MLP's share of what fine-tuning changed in the block")
        for axes in (base, change):
            axes.set_ylim(0, 100)
            finish(axes, "depth (0: first block, 1: last)", "MLP / (MLP + attention)  (%)")
    return figure


def _by_depth(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(depth=rows.layer / rows.layer.max(), percent=100 * rows.mlp_share)
