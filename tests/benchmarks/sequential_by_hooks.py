"""Sequential adapters of all blocks: one march, beside what a user would write with hooks.

    python tests/benchmarks/sequential_by_hooks.py [--documents 12] [--rank 8]

Adapters after every block, each fitted to what is still missing once those before it steer. With
hooks and numpy that is a pass of the steered base model for each block, since later states depend
on earlier adapters: whole ones, or ended at the block that is being fitted. The march passes every
block once. All fit the same ridge regression of the same tokens, cut to one rank in the metric of
the inputs; `difference` is the largest of any block's map from the march's, relative to its size.
"""

import argparse
import time
from contextlib import ExitStack, suppress

import numpy as np
import torch
from record import write
from watch import watched

from toolkit import FitSpec, ModelPair, fit_adapters
from toolkit.analysis.linear_fit import RELATIVE_RIDGE
from toolkit.documents.documents import read_documents
from toolkit.runtime.shipped import ADAPTER, BASE, PROMPTS, shipped


class Enough(Exception):  # noqa: N818 - a signal, not an error
    """The block that is being fitted has run."""


def reduced_rank(x, t, rank):
    """Ridge regression of t on x `[n, d]` in float64, cut to `rank`: matrix, and constant."""
    x, t = x.astype(np.float64), t.astype(np.float64)
    dx, dt = x - x.mean(0), t - t.mean(0)
    c = dx.T @ dx / len(x)
    ridge = RELATIVE_RIDGE * np.trace(c) / len(c)
    cross = dt.T @ dx / len(x)
    full = np.linalg.solve(c + ridge * np.eye(len(c)), cross.T).T
    directions = np.linalg.eigh(full @ cross.T)[1][:, ::-1][:, :rank]
    matrix = directions @ directions.T @ full
    return matrix, t.mean(0) - matrix @ x.mean(0)


def states(model, blocks, batches, layers, edits, stop=None):
    """Return what leaves each of the blocks `layers` on counted tokens, `[n, d]`, under `edits`."""
    found = {layer: [] for layer in layers}
    for batch in batches:
        with ExitStack() as stack:
            where = (batch.mask & (batch.mask.cumsum(1) > 1))[..., None]
            for layer, (matrix, constant) in edits.items():

                def steer(_module, _args, output, matrix=matrix, constant=constant, where=where):
                    return output + (output @ matrix.T + constant) * where

                stack.callback(blocks[layer].register_forward_hook(steer).remove)
            for layer in layers:

                def keep(_module, _args, output, layer=layer, batch=batch):
                    found[layer].append(batch.of_counted(output).numpy())
                    if layer == stop:
                        raise Enough

                stack.callback(blocks[layer].register_forward_hook(keep).remove)
            with suppress(Enough):
                model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
    return {layer: np.concatenate(parts) for layer, parts in found.items()}


def by_hooks(pair, batches, rank, stops):
    """Fit every block's map `[d, d]`, with a pass of the steered base model for each."""
    layers = range(pair.n_layers)
    tuned = states(pair.tuned, pair.tuned_runner.sites.blocks, batches, layers, {})
    maps, edits = {}, {}
    model, blocks = pair.base_runner.model.base_model, pair.base_runner.sites.blocks
    for layer in layers:
        x = states(model, blocks, batches, [layer], edits, layer if stops else None)[layer]
        matrix, constant = reduced_rank(x, tuned[layer] - x, rank)
        maps[layer] = matrix
        edits[layer] = [torch.from_numpy(part).float() for part in (matrix, constant)]
    return maps


def by_march(pair, corpus, rank):
    """Fit every block's map `[d, d]` in one march."""
    spec = FitSpec.linear("post_block", rank, "sequential")
    found = fit_adapters(pair, corpus, [spec])[spec].by_layer
    return {layer: (a.up @ a.down).double().numpy() for layer, a in found.items()}


def measured(work):
    """Call `work`, and return its result, its seconds and the most bytes that it took."""
    peaks = []
    started = time.perf_counter()
    with watched(peaks):
        found = work()
    return found, time.perf_counter() - started, peaks[0]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    pair = ModelPair.load(BASE, shipped(ADAPTER))
    corpus = pair.corpus(read_documents(shipped(PROMPTS))[: args.documents])
    batches = corpus.fit_batches
    ways = {
        "one march": lambda: by_march(pair, corpus, args.rank),
        "hooks, passes ended at the block": lambda: by_hooks(pair, batches, args.rank, True),
        "hooks, whole passes": lambda: by_hooks(pair, batches, args.rank, False),
    }
    by_march(pair, pair.corpus(read_documents(shipped(PROMPTS))[:2]), args.rank)  # warm up
    found = {name: measured(work) for name, work in ways.items()}
    maps, seconds, _ = found["one march"]
    rows = []
    for name, (other, took, peak) in found.items():
        apart = max(np.linalg.norm(other[k] - maps[k]) / np.linalg.norm(maps[k]) for k in maps)
        rows.append(
            {
                "way": name,
                "seconds": round(took, 1),
                "to the march": round(took / seconds, 2),
                "memory, MiB": round(peak / 2**20),
                "difference": f"{apart:.1e}",
            }
        )
    tokens = sum(int(batch.counted.sum()) for batch in batches)
    note = f"SmolLM2 and its LoRA, {pair.n_layers} blocks, rank {args.rank}, {tokens} tokens."
    write("sequential_by_hooks", "Sequential adapters of all blocks", rows, note)


if __name__ == "__main__":
    main()
