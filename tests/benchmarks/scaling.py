"""The march's measured time against its formulas, as width, depth and tokens grow.

    python tests/benchmarks/scaling.py [--rounds 2]

Pairs of random weights from a configuration, one thread. For each size the rates of every kind of
work are timed as ``oracle diagnose --dry-run`` does it (seconds, on random numbers), and the time
of a march with all accumulators and the MLP's first-order terms is predicted from them and from the
operations that `toolkit.planning.operations` counts; then the march is run. `scaling.json` holds
both, and `linear_algebra.json` what d³ costs: a unit of each decomposition against a product of
the same machine, so that counted constants stand beside measured ones.
"""

import argparse
import time

import torch
from record import write
from transformers import AutoModelForCausalLM, LlamaConfig

from toolkit import ModelPair
from toolkit.analysis.linear_fit import explained, fit_linear
from toolkit.analysis.spectrum import spectrum
from toolkit.blocks.parts import BlockParts
from toolkit.blocks.read import mlps
from toolkit.diagnosis.block_statistics import MLP_INPUT, BlockStatistics
from toolkit.diagnosis.mlp_statistics import MLPStatistics
from toolkit.documents.batches import make_batches
from toolkit.documents.tokens import Encoded
from toolkit.lockstep.march import March
from toolkit.planning import operations as cost
from toolkit.planning.memory import streams, sums
from toolkit.planning.shapes import ModelShape
from toolkit.planning.timing import measure, product_rate, seconds_of
from toolkit.planning.workload import BatchShape, Workload
from toolkit.runtime.lapack import quiet_openblas
from toolkit.statistics import MomentSums

LENGTH, BATCH, VOCABULARY = 256, 2048, 256
WIDTHS, DEPTHS, TOKENS = (256, 512, 1024, 1536), (2, 4, 8), (512, 2048, 8192)
CUBES = (256, 512, 1024, 1536)


def random_pair(d, n_layers):
    config = LlamaConfig(
        hidden_size=d, intermediate_size=8 * d // 3 // 64 * 64, num_hidden_layers=n_layers,
        num_attention_heads=d // 64, num_key_value_heads=max(d // 256, 1), vocab_size=VOCABULARY,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    tuned = AutoModelForCausalLM.from_config(config)
    for ours, theirs in zip(base.parameters(), tuned.parameters(), strict=True):
        theirs.data.copy_(ours + 0.01 * theirs)
    return config, ModelPair.from_models(base, tuned, tokenizer=None)


def documents(tokens):
    ids = torch.randint(0, VOCABULARY, (tokens // LENGTH, LENGTH), generator=torch.manual_seed(0))
    return [Encoded(tuple(row.tolist()), None, (1,), i % 5 == 4) for i, row in enumerate(ids)]


def march(pair, batches):
    parts_reader = [BlockParts(*parts) for parts in mlps(pair.base, pair.tuned)]
    walk = March(pair.base_runner, pair.tuned_runner, batches, pair.branches, extra=(MLP_INPUT,))
    for layer in walk.layers():
        listeners = BlockStatistics(pair.branches), MLPStatistics(parts_reader[layer])
        for step in walk.steps(layer):
            for listener in listeners:
                listener.update(step)
        walk.advance(layer, {})


@torch.no_grad()
def scaled(grows, d, n_layers, tokens, rounds):
    """One row: a march predicted, and run."""
    config, pair = random_pair(d, n_layers)
    batches = make_batches(documents(tokens), batch_tokens=BATCH)
    shape = ModelShape.of(pair.base)
    shapes = tuple(BatchShape(*b.ids.shape, int(b.counted.sum()), b.held_out) for b in batches)
    work = Workload(shapes, (), (), everywhere=0, single=False, sample=0, shared_sample=0)
    parts = (*cost.march(shape, work), *cost.accumulators(shape, work))
    stages = [stage for stage in parts if stage.operations]
    rates = measure(config, shape, work, torch.float32).rates
    predicted = sum(stage.operations / rates[stage.kind] for stage in stages)
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        march(pair, batches)
        seconds.append(time.perf_counter() - started)
    operations = sum(stage.operations for stage in stages)
    row = {
        "grows": grows,
        "d": d,
        "layers": n_layers,
        "tokens": tokens,
        "operations a token": f"{operations / tokens:.3g}",
        "stream bytes a token": int(streams(shape, work, 4) / tokens),
        "MB of sums": round(sums(shape, work) / 1e6),
        "predicted, s": round(predicted, 2),
        "measured, s": round(min(seconds), 2),
        "measured / predicted": round(min(seconds) / predicted, 2),
    }
    print(row, flush=True)
    return row


def cubes(d):
    """What a spectrum and a fit cost in units of d³ operations of a product: counted, measured."""
    rate = product_rate(torch.float64, "cpu", d)
    sums = MomentSums([("x", "x"), ("t", "x"), ("t", "t")])
    sums.update({"x": torch.randn(2 * d, d), "t": torch.randn(2 * d, d)})
    moments = sums.result()
    second, fit = moments.second_moment("t"), fit_linear(moments, "x", "t")
    energy = moments.energy("t")
    works = {
        "product": (cost.PRODUCT, lambda: second @ second),
        "Cholesky factor": (cost.CHOLESKY, lambda: torch.linalg.cholesky(second)),
        "spectrum": (
            cost.TRIDIAGONAL,
            lambda: spectrum(second, moments.mean["t"], 1.0, moments.n),
        ),
        "fit": (cost.FIT, lambda: fit_linear(moments, "x", "t")),
        "a fit judged on two sides": (
            cost.JUDGED,
            lambda: [explained(fit, moments, "x", "t", energy, (0, "full")) for _ in range(2)],
        ),
        "singular values and vectors": (cost.SVD, lambda: torch.linalg.svd(second)),
    }
    for name, (counted, work) in works.items():
        seconds = seconds_of(work)
        measured = seconds * rate / d**3
        yield {"work": name, "d": d, "counted": round(counted, 2), "measured": round(measured, 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS)
    parser.add_argument("--depths", type=int, nargs="*", default=DEPTHS)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [("d", d, 4, 2048) for d in args.widths]
    sizes += [("layers", 512, depth, 2048) for depth in args.depths]
    sizes += [("tokens", 512, 4, tokens) for tokens in args.tokens]
    with quiet_openblas():
        rows = [scaled(*size, args.rounds) for size in sizes]
        found = [row for d in CUBES if d <= max(args.widths) for row in cubes(d)]
    title = "The march with all accumulators: time predicted by the formulas, and measured"
    write("scaling", title, rows, f"random weights, documents of {LENGTH} tokens")
    title = "Decompositions in units of d³ operations of a float64 product: counted, and measured"
    write("linear_algebra", title, found)


if __name__ == "__main__":
    main()
