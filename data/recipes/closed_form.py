"""Makes data/tiny-listops/closed-form: what adapters do that never saw a gradient.

    python data/recipes/closed_form.py

Every location and kind, fitted forced and sequentially on the tiny pair, judged as `oracle table`
judges its methods; then the rank correlation of what the fits recover with what
training the same cells reached (data/tiny-listops/factorial, made by data/recipes/factorial.py).
"""

import argparse
from itertools import product
from pathlib import Path

import pandas as pd
from factorial import KINDS, LOCATIONS
from factorial import OUT as FACTORIAL
from scipy.stats import spearmanr

from toolkit.jobs.comparison import TableRequest, make_table
from toolkit.training.methods import Method

OUT = FACTORIAL.with_name("closed-form")
FITS = ("forced", "sequential")
CELL = ["location", "kind", "rank"]


def fits() -> tuple[Method, ...]:
    return tuple(
        Method(f"{where} {kind} {rank or 0} {fit}", kind, where, rank, start=fit, trained=False)
        for where, (kind, rank), fit in product(LOCATIONS, KINDS, FITS)
        if rank != 1
    )


def beside_training(fitted: pd.DataFrame, trained: pd.DataFrame) -> pd.DataFrame:
    """Each cell's best fit, by what it recovers, beside the cell trained at all positions."""
    fitted, trained = (f.assign(rank=f["rank"].fillna(0).astype(int)) for f in (fitted, trained))
    best = fitted.sort_values("recovered").groupby(CELL, as_index=False).last()
    names = [*CELL, "accuracy", "kl", "recovered"]
    both = best[[*names, "start", "fit_seconds"]].merge(
        trained[trained.positions == "all"][[*names, "train_seconds", "tokens"]],
        on=CELL, suffixes=("_fitted", "_trained"),
    )  # fmt: skip
    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="0: as many as fit")
    args = parser.parse_args()
    request = TableRequest(methods=fits())
    frame, _ = make_table(request, args.out, range(args.seeds), args.workers)
    both = beside_training(frame, pd.read_csv(FACTORIAL / "table.csv"))
    both.to_csv(args.out / "beside_training.csv", index=False)
    print(both.to_string(index=False))
    for measure in ("accuracy", "recovered"):
        found = spearmanr(both.recovered_fitted, both[f"{measure}_trained"])
        print(f"recovered by fits against trained {measure}: rank correlation "
              f"{found.statistic:.2f}, p {found.pvalue:.1g}, {len(both)} cells")  # fmt: skip


if __name__ == "__main__":
    main()
