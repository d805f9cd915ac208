"""Of several closed-form fits, the one that comes nearest to the tuned model."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Unpack

from toolkit.adapters.collection import Adapters
from toolkit.analysis.divergence import recovered
from toolkit.documents.corpus import Corpus, Reading
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import evaluate
from toolkit.fitting.closed_form import fit_adapters
from toolkit.fitting.spec import FitSpec
from toolkit.models.pair import ModelPair

BLENDS = (0.25, 0.5, 0.75)


def candidates_of(spec: FitSpec) -> list[FitSpec]:
    """`spec` fitted forced, sequentially, and in between."""
    ends = [replace(spec, fit="forced", blend=0.0), replace(spec, fit="sequential", blend=1.0)]
    return ends + [replace(spec, fit="blended", blend=blend) for blend in BLENDS]


def best_fit(
    pair: ModelPair,
    documents: Iterable[Any] | Corpus,
    specs: Sequence[FitSpec],
    new_tokens: int = 32,
    max_prompts: int = 16,
    show_progress: bool = False,
    **reading: Unpack[Reading],
) -> tuple[Adapters, dict[FitSpec, tuple[float, float]]]:
    """Fit all of `specs` in one march; keep the one that recovers most of the KL.

    Judged on the prompts of held-out documents, where none was fitted: so it is not worse than any
    of them there. Returns the adapters, and every spec's share recovered with its standard error.
    """
    corpus = pair.corpus(documents, **reading)
    fitted = fit_adapters(pair, corpus, specs, show_progress=show_progress)
    candidates = {spec: Candidate.of(fitted[spec], key=spec) for spec in specs}
    prompts = corpus.prompts(max_prompts)
    found = evaluate(pair, prompts, list(candidates.values()), new_tokens).divergences
    shares = {
        spec: recovered(found[candidate, "tuned"], found[NONE, "tuned"])
        for spec, candidate in candidates.items()
    }
    best = max(shares, key=lambda spec: shares[spec][0])
    fitted[best].info["recovered"] = dict(zip(("mean", "sem"), shares[best], strict=True))
    return fitted[best], shares
