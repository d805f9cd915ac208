"""Which adapters to recommend, from what they recover on held-out prompts and what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.analysis.divergence import Divergences, recovered, recovered_difference
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import Evaluation

WORTHLESS = 0.0  # recovering no more than no steering does


@dataclass(frozen=True)
class Recommendation:
    """The smallest of the candidates that cannot be told from the best.

    Two candidates are told apart when their `recovered` on the same held-out prompts differs by
    more than one standard error of that difference (the one-standard-error rule). `tied` are the
    candidates that are not, the chosen one left out; `best` is the one that recovers most. The
    prompts that chose also give the figure, which is slightly flattering.
    """

    chosen: Candidate
    recovered: float
    recovered_sem: float
    best: Candidate
    best_recovered: float
    tied: tuple[Candidate, ...]


def recommend(candidates: Sequence[Candidate], evaluation: Evaluation) -> Recommendation | None:
    """None where nothing recovers more than no steering, or where the models agree already."""
    divergences = {c: evaluation.divergences[c, "tuned"] for c in candidates}
    base = evaluation.divergences[NONE, "tuned"]
    scores = {c: recovered(d, base)[0] for c, d in divergences.items()}
    if not scores or max(scores.values()) <= WORTHLESS:
        return None
    best = max(scores, key=lambda c: scores[c])
    equal = [c for c in candidates if _equal(divergences[best], divergences[c], base)]
    chosen = min(equal, key=lambda c: (c.parameters, -scores[c]))
    return Recommendation(
        chosen=chosen,
        recovered=scores[chosen],
        recovered_sem=recovered(divergences[chosen], base)[1],
        best=best,
        best_recovered=scores[best],
        tied=tuple(c for c in equal if c != chosen),
    )


def _equal(best: Divergences, other: Divergences, base: Divergences) -> bool:
    difference, sem = recovered_difference(best, other, base)
    return difference == 0 or difference <= sem
