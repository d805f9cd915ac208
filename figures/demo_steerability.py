"""Draws figures/demo_steerability: what each fit recovers of the fine-tune that ships.

    python figures/demo_steerability.py

Reads data/demo-run, which `oracle demo` made; no model is opened.
"""

from pathlib import Path

from toolkit import draw
from toolkit.store import read_tables

ROOT = Path(__file__).parent.parent


def main() -> None:
    tables = read_tables(ROOT / "data" / "demo-run" / "tables")
    draw.save(tables["steerability"].plot(), ROOT / "figures" / "demo_steerability")


if __name__ == "__main__":
    main()
