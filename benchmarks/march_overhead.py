"""What listening costs: the march with all accumulators against the same passes without hooks.

    python benchmarks/march_overhead.py [--documents 16] [--rounds 3]

The march runs every block of the base model, of the tuned model, and of the base model on the tuned
stream, and accumulates moments, norms and the reservoir. The bare passes are three forward passes
(base, tuned, base) of the same batches through the same blocks, without the language-model head
and, as a second yardstick, with it. All three run in turn, in one process.
"""

import argparse
import json
import platform
import statistics
import time

import torch

from toolkit import ModelPair
from toolkit.block_sums import MLP_INPUT, BlockSums, Samples
from toolkit.demo import ADAPTER, BASE, PROMPTS, shipped
from toolkit.documents import encode_all, make_batches, read_documents
from toolkit.lockstep import March


def march(pair, batches):
    walk = March(pair.base_blocks, pair.tuned_blocks, batches, pair.branches, extra=(MLP_INPUT,))
    for layer in walk.layers():
        sums = BlockSums(pair.branches, {}, Samples(8, 256))
        for step in walk.steps(layer):
            sums.update(step)
        walk.advance(layer, {})


def bare(pair, batches, with_head):
    for batch in batches:
        for blocks in (pair.base_blocks, pair.tuned_blocks, pair.base_blocks):
            model = blocks.model if with_head else blocks.model.base_model
            model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)


def timed(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    pair = ModelPair.load(BASE, shipped(ADAPTER))
    documents = read_documents(shipped(PROMPTS))[: args.documents]
    batches = make_batches(encode_all(documents, pair.tokenizer))
    kinds = {
        "march": lambda: march(pair, batches),
        "bare": lambda: bare(pair, batches, with_head=False),
        "bare_with_head": lambda: bare(pair, batches, with_head=True),
    }
    seconds = {name: [] for name in kinds}
    kinds["bare"]()  # warm up
    for _ in range(args.rounds):
        for name, work in kinds.items():
            seconds[name].append(timed(work))
    ratios = {
        name: statistics.median(m / b for m, b in zip(seconds["march"], seconds[name], strict=True))
        for name in ("bare", "bare_with_head")
    }
    result = {
        "tokens": sum(batch.n_tokens for batch in batches),
        "seconds": seconds,
        "median_ratio_to": ratios,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
