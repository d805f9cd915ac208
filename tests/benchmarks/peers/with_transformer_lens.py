"""TransformerLens: ``run_with_cache`` of its bridge (weights as they are), then the statistics."""

from collections import defaultdict
from importlib.metadata import version

import torch
from common import analysed, counted, report, task
from transformer_lens.model_bridge import TransformerBridge

NAMES = {"pre_mlp": "hook_attn_out", "post_mlp": "hook_mlp_out", "post_block": "hook_resid_post"}


def run(models, batches):
    kept = []
    for model in models:
        arrays = defaultdict(list)
        places = {
            f"blocks.{layer}.{name}": (layer, location)
            for layer in range(model.cfg.n_layers)
            for location, name in NAMES.items()
        }
        for ids in batches:
            _, cache = model.run_with_cache(ids, names_filter=list(places))
            for name, place in places.items():
                arrays[place].append(counted(cache[name]))
        kept.append(arrays)
    return list(analysed(*kept))


@torch.no_grad()
def main():
    *folders, batches = task()
    models = [
        TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
        for folder in folders
    ]
    report(
        version("transformer-lens"),
        lambda: run(models, batches),
        lambda: [model(batches[0][:1]) for model in models],
    )


main()
