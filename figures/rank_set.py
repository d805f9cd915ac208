"""The smallest set of ranks that keeps the steered model within a KL of the tuned one.

SmolLM2-135M-Instruct and its LoRA on GSM8K. Above: every set that was tried, fitted sequentially
after the blocks and judged on held-out prompts (one standard error), the prediction from single
blocks' errors, and the bound. Below: ranks by block of the smallest set within it.
"""

import json
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from toolkit.tables.drawing import (
    BLUE,
    GREY,
    LAYER_LABEL,
    ORANGE,
    STYLE,
    add_reference,
    finish,
    log_scale,
    make_panels,
)

MADE_BY = (
    "python data/recipes/error_control.py --base SmolLM2-135M-Instruct "
    "--tuned data/smollm2-gsm8k-lora --out data/theory/errors-smollm2 --max-kl 0.05",
)


def draw(data: Path) -> Figure:
    tried = pd.read_csv(data / "theory" / "errors-smollm2-sets.csv").query("total > 0")
    found = json.loads((data / "theory" / "errors-smollm2.json").read_text())
    with matplotlib.rc_context(STYLE):
        figure, (sets, blocks) = make_panels(2)
        sets.plot(tried.total, tried.predicted, color=ORANGE, marker="s", linestyle="--",
                  label="predicted from single blocks")  # fmt: skip
        sets.errorbar(tried.total, tried.kl, tried.kl_sem, color=BLUE, marker="o",
                      label="measured on held-out prompts")  # fmt: skip
        sets.set_xscale("log")
        doublings = [tried.total.min() * 2**k for k in range(12)]
        ticks = [total for total in doublings if total <= tried.total.max()]
        sets.set_xticks(ticks, [str(total) for total in ticks])
        sets.minorticks_off()
        log_scale(sets)
        add_reference(sets, found["max_kl"], f"the bound, {found['max_kl']:g}")
        sets.set_title("What sets of ranks leave of the divergence")
        finish(sets, "ranks in all blocks together", "KL, nats per token", 2)
        ranks = found["ranks"] or []
        blocks.bar(range(len(ranks)), ranks, color=GREY)
        blocks.set(xlabel=LAYER_LABEL, ylabel="rank")
        blocks.xaxis.set_major_locator(MaxNLocator(integer=True))
        blocks.set_title(f"The smallest set within it: {sum(ranks)} ranks")
    return figure
