"""Budgeted residuals: the toolkit's way against one dense float64 SVD a token, same tokens.

    python tests/benchmarks/reachability_speed.py [--layers 30] [--tokens 64] [--dense-tokens 64]
    python tests/benchmarks/reachability_speed.py --random 2048 8192 --layers 2 --dense-tokens 1

Both give, for the targets `down` and `exact`, the residual at every budget, the least norm that
leaves 1% and the rank. They take turns, layer by layer, in one process; the dense way on the first
`--dense-tokens` tokens of each. Reported are seconds a token, their ratio, the largest difference
of any residual, and the share of the machine's matrix-product rate (measured in the same run) that
the toolkit's way reaches. `--random` takes an MLP of that shape with random weights and a random
rank-8 change, which needs no model.
"""

import argparse
import time

import numpy as np
import torch
from record import write
from scipy.optimize import brentq

from toolkit.analysis.first_order import first_order_terms
from toolkit.analysis.reachability import BUDGETS, reach
from toolkit.blocks.jacobian import MLPJacobian, matrix_of
from toolkit.blocks.mlp import MLP, Change, MLPChange


def dense(matrix, targets, radii):
    """Residuals `[m, b]`, least norms `[m]` and the rank of one token, from its SVD in float64."""
    left, sizes, _ = torch.linalg.svd(matrix)
    squares = sizes.square().numpy()
    residuals, least = [], []
    for target in targets:
        c = (left.T @ target).numpy()

        def norm(log, c=c):
            return np.sqrt((squares * (c / (squares + np.exp(log))) ** 2).sum())

        def residual(log, c=c):
            return np.linalg.norm(c * np.exp(log) / (squares + np.exp(log)))

        lowest, highest = np.log(squares[0]) - 70, np.log(squares[0]) + 70
        row = []
        for radius in radii.tolist():
            inside = norm(lowest) <= radius
            log = lowest if inside else brentq(lambda x: norm(x) - radius, lowest, highest)  # noqa: B023
            row.append(residual(log) / float(target.norm()))
        small = 0.01 * float(target.norm())
        log = brentq(lambda x: residual(x) - small, lowest, highest)  # noqa: B023
        residuals.append(row)
        least.append(norm(log))
    return np.array(residuals), np.array(least), int((sizes > 1e-6 * sizes[0]).sum())


def operations(d, d_ff):
    """Floating-point operations of one token: form A, half of A Aᵀ, reduce it to a tridiagonal."""
    return {
        "form A (float32)": 2 * d * d * d_ff,
        "A Aᵀ, lower half (float64)": d**3 * 5 // 4,
        "tridiagonal (float64)": 4 * d**3 // 3,
    }


def peak(d, d_ff, dtype):
    """Operations a second of the largest product in it."""
    a, b = torch.randn(d, d_ff, dtype=dtype), torch.randn(d_ff, d, dtype=dtype)
    best = min(timed(lambda: a @ b) for _ in range(10))
    return 2 * d * d * d_ff / best


