"""The single-layer oracle sweep: one site of one block steered by a share of the free oracle delta.

    python data/recipes/oracle_sweep.py --base SmolLM2-135M-Instruct \
        --tuned data/smollm2-gsm8k-lora \
        --out data/oracle-sweep/smollm2
    python data/recipes/oracle_sweep.py --base gemma-3-270m \
        --tuned data/gemma3-gsm8k-lora \
        --out data/oracle-sweep/gemma3

`toolkit/theory/oracle_sweep.py` says what is swept.

Written are OUT.csv (mean over prompts and its standard error), OUT-sites.csv (how large states and
deltas are: medians over the steered tokens) and OUT.json (where the numbers come from). About 16
minutes a pair on one core.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from toolkit import ModelPair
from toolkit.documents.documents import read_documents
from toolkit.documents.tokens import encode_all
from toolkit.errors import InputError
from toolkit.runtime.provenance import commit, versions
from toolkit.runtime.records import write_json
from toolkit.runtime.shipped import PROMPTS, shipped
from toolkit.theory.oracle_sweep import ALPHAS, Divergence, Sweep, run_sweep


def provenance(args: argparse.Namespace, sweep: Sweep, seconds: float) -> dict[str, Any]:
    """Describe where the numbers come from."""
    training, generated = Path(args.tuned) / "training.json", sweep.reading.generated
    return {
        "versions": versions(),
        "commit": commit(),
        "base": args.base,
        "tuned": args.tuned,
        "training": json.loads(training.read_text()) if training.is_file() else None,
        "data": Path(args.data).name,
        "prompts": len(generated.ids),
        "prompt_tokens": sweep.reading.prompts.mask.sum(1).tolist(),
        "generated": generated.ids.tolist(),
        "alphas": ALPHAS,
        "same_site": sweep.same,
        **Divergence(sweep.reading).of_base(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "seconds": round(seconds),
    }


def held_out_prompts(path: str | Path, tokenizer: Any, n: int) -> list[tuple[int, ...]]:
    """The first `n` held-out prompts of the documents at `path`, as tokens."""
    encoded = encode_all(read_documents(path), tokenizer)
    prompts = [e.prompt_ids for e in encoded if e.held_out][:n]
    if len(prompts) < n:
        raise InputError(f"{path} has {len(prompts)} held-out documents, {n} are asked for")
    return prompts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--tuned", required=True)
    parser.add_argument("--data", default=shipped(PROMPTS))
    parser.add_argument("--out", type=Path, required=True, help="path of the files, no suffix")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--layers", type=int, nargs="+", help="only these")
    args = parser.parse_args()
    pair = ModelPair.load(args.base, args.tuned)
    prompts = held_out_prompts(args.data, pair.tokenizer, args.prompts)
    started = time.perf_counter()
    sweep = run_sweep(pair, prompts, layers=args.layers, shown=True)
    record = provenance(args, sweep, time.perf_counter() - started)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, table in (("", sweep.changes), ("-sites", sweep.sites)):
        path = args.out.with_name(f"{args.out.name}{suffix}.csv")
        table.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
    path = args.out.with_name(f"{args.out.name}.json")
    write_json(record, path)


if __name__ == "__main__":
    main()
