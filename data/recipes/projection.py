"""Makes data/theory/projection-*: how nearly steering behind the block replaces it behind the MLP.

    python data/recipes/projection.py smollm2 --out data/theory/projection-smollm2
    python data/recipes/projection.py tiny --out data/theory/projection-tiny
    python data/recipes/projection.py gemma3 --out data/theory/projection-gemma3

Written are OUT.csv (a row for each block of the base model: the subspaces of the skip term and of
the MLP's output, and how well the one is guessed from their sum), OUT-cost.csv (a row for each set
of adapters: the KL that is left) and OUT.json. On one core that other work shared: 9 minutes, a
quarter of one, and 9.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from toolkit import ModelPair, read_documents
from toolkit.runtime.provenance import stamp
from toolkit.runtime.records import write_json
from toolkit.runtime.shipped import ADAPTER, BASE, PROMPTS, shipped
from toolkit.theory.replication import measure
from toolkit.theory.replication_cost import replication_cost
from toolkit.training.tiny import TASK, tiny_pair

N_EXPRESSIONS = 250
N_PROMPTS, N_NEW = {"smollm2": 8, "gemma3": 8, "tiny": 32}, 24


def pair_of(name: str) -> ModelPair:
    """Where each pair ships."""
    if name == "tiny":
        return tiny_pair()
    tuned = {"smollm2": (BASE, ADAPTER), "gemma3": ("gemma-3-270m", "gemma3-gsm8k-lora")}[name]
    return ModelPair.load(tuned[0], shipped(tuned[1]))


def documents_of(name: str) -> list[Any]:
    """What the pair was fine-tuned for, unseen by its training."""
    if name != "tiny":
        return list(read_documents(shipped(PROMPTS)))
    examples = TASK.examples("validation", N_EXPRESSIONS)
    return [{"prompt": e.prompt, "response": e.response} for e in examples]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pair", choices=list(N_PROMPTS))
    parser.add_argument("--out", type=Path, required=True, help="path of the files, no suffix")
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    pair, documents = pair_of(args.pair), documents_of(args.pair)
    started = time.perf_counter()
    blocks = measure(pair, documents).frame
    print(blocks.round(3).to_string(index=False), flush=True)
    n_prompts = N_PROMPTS[args.pair]
    costs = replication_cost(pair, documents, args.rank, n_prompts=n_prompts, n_new=N_NEW)
    print(costs.round(4).to_string(index=False))
    record = {
        "command": " ".join(["python", *sys.argv]),
        **stamp(started),
        "base": pair.base_name,
        "tuned": pair.tuned_name,
        "documents": len(documents),
        "prompts": n_prompts,
        "new_tokens": N_NEW,
        "rank": args.rank,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, table in (("", blocks), ("-cost", costs)):
        path = args.out.with_name(f"{args.out.name}{suffix}.csv")
        table.to_csv(path, index=False, float_format="%.6g")
    record_path = args.out.with_name(f"{args.out.name}.json")
    write_json(record, record_path)


if __name__ == "__main__":
    main()
