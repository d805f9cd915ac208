"""A whole diagnosis beside the same content written by hand: time and memory.

    python tests/benchmarks/whole_diagnosis.py [--tokens 6144] [--prompts 8] [--threads 2]

The content is what hooks can give: free deltas of SmolLM2 and its LoRA (merged) at three locations
of every block, their spectra, the best linear fits, and, for a vector, rank 8, rank 32 and full
rank at each location, the KL to the tuned model with the fits in place of it in all blocks. By
hand that is transformers with forward hooks, numpy and scikit-learn, as a user would write it. Each
runs in a process of its own; both must find the same numbers. Forced and sequential fits, which
hooks alone cannot give in few passes, are not in it: ``sequential_by_hooks.py`` has those.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from peers import MIB, PEERS, measured, save_task
from record import write

from toolkit import ModelPair
from toolkit.documents.documents import read_documents
from toolkit.runtime.shipped import ADAPTER, BASE, PROMPTS, shipped

NEW_TOKENS, TOKENS_A_BATCH = 32, 2048
BY_HAND, OURS = "hooks, numpy and scikit-learn", "toolkit"
PEERS |= {
    BY_HAND: ("scikit-learn==1.7.2 transformers==5.23.0", "whole_by_hand.py", ""),
    OURS: (None, "whole_with_toolkit.py", ""),
}
CLOSE = 1e-2  # float32 passes, padded and not, after fits by two ways of solving


def save_prompts(folder: Path, n: int) -> None:
    """The first held-out prompts as lists of token ids."""
    pair = ModelPair.load(BASE, shipped(ADAPTER))
    prompts = pair.corpus(read_documents(shipped(PROMPTS))).prompts(n)
    task = {"prompts": [list(prompt) for prompt in prompts], "new_tokens": NEW_TOKENS}
    (folder / "prompts.json").write_text(json.dumps(task), "utf-8")


def largest_difference(ours: list, theirs: list) -> float:
    """The largest relative difference of two lists of rows ``[name, number]``."""
    assert [row[0] for row in ours] == [row[0] for row in theirs]
    a, b = (np.array([row[1] for row in rows]) for rows in (ours, theirs))
    return float(np.abs((a - b) / np.maximum(np.abs(b), 1e-3)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        save_task(Path(scratch), args.tokens)
        save_prompts(Path(scratch), args.prompts)
        n_batches = -(-args.tokens // TOKENS_A_BATCH)
        found = {
            name: measured(name, Path(scratch), n_batches, args.threads) for name in (OURS, BY_HAND)
        }
    ours, rows = found[OURS], []
    for name, result in found.items():
        gap = largest_difference(ours["rows"], result["rows"])
        assert gap < CLOSE, f"{name} found other numbers: {gap}"
        memory = {key: found[key]["peak"] - found[key]["loaded"] for key in (OURS, name)}
        rows.append(
            {
                "how": name,
                "seconds": round(result["seconds"], 1),
                "time / toolkit's": round(result["seconds"] / ours["seconds"], 2),
                "MiB": round(memory[name] / MIB),
                "memory / toolkit's": round(memory[name] / memory[OURS], 1),
                "largest difference": f"{gap:.0e}",
            }
        )
    note = (
        f"SmolLM2 and its LoRA (merged), {args.tokens} tokens, {args.prompts} prompts of "
        f"{NEW_TOKENS} new tokens, 30 blocks x 3 locations, 12 adapters put in place of tuning"
    )
    write("whole_diagnosis", "A whole diagnosis beside one by hand", rows, note)


if __name__ == "__main__":
    main()
