"""interp-engine: its own capture of every layer and location, then the statistics."""

from collections import defaultdict
from importlib.metadata import version

import torch
from common import analysed, counted, report, task
from interp_engine.capture import capture
from interp_engine.model import EagerModel

NAMES = {"pre_mlp": "attn_out", "post_mlp": "mlp_out", "post_block": "resid_post"}


def run(models, batches):
    kept = []
    for model in models:
        arrays = defaultdict(list)
        places = [(layer, location) for layer in range(model.n_layers) for location in NAMES]
        points = [(NAMES[location], layer) for layer, location in places]
        for ids in batches:
            cache = capture(model, ids, points)
            for place, point in zip(places, points, strict=True):
                arrays[place].append(counted(cache[point]))
        kept.append(arrays)
    return list(analysed(*kept))


@torch.no_grad()
def main():
    *folders, batches = task()
    models = [
        EagerModel.from_pretrained(str(folder), dtype="float32", device="cpu") for folder in folders
    ]
    report(
        version("interp-engine"),
        lambda: run(models, batches),
        lambda: [capture(model, batches[0][:1], [("resid_post", 0)]) for model in models],
    )


main()
