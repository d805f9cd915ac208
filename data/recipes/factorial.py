"""Makes data/tiny-listops/factorial: where, what kind, at which tokens, at which rank.

    python data/recipes/factorial.py

Every cell is trained on the tiny model as `oracle table` trains its methods, at the rate that suits
most of them there. Says what location, parameterisation and positions buy alone:
mean differences of test accuracy between cells that differ in that alone, at equal parameters.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from toolkit.jobs.comparison import TableRequest, make_table
from toolkit.training.methods import Method

OUT = Path(__file__).parent.parent / "tiny-listops" / "factorial"
LOCATIONS = ("heads", "pre_mlp", "post_mlp", "post_block")
KINDS = (("vector", None), ("linear", 1), ("linear", 8), ("loreft", 8), ("nonlinear", 8))
RATE = 1e-2  # of the two that the table tries, what most kinds choose there
POSITIONS = ("all", "last_prompt", "first_last(7)")


def cells() -> tuple[Method, ...]:
    """Every combination at all positions; the linear and LoReFT of rank 8 at the others too."""
    return tuple(
        Method(f"{location} {kind} {rank or 0} {positions}", kind, location, rank, positions)
        for location, (kind, rank), positions in product(LOCATIONS, KINDS, POSITIONS)
        if positions == "all" or (kind in ("linear", "loreft") and rank == 8)
    )


def contrasts(frame: pd.DataFrame) -> pd.DataFrame:
    """For each factor, each level's mean accuracy less the first level's, over matched cells."""
    frame = frame.assign(rank=frame["rank"].fillna(0))
    rows = []
    for factor, levels in (
        ("location", LOCATIONS),
        ("kind", ("linear", "vector", "loreft", "nonlinear")),
        ("positions", POSITIONS),
    ):
        others = [n for n in ("location", "kind", "rank", "positions") if n != factor]
        if factor == "kind":  # rank 8 kinds have one size; a vector has none: compared apart
            others = ["location", "positions"]
        part = frame if factor != "kind" else frame[frame["rank"].isin((0, 8))]
        wide = part.pivot_table(index=others, columns=factor, values="accuracy")
        for level in levels[1:]:
            gap = (wide[level] - wide[levels[0]]).dropna()
            row = {"factor": factor, "level": level, "against": levels[0]}
            spread = {"mean": gap.mean(), "sem": gap.std() / np.sqrt(len(gap))}
            rows.append(row | spread | {"cells": len(gap), "wins": int((gap > 0).sum())})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="0: as many as fit")
    parser.add_argument("--max-steps", type=int, default=200)
    args = parser.parse_args()
    request = TableRequest(methods=cells(), max_steps=args.max_steps, rate=RATE)
    frame, _ = make_table(request, args.out, range(args.seeds), args.workers)
    found = contrasts(frame)
    found.to_csv(args.out / "contrasts.csv", index=False)
    print(found.to_string(index=False))


if __name__ == "__main__":
    main()
