"""Whether the march's memory, beyond models and streams, grows with the number of documents.

    python tests/benchmarks/march_memory.py [--documents 50 500 1000]

Each count runs in a process of its own, on documents of 32 random tokens and the pair that ships.
Reported is the peak of the march over what stood before it, less the streams: one block's
accumulators, whose size is given beside it, and what one batch needs.
"""

import argparse
import gc
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from record import write

from toolkit import ModelPair
from toolkit.diagnosis.block_statistics import (
    MLP_INPUT,
    MODES,
    BlockStatistics,
    Samples,
    moment_pairs,
)
from toolkit.documents.batches import make_batches
from toolkit.documents.tokens import Encoded
from toolkit.lockstep.march import March
from toolkit.runtime.heap import release_freed
from toolkit.runtime.shipped import ADAPTER, BASE, shipped

LENGTH, BLOCKS, STREAMS = 32, 4, 2


def resident() -> int:
    """Bytes of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@torch.no_grad()
def measure(n_documents: int) -> dict:
    pair = ModelPair.load(BASE, shipped(ADAPTER))
    ids = torch.randint(100, 40000, (n_documents, LENGTH), generator=torch.manual_seed(0))
    documents = [Encoded(tuple(row.tolist()), None, (1,), i % 5 == 0) for i, row in enumerate(ids)]
    batches = make_batches(documents, batch_tokens=512)
    peak, done = 0, False

    def watch() -> None:
        nonlocal peak
        while not done:
            peak = max(peak, resident())
            time.sleep(0.002)

    def run(n_blocks: int, some: list) -> None:
        models = pair.base_runner, pair.tuned_runner
        walk = March(*models, some, pair.branches, extra=(MLP_INPUT,))
        for layer in walk.layers():
            if layer == n_blocks:
                return
            sums = BlockStatistics(pair.branches, (), Samples(8, 256))
            for step in walk.steps(layer):
                sums.update(step)
            walk.advance(layer, {})

    run(2, batches)  # buffers that torch and the allocator keep for themselves
    gc.collect()
    release_freed()
    before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    run(BLOCKS, batches)
    done = True
    watcher.join()
    width = pair.base.config.hidden_size
    streams = STREAMS * n_documents * LENGTH * width * 4
    pairs = sum(len(moment_pairs(mode, pair.branches)) for mode in MODES)
    return {
        "documents": n_documents,
        "tokens": n_documents * LENGTH,
        "streams, MiB": round(streams / 2**20, 1),
        "accumulators, MiB": round(2 * pairs * width**2 * 8 / 2**20, 1),
        "peak beyond models and streams, MiB": round((peak - before - streams) / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, nargs="+", default=[50, 500, 1000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    rows = []
    for count in args.documents:
        command = [sys.executable, __file__, "--one", str(count)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout))
    note = "SmolLM2 and its LoRA; batches of 512 tokens, which need about 25 MiB in a block"
    write("march_memory", "The march's memory", rows, note)


if __name__ == "__main__":
    main()
