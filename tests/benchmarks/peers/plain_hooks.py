"""Plain forward hooks: all states as numpy arrays, then the statistics.

The first argument after the task's says how: `lstsq` (np.cov and np.linalg.lstsq), `products`
(normal equations), or `streamed` (no arrays are kept: float64 sums grow in the hooks' wake).
"""

import sys
from collections import defaultdict

import numpy as np
import torch
import transformers
from common import LOCATIONS, analysed, by_moments, by_numpy, by_products, counted, report, task
from transformers import AutoModelForCausalLM


def hooked(model, found):
    """Let every pass of `model` put its states into `found`, by layer and location."""
    for layer, block in enumerate(model.model.layers):
        modules = (block.self_attn, block.mlp, block)
        for location, module in zip(LOCATIONS, modules, strict=True):

            def keep(_module, _args, output, place=(layer, location)):
                found[place].append(counted(output[0] if isinstance(output, tuple) else output))

            module.register_forward_hook(keep)


def run(models, found, batches, fit):
    for model in models:
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    return list(analysed(*found, fit))


def run_streamed(models, found, batches):
    """Sums of products of x and t, of every layer and location, batch by batch."""
    sums = {}
    for ids in batches:
        for model in models:
            model(input_ids=ids, use_cache=False)
        for place in found[0]:
            x = found[0][place].pop().astype(np.float64)
            t = found[1][place].pop() - x
            parts = (len(x), x.sum(0), t.sum(0), x.T @ x, t.T @ x, t.T @ t)
            before = sums.get(place, (0,) * len(parts))
            sums[place] = tuple(a + b for a, b in zip(before, parts, strict=True))
    rows = []
    for (layer, location), (n, x, t, xx, tx, tt) in sorted(sums.items()):
        x, t, energy = x / n, t / n, np.trace(tt) / n
        xx, tx, tt = xx / n - np.outer(x, x), tx / n - np.outer(t, x), tt / n - np.outer(t, t)
        rows.append((layer, location, *by_moments(xx, tx, tt, energy)))
    return rows


@torch.no_grad()
def main():
    *folders, batches = task()
    how = sys.argv[4]
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    found = defaultdict(list), defaultdict(list)
    for model in models:
        model(input_ids=batches[0][:1], use_cache=False)
    for model, states in zip(models, found, strict=True):
        hooked(model, states)
    fit = {"lstsq": by_numpy, "products": by_products}.get(how)
    if fit:
        report(transformers.__version__, lambda: run(models, found, batches, fit), lambda: None)
    else:
        version = transformers.__version__
        report(version, lambda: run_streamed(models, found, batches), lambda: None)


main()
