"""Do the smallest ranks hold their bound on prompts that had no part in choosing them?

    python data/recipes/verify_ranks.py --base SmolLM2-135M-Instruct \\
        --tuned data/smollm2-gsm8k-lora \\
        --found data/theory/errors-smollm2 --prompts gsm8k_test.jsonl --first 100 --n 48

Takes the smallest set and the next smaller one from what data/recipes/error_control.py wrote, fits
both again on the same documents, and judges them on `--n` prompts of another file, from number
`--first` on (the shipped documents are the first of GSM8K's test split). Writes FOUND-verified.csv.
About six minutes on two cores.
"""

import argparse
import json
from pathlib import Path

import pandas as pd

from toolkit import FitSpec, ModelPair, fit_adapters, read_documents
from toolkit.analysis.divergence import recovered
from toolkit.documents.tokens import encode
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import evaluate
from toolkit.runtime.shipped import PROMPTS, shipped


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--tuned", required=True)
    parser.add_argument("--found", type=Path, required=True, help="as --out of error_control.py")
    parser.add_argument("--data", default=shipped(PROMPTS))
    parser.add_argument("--prompts", required=True, help="JSON lines that were not in --data")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--n", type=int, default=48)
    args = parser.parse_args()
    bound = json.loads(args.found.with_name(f"{args.found.name}.json").read_text())["max_kl"]
    tried = pd.read_csv(args.found.with_name(f"{args.found.name}-sets.csv"))
    holding = tried[tried.kl <= bound].total.min()
    shown = tried[(tried.total > 0) & (tried.total <= holding)].tail(2)
    pair = ModelPair.load(args.base, args.tuned)
    plans = [
        FitSpec("post_block", "linear", tuple(map(int, ranks.split("-"))), "sequential")
        for ranks in shown.ranks
    ]
    fitted = fit_adapters(pair, read_documents(args.data), plans, show_progress=True)
    chosen = read_documents(args.prompts)[args.first : args.first + args.n]
    prompts = [encode(document, pair.tokenizer).prompt_ids for document in chosen]
    candidates = [Candidate.of(fitted[plan]) for plan in plans]
    found = evaluate(pair, prompts, candidates).divergences
    rows = []
    for total, candidate in zip([0, *shown.total], [NONE, *candidates], strict=True):
        nats = found[candidate, "tuned"]
        share, share_sem = recovered(nats, found[NONE, "tuned"])
        rows.append(
            {"total": total, "kl": nats.mean, "kl_sem": nats.sem, "recovered": share,
             "recovered_sem": share_sem, "n_prompts": len(prompts)}
        )  # fmt: skip
    frame = pd.DataFrame(rows)
    path = args.found.with_name(f"{args.found.name}-verified.csv")
    frame.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
    print(frame.to_string(index=False))


if __name__ == "__main__":
    main()
