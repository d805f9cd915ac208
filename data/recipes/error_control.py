"""Error control on a pair: how errors grow, what ranks a limit asks for, and the smallest set.

    python data/recipes/error_control.py --base SmolLM2-135M-Instruct \\
        --tuned data/smollm2-gsm8k-lora \\
        --out data/theory/errors-smollm2 --max-kl 0.05
    python data/recipes/error_control.py --base data/tiny-listops/base \\
        --tuned data/tiny-listops/tuned \\
        --data tiny --out data/theory/errors-tiny --max-kl 1.5

Writes OUT-growth.csv (gains of random errors by block and location, the worst case and the bound),
OUT-left.csv (the energy that maps of each rank leave, over the stream's), OUT-limits.csv (ranks so
that no block's relative error passes a limit), OUT-sets.csv (the sets that were tried for --max-kl)
and OUT.json (where the numbers come from). About a quarter of an hour for SmolLM2 on two cores, one
minute for the tiny pair.
"""

import argparse
import time
from pathlib import Path

import pandas as pd

from toolkit import ModelPair
from toolkit.analysis.rank_budget import ranks_within
from toolkit.documents.documents import read_documents
from toolkit.evaluation.allocation import BlockErrors, block_errors, probe_batch
from toolkit.evaluation.compare import reference_of
from toolkit.evaluation.rank_search import Known, smallest_ranks
from toolkit.runtime.provenance import stamp
from toolkit.runtime.records import write_json
from toolkit.runtime.shipped import PROMPTS, shipped
from toolkit.theory.error_growth import measure_growth
from toolkit.training.tiny import tiny_documents

LIMITS = (0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02)  # relative errors of the stream


def limits(errors: BlockErrors) -> pd.DataFrame:
    """Ranks by block for every limit, the errors they are predicted to leave, and the total."""
    rows = []
    for limit in LIMITS:
        found = ranks_within(errors.left, errors.step_gains, limit)
        rows += [
            {"limit": limit, "layer": layer, "rank": rank, "error": error, "holds": found.holds}
            for layer, (rank, error) in enumerate(zip(found.ranks, found.errors, strict=True))
        ]
    return pd.DataFrame(rows)


def left_over(errors: BlockErrors) -> pd.DataFrame:
    """What maps of each rank leave in each block, for ranks up to 64 and the widest."""
    rows = []
    for layer, shares in enumerate(errors.left):
        ranks = [r for r in (0, 1, 2, 4, 8, 16, 32, 64) if r < len(shares)] + [len(shares) - 1]
        rows += [{"layer": layer, "rank": rank, "left": shares[rank]} for rank in ranks]
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--tuned", required=True)
    parser.add_argument("--data", default=str(shipped(PROMPTS)), help='a file, or "tiny"')
    parser.add_argument("--max-kl", type=float, required=True)
    parser.add_argument("--max-prompts", type=int)
    parser.add_argument("--out", type=Path, required=True, help="path of the files, no suffix")
    args = parser.parse_args()
    started = time.perf_counter()
    pair = ModelPair.load(args.base, args.tuned)
    documents = tiny_documents() if args.data == "tiny" else read_documents(args.data)
    corpus = pair.corpus(documents)
    growth = measure_growth(pair, probe_batch(corpus.batches), show_progress=True)
    errors = block_errors(pair, corpus, show_progress=True)
    known = Known(errors, reference_of(pair, corpus.prompts(args.max_prompts)))
    found = smallest_ranks(pair, corpus, args.max_kl, show_progress=True, known=known)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tables = {
        "growth": growth,
        "left": left_over(errors),
        "limits": limits(errors),
        "sets": found.tried,
    }
    for name, table in tables.items():
        path = args.out.with_name(f"{args.out.name}-{name}.csv")
        table.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
    record = {
        "base": args.base,
        "tuned": args.tuned,
        "data": Path(args.data).name,
        "max_kl": args.max_kl,
        "ranks": found.ranks,
        "costs": errors.costs,
        "step_gains": errors.step_gains,
        "bound_missing": growth.attrs["no_bound"],
        **stamp(started),
    }
    write_json(record, args.out.with_name(f"{args.out.name}.json"))


if __name__ == "__main__":
    main()
