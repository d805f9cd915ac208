"""What each fit recovers of the fine-tune that ships, by location and size.

SmolLM2-135M-Instruct and its LoRA on GSM8K; 1 is the tuned model, 0 the base model. The picture of
the README.
"""

from pathlib import Path

from matplotlib.figure import Figure

from toolkit.store import read_tables

MADE_BY = ("python recipes/shipped_runs.py smollm2",)


def draw(data: Path) -> Figure:
    return read_tables(data / "demo-run" / "tables")["steerability"].plot()
