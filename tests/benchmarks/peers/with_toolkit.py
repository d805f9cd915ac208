"""The toolkit: the march without forced passes, and its sums and fits."""

from importlib.metadata import version

import torch
from common import LOCATIONS, report, task
from toolkit_batches import batch

from toolkit import ModelPair
from toolkit.analysis.linear_fit import explained, fit_linear
from toolkit.lockstep.march import March
from toolkit.runtime.lapack import quiet_openblas
from toolkit.statistics import MomentSums

PAIRS = (("x", "x"), ("t", "x"), ("t", "t"))


def run(pair, batches):
    rows = []
    march = March(pair.base_runner, pair.tuned_runner, batches, LOCATIONS, forced=False)
    for layer in march.layers():
        sums = {location: MomentSums(PAIRS) for location in LOCATIONS}
        for step in march.steps(layer):
            for location in LOCATIONS:
                x, t = step.source("free", location), step.delta("free", location)
                sums[location].update({"x": x, "t": t})
        for location in sorted(LOCATIONS):
            moments = sums[location].result()
            fit, energy = fit_linear(moments, "x", "t", max_rank=0), moments.energy("t")
            share = explained(fit, moments, "x", "t", energy, ("full",))["full"]
            rows.append((layer, location, float(moments.covariance["t", "t"].trace()), share))
        march.advance(layer, {})
    return rows


@torch.no_grad()
@quiet_openblas()
def main():
    base, tuned, ids = task()
    pair = ModelPair.load(base, tuned)
    batches = [batch(some) for some in ids]
    report(
        version("oracle-toolkit"),
        lambda: run(pair, batches),
        lambda: pair.base_runner.entering(batch(ids[0][:1])),
    )


main()
