"""What it costs to steer after the block in place of after the MLP, in KL on held-out prompts."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import pandas as pd

from toolkit.adapters.collection import Adapters
from toolkit.analysis.divergence import recovered, recovered_difference
from toolkit.analysis.linear_fit import RELATIVE_RIDGE
from toolkit.documents.corpus import Corpus
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import Evaluation, evaluate
from toolkit.fitting.closed_form import fit_adapters
from toolkit.fitting.spec import FitSpec
from toolkit.models.pair import ModelPair
from toolkit.theory.replication import Stream, replicate


# many parameters: an experiment, of which each is varied
def replication_cost(
    pair: ModelPair,
    documents: Iterable[Any] | Corpus,
    rank: int = 8,
    fits: Sequence[Literal["forced", "sequential"]] = ("forced", "sequential"),
    streams: Sequence[Stream] = ("base", "steered", "own"),
    n_prompts: int = 8,
    n_new: int = 24,
    max_length: int = 512,
    relative_ridge: float = RELATIVE_RIDGE,
) -> pd.DataFrame:
    """Tell what it costs in KL to steer after the block with ``A P*`` in place of A after the MLP.

    Adapters of `rank` in every block, fitted and judged as everywhere: tuned forcing, held-out
    prompts. Beside them stand adapters fitted after the block themselves. ``lost`` is what A
    recovers less what the row recovers, with its standard error over the same prompts.
    """
    corpus = pair.corpus(documents, max_length=max_length)
    specs = {
        (fit, location): FitSpec(location, "linear", rank, fit)
        for fit in fits
        for location in ("post_mlp", "post_block")
    }
    fitted = fit_adapters(pair, corpus, list(specs.values()))
    labelled: dict[tuple[str, str, str], Adapters] = {}
    for fit in fits:
        behind_mlp = fitted[specs[fit, "post_mlp"]]
        labelled[fit, "post-MLP A", ""] = behind_mlp
        for stream in streams:
            made = replicate(pair, corpus, behind_mlp, stream, max_length, relative_ridge)
            labelled[fit, "post-block A P*", stream] = made
        labelled[fit, "post-block fitted", ""] = fitted[specs[fit, "post_block"]]
    candidates = {label: Candidate.of(found, key=label) for label, found in labelled.items()}
    prompts = corpus.prompts(n_prompts)
    evaluation = evaluate(pair, prompts, list(candidates.values()), n_new)
    reference: dict[str, Candidate] = {fit: candidates[fit, "post-MLP A", ""] for fit in fits}
    return pd.DataFrame(
        [_cost_row(*label, c, evaluation, reference[label[0]]) for label, c in candidates.items()]
    )


def _cost_row(
    fit: str,
    adapter: str,
    stream: str,
    candidate: Candidate,
    evaluation: Evaluation,
    reference: Candidate,
) -> dict[str, Any]:
    assert candidate.adapters is not None
    base, own, other = (evaluation.divergences[c, "tuned"] for c in (NONE, candidate, reference))
    share, share_sem = recovered(own, base)
    lost, lost_sem = recovered_difference(other, own, base)
    r2 = list(candidate.adapters.info.get("r2", {}).values())
    return {
        "fit": fit,
        "adapter": adapter,
        "stream": stream,
        "parameters": candidate.parameters,
        "steer_r2_median": float(pd.Series(r2, dtype=float).median()),
        "kl_base": base.mean,
        "kl": own.mean,
        "kl_sem": own.sem,
        "recovered": share,
        "recovered_sem": share_sem,
        "lost": lost,
        "lost_sem": lost_sem,
        "n_prompts": len(own.nats),
    }
