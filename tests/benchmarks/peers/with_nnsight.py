"""nnsight: a trace saves the states of every layer and location, then the statistics."""

from collections import defaultdict

import nnsight
import torch
from common import LOCATIONS, analysed, counted, report, task
from nnsight import TransformersModel


def states_of(model, ids):
    """All states of one batch, in the order in which the model computes them."""
    with model.trace(ids):
        found = list().save()  # noqa: C408
        for block in model.model.layers:
            found.append(block.self_attn.output[0])
            found.append(block.mlp.output)
            found.append(block.output)
    return found


def run(models, batches):
    kept = []
    for model in models:
        arrays = defaultdict(list)
        for ids in batches:
            for index, states in enumerate(states_of(model, ids)):
                layer, place = divmod(index, len(LOCATIONS))
                states = states[0] if isinstance(states, tuple) else states
                arrays[layer, LOCATIONS[place]].append(counted(states))
        kept.append(arrays)
    return list(analysed(*kept))


@torch.no_grad()
def main():
    *folders, batches = task()
    models = [
        TransformersModel(str(folder), task="text-generation", dispatch=True) for folder in folders
    ]
    report(
        nnsight.__version__,
        lambda: run(models, batches),
        lambda: [states_of(model, batches[0][:1]) for model in models],
    )


main()
