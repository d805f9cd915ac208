"""Makes data/coverage: how often the stated bounds hold, on 4,000 prompts of the tiny pair.

    python data/recipes/coverage.py

Thirty adapters of the tiny pair, fitted on 300 documents, are compared with the tuned model on
4,000 test questions (`pool.safetensors`, per prompt). A draw of n of them is a small run; its
bounds hold where the values over all 4,000 lie within them. Beside what the toolkit uses stand the
delta method and the percentile bootstrap.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor

from toolkit.analysis.divergence import Divergences, recovered
from toolkit.documents.documents import Document
from toolkit.documents.tokens import encode
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import evaluate
from toolkit.evaluation.intervals import difference_interval, jackknife_sem, recovered_interval
from toolkit.evaluation.recommend import critical_value
from toolkit.fitting.closed_form import fit_adapters
from toolkit.fitting.spec import FitSpec
from toolkit.models.pair import ModelPair
from toolkit.runtime.records import write_tensors
from toolkit.training.tiny import TASK

HERE = Path(__file__).parents[1]
OUT = HERE / "coverage"
PROMPTS, DRAWS, RESAMPLES = (4, 8, 16, 24, 50), 300, 2000
SIZES = (("vector", 0), ("linear", 2), ("linear", 8), ("linear", 16), ("linear", 32))


def make_pool() -> dict[str, Tensor]:
    """Return nats of every prompt: of the base, `[n]`, and of the adapters, `[n_adapters, n]`."""
    pair = ModelPair.load(HERE / "tiny-listops" / "base", HERE / "tiny-listops" / "tuned")
    task = TASK
    documents = [{"prompt": e.prompt, "response": e.response} for e in task.examples("train", 300)]
    places = product(("pre_mlp", "post_mlp", "post_block"), ("forced", "sequential"), SIZES)
    specs = [FitSpec(where, *size, fit) for where, fit, size in places]
    fitted = fit_adapters(pair, documents, specs)
    prompts = [
        encode(Document(prompt=e.prompt, response="."), pair.tokenizer).prompt_ids
        for e in task.examples("test", 4000)
    ]
    candidates = [Candidate.of(adapters, key=spec) for spec, adapters in fitted.items()]
    found = evaluate(pair, prompts, candidates, n_new=8, batch_size=250).divergences
    totals = [found[c, "tuned"].by_prompt[0] for c in (NONE, *candidates)]
    return {"base": totals[0], "steered": torch.stack(totals[1:])}


def nats(totals: Tensor) -> Divergences:
    return Divergences(totals[:, None], torch.ones(len(totals), 1, dtype=torch.bool))


def one_draw(pool: dict[str, Tensor], n: int, rng: np.random.Generator) -> dict[str, bool]:
    """Return which bounds of a run of `n` prompts hold what all prompts say."""
    rows = rng.choice(len(pool["base"]), n, replace=False)
    base, steered = pool["base"][rows], pool["steered"][:, rows]
    true = 1 - pool["steered"].sum(1) / pool["base"].sum()
    a, b = rng.choice(len(steered), 2, replace=False)
    found = [nats(row) for row in steered]
    gap = float(true[a] - true[b])
    ours = recovered_interval(found[a], nats(base))
    paired = difference_interval(found[a], found[b], nats(base))
    again = rng.integers(0, n, (RESAMPLES, n))

    def bootstrap(numerator: Tensor) -> tuple[float, float]:
        shares = numerator.numpy()[again].sum(1) / base.numpy()[again].sum(1)
        low, high = np.quantile(shares, [0.025, 0.975])
        return float(low), float(high)

    estimates = 1 - steered.sum(1) / base.sum()
    width = critical_value(found, nats(base), seed=int(rows[0]))
    lowest = estimates - width * jackknife_sem(steered, base)
    delta = stats.t.ppf(0.975, n - 1) * recovered(found[a], nats(base))[1]
    return {
        "recovered": ours.low <= true[a] <= ours.high,
        "difference": paired.low <= gap <= paired.high,
        "all candidates": bool((lowest <= true).all()),
        "recovered, delta method": abs(float(estimates[a] - true[a])) <= delta,
        "recovered, bootstrap": _within(bootstrap(base - steered[a]), float(true[a])),
        "difference, bootstrap": _within(bootstrap(steered[b] - steered[a]), gap),
    }


def _within(bounds: tuple[float, float], value: float) -> bool:
    return bounds[0] <= value <= bounds[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pool_file = args.out / "pool.safetensors"
    if not pool_file.is_file():
        write_tensors({k: v.float() for k, v in make_pool().items()}, pool_file)
    pool = {name: tensor.double() for name, tensor in load_file(pool_file).items()}
    rng, rows = np.random.default_rng(0), []
    for n in PROMPTS:
        held = pd.DataFrame([one_draw(pool, n, rng) for _ in range(DRAWS)]).mean()
        rows.append({"prompts": n, "draws": DRAWS, **held.round(4)})
    frame = pd.DataFrame(rows)
    frame.to_csv(args.out / "coverage.csv", index=False)
    print(frame.to_string(index=False))


if __name__ == "__main__":
    main()
