"""What each fit recovers of the fine-tune that ships, by its size; and one block steered alone.

Fitted maps stand in place of the oracle in SmolLM2-135M-Instruct, on held-out prompts. 1 is the
tuned model, 0 the base model; whiskers are standard errors over prompts.
"""

from pathlib import Path

from matplotlib.figure import Figure

from toolkit.tables.store import read_table

MADE_BY = ("python data/recipes/shipped_runs.py demo-run",)


def draw(data: Path) -> Figure:
    return read_table(data / "demo-run" / "tables", "steerability").plot()
