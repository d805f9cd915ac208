"""Two places at once: in each block an adapter before the MLP, and one after the block.

The second is fitted to what the first left missing of the block's output, so that neither is asked
for what the other has supplied.
"""

from collections.abc import Iterable
from typing import Any, Unpack

import torch

from toolkit.adapters.collection import Adapters
from toolkit.analysis.linear_fit import fit_linear
from toolkit.documents.corpus import Corpus, Reading
from toolkit.fitting.closed_form import march_for, require, steering
from toolkit.fitting.fit_statistics import PAIRS, STATE, TARGET, FitStatistics
from toolkit.fitting.from_moments import adapter_from
from toolkit.fitting.spec import FitSpec
from toolkit.models.deltas import delta, wide
from toolkit.models.pair import ModelPair
from toolkit.runtime.progress import progress
from toolkit.statistics import MomentSums


@torch.no_grad()
def fit_two_places(
    pair: ModelPair,
    documents: Iterable[Any] | Corpus,
    before: int,
    after: int,
    *,
    show_progress: bool = False,
    **reading: Unpack[Reading],
) -> tuple[Adapters, Adapters]:
    """Fit sequential adapters of rank `before` before the MLP and of rank `after` after the block.

    One march over the fit documents. Rank 0 is a fixed vector. Attach both, one inside the other.
    """
    require(pair, "pre_mlp")
    corpus = pair.corpus(documents, **reading)
    spec = FitSpec.linear("pre_mlp", before, "sequential")
    march = march_for(pair, corpus, [spec])
    first, second = {}, {}
    n_steps = pair.n_layers * len(corpus.fit_batches)
    with progress("fitting at two places", n_steps, show_progress) as advance:
        for layer in march.layers():
            with march.resident(layer):
                statistics = FitStatistics(spec)
                for step in march.steps(layer):
                    statistics.update(step)
                    advance()
                first[layer] = statistics.adapter(layer, pair.dtype)
                march.advance(layer, steering({spec: first[layer]}, pair))
            sums = MomentSums(PAIRS)
            for index, batch in enumerate(corpus.fit_batches):
                steered, tuned = (
                    wide(batch.of_counted(march.entering(name, index)))
                    for name in (spec.name, "tuned")
                )
                sums.update({STATE: steered, TARGET: delta(tuned, steered)})
            fit = fit_linear(sums.result(), STATE, TARGET, max_rank=after)
            second[layer] = adapter_from(fit, after, pair.dtype).to(pair.device)
            march.add(spec.name, second[layer])
    return (
        Adapters("pre_mlp", first, "sequential"),
        Adapters("post_block", second, "sequential"),
    )
