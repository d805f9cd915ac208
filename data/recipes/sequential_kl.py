"""Sequential KL by token, and where the steered states go: fits in all blocks, and a trained ReFT.

    python data/recipes/sequential_kl.py --base SmolLM2-135M-Instruct \\
        --tuned data/smollm2-gsm8k-lora \\
        --trained data/smollm2-gsm8k-reft --out data/sequential-kl/smollm2
    python data/recipes/sequential_kl.py --base gemma-3-270m \\
        --tuned data/gemma3-gsm8k-lora \\
        --out data/sequential-kl/gemma3 --new-tokens 24

Fits after the block of rank 8, free (the post's linearised oracle), forced and sequential, are made
on the fit documents and judged on the prompts of the held-out ones; --trained adds adapters that
were trained on the task. Written are OUT.csv (the columns of ``tables/sequential_kl.csv``),
OUT-drift.csv (`toolkit.theory.drift`, on the held-out documents) and OUT.json. About 6 minutes a
pair on two cores. data/smollm2-gsm8k-reft was trained with

    oracle steer train SmolLM2-135M-Instruct --task gsm8k --train gsm8k_train.jsonl \\
        --test gsm8k_test.jsonl --location post_mlp --kind loreft --rank 8 --positions all \\
        --rate 3e-3 --examples 480 --validation 16 --batch-size 8 --max-length 1024 --out ...
"""

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from toolkit import Adapters, ModelPair
from toolkit.diagnosis.summary import curves
from toolkit.documents.documents import read_documents
from toolkit.evaluation.candidates import Candidate
from toolkit.evaluation.compare import FORCINGS, evaluate
from toolkit.fitting.closed_form import fit_adapters
from toolkit.fitting.spec import FitSpec
from toolkit.runtime.provenance import stamp
from toolkit.runtime.records import write_json
from toolkit.runtime.shipped import PROMPTS, shipped
from toolkit.theory.drift import drift

RANK = 8
FITS = ("free", "forced", "sequential")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--tuned", required=True)
    parser.add_argument("--trained", help="a folder of trained adapters")
    parser.add_argument("--data", default=shipped(PROMPTS))
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True, help="path of the files, no suffix")
    args = parser.parse_args()
    started = time.perf_counter()
    pair = ModelPair.load(args.base, args.tuned)
    corpus = pair.corpus(read_documents(args.data))
    plans = [FitSpec("post_block", "linear", RANK, fit) for fit in FITS]
    adapters = list(fit_adapters(pair, corpus, plans, show_progress=True).values())
    if args.trained:
        adapters.append(Adapters.from_pretrained(args.trained))
    candidates = [Candidate.of(found) for found in adapters]
    prompts = corpus.prompts()
    evaluation = evaluate(pair, prompts, candidates, args.new_tokens, forcings=FORCINGS)
    held_out = replace(corpus, encoded=tuple(corpus.held_out), batch_tokens=512)
    moved = [
        {"location": a.location, "kind": a.kind, "fit": a.fit, **asdict(row)}
        for a in adapters
        for row in drift(pair, a, held_out.batches)
    ]
    record = {
        "base": args.base,
        "tuned": args.tuned,
        "trained": args.trained,
        "data": Path(args.data).name,
        "rank": RANK,
        "new_tokens": args.new_tokens,
        "prompts": len(prompts),
        **stamp(started),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    frames = {"": pd.DataFrame(curves(candidates, evaluation)), "-drift": pd.DataFrame(moved)}
    for suffix, frame in frames.items():
        path = args.out.with_name(f"{args.out.name}{suffix}.csv")
        frame.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
    write_json(record, args.out.with_name(f"{args.out.name}.json"))


if __name__ == "__main__":
    main()
