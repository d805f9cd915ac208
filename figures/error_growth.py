"""How errors grow from block to block: measured, in the worst case, and bounded by weights.

A random error of 1 % of the stream, put into the fine-tuned SmolLM2-135M. Above: what one block
makes of it, beside the largest gain of any error (power iteration) and the bound from the 2-norms
of the weights and the norm layers (`toolkit.analysis.gain_bounds`). Below: what is left behind
the last block. Measured gains stay about 1; bounds multiply to numbers that say nothing.
"""

from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from toolkit.tables.drawing import (
    BLACK,
    BLUE,
    GREY,
    LAYER_LABEL,
    LOCATION_STYLE,
    LOCATIONS,
    REFERENCE,
    STYLE,
    VERMILLION,
    draw_line,
    finish,
    log_scale,
    make_panels,
)

MADE_BY = (
    "python data/recipes/error_control.py --base SmolLM2-135M-Instruct "
    "--tuned data/smollm2-gsm8k-lora --out data/theory/errors-smollm2 --max-kl 0.05",
)
SHOWN = ("pre_mlp", "post_block")  # after the MLP an error lands where it does after the block


def draw(data: Path) -> Figure:
    frame = pd.read_csv(data / "theory" / "errors-smollm2-growth.csv")
    block = frame[frame.location == "post_block"]
    with matplotlib.rc_context(STYLE):
        figure, (step, end) = make_panels(2, 3.8)
        bound = {"color": BLACK, "marker": "v", "linestyle": "-", "label": "bound, any error"}
        worst = {"color": VERMILLION, "marker": "s", "linestyle": "--", "label": "worst error"}
        draw_line(step, block, "layer", "bound", **bound)
        draw_line(step, block, "layer", "worst", **worst)
        # What a block makes of an error shows behind the next one.
        measured = block.assign(layer=block.layer + 1)
        draw_line(step, measured, "layer", "step_gain", color=BLUE, marker="o",
                  label="random error, relative size")  # fmt: skip
        log_scale(step)
        step.set_title("By how much one block enlarges an error of its input")
        finish(step, LAYER_LABEL, "gain (no unit)", 3, layers=True)
        for location in SHOWN:
            rows = frame[frame.location == location]
            style = LOCATION_STYLE[location] | {"label": f"put in at {LOCATIONS[location]}"}
            draw_line(end, rows, "layer", "end_gain", **style)
        end.axhline(1, color=GREY, linewidth=1, label=REFERENCE)
        end.set_ylim(0, 1.15 * max(frame.end_gain.max(), 1))
        end.set_title("Relative size at the end, over that where it was put in")
        finish(end, LAYER_LABEL, "gain (1: as large as it was)", 2, layers=True)
    return figure
