"""Makes data/theory/deficient-mlp: steering behind an MLP whose down projection has rank k.

    python data/recipes/deficient_mlp.py --out data/theory/deficient-mlp

Models of one block (`toolkit/theory/deficient_mlp.py`), W_d's best approximations of rank 0 to
full, three seeds; in each, adapters of full rank trained to say a fixed permutation of every token,
and judged on sequences that none of them saw. Adapters of one seed start alike and see the same
sequences.

Written are OUT.csv, a row for each model and adapter, and OUT.json. Three to four minutes on
one core.
"""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from toolkit.runtime.progress import progress
from toolkit.runtime.provenance import stamp
from toolkit.runtime.records import write_json
from toolkit.theory.deficient_mlp import (
    D_FF,
    D_MODEL,
    LENGTH,
    N_TOKENS,
    judge,
    one_block_model,
    permutation_rows,
    spread_of,
    steers,
    train_adapter,
)
from toolkit.training.methods import Method
from toolkit.training.trainer import TrainingOptions

RANKS = (0, 1, 2, 4, 8, 16, 32, D_MODEL)
STEPS, BATCH, RATE = 200, 32, 0.1
N_HELD_OUT = 512  # sequences
BIAS = {"bias": True}
METHODS = (
    Method("vector", "vector", "post_block"),
    Method("post-MLP linear", "linear", "post_mlp", "full", options=BIAS),
    Method("post-MLP non-linear", "nonlinear", "post_mlp", "full", options=BIAS),
    Method("post-block linear", "linear", "post_block", "full", options=BIAS),
    Method("post-block non-linear", "nonlinear", "post_block", "full", options=BIAS),
)


def row_of(rank: int, seed: int, method: Method, rate: float) -> dict[str, Any]:
    """One adapter trained on one model, and what it does on held-out sequences."""
    model = one_block_model(rank, seed)
    options = TrainingOptions(rate, batch_size=BATCH, max_steps=STEPS, seed=seed)
    adapters = train_adapter(model, method, permutation_rows(STEPS * BATCH, seed), options)
    held_out = permutation_rows(N_HELD_OUT, 1000 + seed)
    found = judge(model, adapters, held_out)
    spread = spread_of(model, steers(model, adapters, held_out))
    names = {"down_rank": rank, "seed": seed, "location": method.location, "kind": method.kind}
    return {**names, **asdict(found), **asdict(spread), "parameters": adapters.parameters}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="path of the files, no suffix")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=RATE)
    args = parser.parse_args()
    started = time.perf_counter()
    cells = [(k, s, m) for k in args.ranks for s in range(args.seeds) for m in METHODS]
    rows = []
    with progress("training", len(cells)) as advance:
        for cell in cells:
            rows.append(row_of(*cell, args.rate))
            advance()
    record = {
        "command": " ".join(["python", *sys.argv]),
        **stamp(started),
        "model": {"d_model": D_MODEL, "d_ff": D_FF, "tokens": N_TOKENS, "blocks": 1},
        "sequences": {"length": LENGTH, "training": STEPS * BATCH, "held_out": N_HELD_OUT},
        "training": {"steps": STEPS, "batch_size": BATCH, "learning_rate": args.rate},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    table.to_csv(args.out.with_suffix(".csv"), index=False, float_format="%.6g")
    write_json(record, args.out.with_suffix(".json"))
    cells_of = table.groupby(["down_rank", "location", "kind"])
    print(cells_of[["loss", "accuracy", "dimensions", "outside"]].mean().round(3).to_string())


if __name__ == "__main__":
    main()
