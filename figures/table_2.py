"""The post's second table, Qwen3-4B: accuracy as published, and the sizes of the same methods.

Shares of parameters are printed as published; the counts are those of `toolkit.training.counts`,
from the model's configuration alone.
"""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from toolkit.tables.table_figure import Section, draw_table
from toolkit.theory.published import published_cell

MADE_BY = ("python data/recipes/parameter_counts.py",)
TASKS = {"boolq": "BoolQ", "winogrande": "Winogrande", "gsm8k": "GSM8K", "listops": "ListOps"}
NOTE = (
    "± is the half of a 95 % interval if the standard sets were used (BoolQ 3,270, Winogrande "
    "1,267, GSM8K 1,319 questions), an assumption; the size of ListOps' is not known. ReFT's 288 "
    "more parameters than the linear adapter's are its constants."
)


def draw(data: Path) -> Figure:
    published = pd.read_csv(data / "published" / "table_4b.csv")
    counts = pd.read_csv(data / "published" / "parameter_counts.csv")
    counts = counts[counts.model == "Qwen3-4B"].set_index("method").parameters
    rows = [
        (row.method, f"{counts[row.method]:,}", f"{row.params_percent:g}",
         *(published_cell(task, row[task]) for task in TASKS))
        for _, row in published.iterrows()
    ]  # fmt: skip
    header = ("", "parameters", "% par.", *TASKS.values())
    sections = [Section("Qwen3-4B, published, r=8", header, rows)]
    return draw_table(
        "Table 2: at four billion parameters", sections, (26, 12, 8, 14, 14, 14, 10), NOTE
    )
