"""What listening costs: the march with all accumulators against the same passes without hooks.

    python tests/benchmarks/march_overhead.py [--documents 40] [--rounds 3]

The march runs every block of the base model, of the tuned model, and of the base model on the tuned
stream, and accumulates moments of three locations in both modes, norms and samples. The bare passes
are three forward passes (base, tuned, base) of the same batches: whole ones, and without the
language-model head, which the march does not run. `steps` is the march with nobody listening. All
take turns in one process; ratios are medians over rounds.
"""

import argparse
import statistics
import time

import torch
from record import write

from toolkit import ModelPair
from toolkit.diagnosis.block_statistics import MLP_INPUT, BlockStatistics, Samples
from toolkit.documents.batches import make_batches
from toolkit.documents.documents import read_documents
from toolkit.documents.tokens import encode_all
from toolkit.lockstep.march import March
from toolkit.runtime.shipped import ADAPTER, BASE, PROMPTS, shipped


def march(pair, batches, listen, sketch=None):
    walk = March(pair.base_runner, pair.tuned_runner, batches, pair.branches, extra=(MLP_INPUT,))
    for layer in walk.layers():
        sums = BlockStatistics(pair.branches, (), Samples(8, 256), sketch=sketch)
        for step in walk.steps(layer):
            if listen:
                sums.update(step)
        walk.advance(layer, {})


def bare(pair, batches, with_head):
    for batch in batches:
        for blocks in (pair.base_runner, pair.tuned_runner, pair.base_runner):
            model = blocks.model if with_head else blocks.model.base_model
            model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)


def timed(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sketch", type=int, default=64)
    args = parser.parse_args()
    pair = ModelPair.load(BASE, shipped(ADAPTER))
    documents = read_documents(shipped(PROMPTS))[: args.documents]
    batches = make_batches(encode_all(documents, pair.tokenizer))
    kinds = {
        "whole passes": lambda: bare(pair, batches, with_head=True),
        "passes without the head": lambda: bare(pair, batches, with_head=False),
        "march, nobody listening": lambda: march(pair, batches, listen=False),
        "march, all accumulators": lambda: march(pair, batches, listen=True),
        f"march, sketch {args.sketch}": lambda: march(pair, batches, True, args.sketch),
    }
    seconds = {name: [] for name in kinds}
    bare(pair, batches[:1], with_head=False)  # warm up
    for _ in range(args.rounds):
        for name, work in kinds.items():
            seconds[name].append(timed(work))

    def ratio(name, to):
        pairs = zip(seconds[name], seconds[to], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    rows = [
        {
            "what": name,
            "seconds": round(statistics.median(found), 2),
            "to whole passes": ratio(name, "whole passes"),
            "to passes without the head": ratio(name, "passes without the head"),
        }
        for name, found in seconds.items()
    ]
    tokens = sum(batch.n_tokens for batch in batches)
    note = f"SmolLM2 and its LoRA, {tokens} tokens in {len(batches)} batches, {args.rounds} rounds"
    write("march_overhead", "What listening costs", rows, note)


if __name__ == "__main__":
    main()