def timed(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def shipped_layers(n_layers, n_tokens):
    """(MLP, its change, MLP inputs) of blocks of the pair that ships."""
    from toolkit import ModelPair
    from toolkit.blocks.read import mlps
    from toolkit.documents.batches import make_batches
    from toolkit.documents.documents import read_documents
    from toolkit.documents.tokens import encode_all
    from toolkit.models.hooks import capture
    from toolkit.runtime.shipped import ADAPTER, BASE, PROMPTS, shipped

    pair = ModelPair.load(BASE, shipped(ADAPTER))
    batches = make_batches(encode_all(read_documents(shipped(PROMPTS))[:4], pair.tokenizer))
    sites = {str(i): pair.base_runner.sites.at["mlp_in", i] for i in range(n_layers)}
    parts = {name: [] for name in sites}
    for batch in batches:
        with capture(sites) as states:
            model = pair.base_runner.model.base_model
            model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
        for name, state in states.items():
            parts[name].append(state[batch.counted])
    order = torch.randperm(sum(map(len, parts["0"])), generator=torch.Generator().manual_seed(0))
    for (mlp, change), states in zip(mlps(pair.base, pair.tuned), parts.values(), strict=False):
        yield mlp, change, torch.cat(states)[order[:n_tokens]]


def random_layers(d, d_ff, n_layers, n_tokens):
    for seed in range(n_layers):
        g = torch.Generator().manual_seed(seed)

        def matrix(rows, columns, g=g):
            return torch.randn(rows, columns, generator=g) / columns**0.5

        zeros, wide = torch.zeros(d), torch.zeros(d_ff)
        mlp = MLP(torch.nn.functional.silu, matrix(d_ff, d), wide, matrix(d, d_ff), zeros,
                  matrix(d_ff, d), wide)  # fmt: skip
        shapes = {"gate": (d_ff, d, wide), "down": (d, d_ff, zeros), "up": (d_ff, d, wide)}
        change = MLPChange(**{
            name: Change((0.03 * matrix(rows, 8), matrix(8, columns)), bias)
            for name, (rows, columns, bias) in shapes.items()
        })  # fmt: skip
        yield mlp, change, torch.randn(n_tokens, d, generator=g)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dense-tokens", type=int, default=64)
    parser.add_argument("--random", type=int, nargs=2, metavar=("D", "D_FF"))
    args = parser.parse_args()
    layers = (
        random_layers(*args.random, args.layers, args.tokens)
        if args.random
        else shipped_layers(args.layers, args.tokens)
    )
    seconds = {"toolkit": 0.0, "dense": 0.0}
    n = {"toolkit": 0, "dense": 0}
    worst = np.zeros(len(BUDGETS))
    worst_norm, ranks_differ = 0.0, 0
    for mlp, change, h in layers:
        terms = first_order_terms(mlp, change, h)
        targets = torch.stack([terms.down, terms.exact], 1)
        radii = h.double().norm(dim=1)[:, None] * torch.tensor(BUDGETS, dtype=torch.float64)
        started = time.perf_counter()
        found = reach(matrix_of(MLPJacobian.at(mlp, h)), targets, radii)
        seconds["toolkit"] += time.perf_counter() - started
        n["toolkit"] += len(h)
        residual, least, rank = found.residual.numpy(), found.min_norm.numpy(), found.rank
        exact = mlp.to(torch.float64)
        for i in range(min(args.dense_tokens, len(h))):
            started = time.perf_counter()
            matrix = MLPJacobian.at(exact, h[i : i + 1].double()).dense()[0]
            expected, norms, full = dense(matrix, targets[i].double(), radii[i])
            seconds["dense"] += time.perf_counter() - started
            n["dense"] += 1
            worst = np.maximum(worst, np.abs(residual[i] - expected).max(0))
            worst_norm = max(worst_norm, float(np.abs(least[i] / norms - 1).max()))
            ranks_differ += int(rank[i]) != full
        d, d_ff = mlp.down.shape
    each = {name: seconds[name] / n[name] for name in seconds}
    work = operations(d, d_ff)
    rates = {
        str(t).removeprefix("torch."): peak(d, d_ff, t) for t in (torch.float32, torch.float64)
    }
    single, double = rates["float32"], rates["float64"]
    form, gram, reduce = work.values()
    row = {
        "d": d,
        "f": d_ff,
        "tokens": n["toolkit"],
        "seconds a token": f"{each['toolkit']:.4f}",
        "dense, seconds a token": f"{each['dense']:.4f}",
        "dense / toolkit": round(each["dense"] / each["toolkit"], 1),
        "share of the product rate": round(
            (form / single + (gram + reduce) / double) / each["toolkit"], 2
        ),
        "largest difference of a residual": f"{worst.max():.1e}",
        "of a least norm": f"{worst_norm:.1e}",
        "ranks that differ": ranks_differ,
    }
    operations_said = ", ".join(f"{name} {count:.2g}" for name, count in work.items())
    note = f"operations a token: {operations_said}; budgets {BUDGETS}"
    write(f"reachability_speed_{d}", "Reachability against a dense SVD a token", [row], note)


if __name__ == "__main__":
    main()
