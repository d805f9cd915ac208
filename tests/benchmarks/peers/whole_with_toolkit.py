"""The same diagnosis by the toolkit: one march, and the fits put in place of tuning."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from common import LOCATIONS, report, task
from toolkit_batches import batch

from toolkit import ModelPair
from toolkit.adapters.collection import Adapters
from toolkit.analysis.linear_fit import fit_linear
from toolkit.analysis.spectrum import spectrum
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import evaluate
from toolkit.fitting.from_moments import adapter_from
from toolkit.lockstep.march import March
from toolkit.runtime.lapack import quiet_openblas
from toolkit.statistics import MomentSums

PAIRS = (("x", "x"), ("t", "x"), ("t", "t"))
RANKS = (0, 8, 32, "full")


def marched(pair, batches):
    """Rows of spectra, and adapters by location and rank, from one march."""
    rows, adapters = [], {(place, rank): {} for place in LOCATIONS for rank in RANKS}
    march = March(pair.base_runner, pair.tuned_runner, batches, LOCATIONS, forced=False)
    for layer in march.layers():
        sums = {location: MomentSums(PAIRS) for location in LOCATIONS}
        for step in march.steps(layer):
            for place in LOCATIONS:
                sums[place].update(
                    {"x": step.source("free", place), "t": step.delta("free", place)}
                )
        for place in sorted(LOCATIONS):
            moments = sums[place].result()
            shape = spectrum(moments.second_moment("t"), moments.mean["t"], 1.0, moments.n)
            rows.append([f"{(layer, place)} rms", shape.rms])
            rows.append([f"{(layer, place)} participation", shape.participation_ratio])
            fit = fit_linear(moments, "x", "t", max_rank=32)
            for rank in RANKS:
                adapters[place, rank][layer] = adapter_from(fit, rank)
        march.advance(layer, {})
    return rows, adapters


def run(pair, batches, prompts, n_new):
    rows, adapters = marched(pair, batches)
    candidates = {
        key: Candidate.of(Adapters(key[0], by_layer, "free")) for key, by_layer in adapters.items()
    }
    found = evaluate(pair, prompts, list(candidates.values()), n_new).divergences
    rows.append(["base", found[NONE, "tuned"].mean])
    for (place, rank), candidate in candidates.items():
        name = f"{place} {576 if rank == 'full' else rank}"
        rows.append([name, found[candidate, "tuned"].mean])
    return rows


@torch.no_grad()
@quiet_openblas()
def main():
    base, tuned, ids = task()
    asked = json.loads((Path(sys.argv[1]) / "prompts.json").read_text())
    pair = ModelPair.load(base, tuned)
    batches = [batch(some) for some in ids]
    report(
        version("oracle-toolkit"),
        lambda: run(pair, batches, asked["prompts"], asked["new_tokens"]),
        lambda: pair.base_runner.entering(batch(ids[0][:1])),
    )


main()
