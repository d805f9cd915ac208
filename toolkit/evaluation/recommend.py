"""The answer: the smallest adapters that recover as much as is asked for.

Where other prompts report what is chosen, each candidate's own bound at 95 % chooses: what it is
worth is then seen where it had no part. Where the same prompts do both, the bound holds over all
candidates looked at: from the distribution of the largest of their absolute t statistics, drawn
with the correlation that the errors of candidates have over prompts (a parametric single-step
max-t, Westfall and Young 1993), and the jackknife's standard errors. Two-sided, as the errors of
few prompts are skewed. It holds in 92 to 95 of 100 draws of 16 to 50 prompts, and in fewer of 4 or
8, 77 and 88 (``data/recipes/coverage.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from toolkit.analysis.divergence import FLOOR_NATS, Divergences, recovered
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import Evaluation
from toolkit.evaluation.intervals import LEVEL, jackknife_sem, t_quantile

WORTHLESS = 0.0  # recovering no more than no steering does
DRAWS, AT_ONCE = 4000, 200
MANY = 256  # prompts; Student's quantile is then within .5 % of the normal one


@dataclass(frozen=True)
class Recommendation:
    """The smallest candidate whose recovery is at least `target`, or the nearest to it.

    `lower` is the bound of its recovery, over all `n_candidates` where the same prompts report;
    `reached`: it is no less than the target. `best` is the candidate that recovers most; `smaller`
    recovers most of those that hold fewer numbers, which does not reach the target; `runner_up` is
    what would be chosen if `chosen` were not there. `n_prompts` chose.
    """

    chosen: Candidate
    recovered: float
    recovered_sem: float
    lower: float
    target: float
    reached: bool
    best: Candidate
    smaller: Candidate | None
    runner_up: Candidate | None
    n_candidates: int
    n_prompts: int


def recommend(
    candidates: Sequence[Candidate],
    evaluation: Evaluation,
    target: float = 0.9,
    apart: bool = False,
) -> Recommendation | None:
    """Choose for `target`; None where nothing recovers more than no steering does.

    So too where there is nothing to recover: where the models differ by rounding alone. `apart`:
    other prompts report, and a bound for each candidate alone chooses.

    Without a bound (a single prompt) no target is reached.
    """
    found = {c: evaluation.divergences[c, "tuned"] for c in candidates}
    base = evaluation.divergences[NONE, "tuned"]
    scores = {c: recovered(d, base) for c, d in found.items()}
    if base.mean < FLOOR_NATS:
        return None
    if not scores or max(score for score, _ in scores.values()) <= WORTHLESS:
        return None
    n = len(base.nats)
    width = t_quantile(n) if apart else critical_value(list(found.values()), base)
    lower = {
        c: scores[c][0] - width * float(jackknife_sem(d.by_prompt[0], base.by_prompt[0]))
        for c, d in found.items()
    }
    best = max(scores, key=lambda c: scores[c][0])
    reaching = sorted(
        (c for c in candidates if lower[c] >= target), key=lambda c: (c.parameters, -scores[c][0])
    )
    nearest = sorted(scores, key=lambda c: -scores[c][0])
    chosen, *others = [*reaching, *(c for c in nearest if c not in reaching)]
    below = [c for c in candidates if c.parameters < chosen.parameters]
    return Recommendation(
        chosen=chosen,
        recovered=scores[chosen][0],
        recovered_sem=scores[chosen][1],
        lower=lower[chosen],
        target=target,
        reached=bool(reaching),
        best=best,
        smaller=max(below, key=lambda c: scores[c][0], default=None),
        runner_up=others[0] if others else None,
        n_candidates=len(candidates),
        n_prompts=n,
    )


def critical_value(found: Sequence[Divergences], base: Divergences, seed: int = 0) -> float:
    """Return how many standard errors below its recovery every candidate's bound lies.

    NaN with a single prompt; 0 where no candidate's recovery varies over prompts.
    """
    total = base.by_prompt[0]
    n = len(total)
    if n < 2:
        return float("nan")
    ratios = torch.stack([d.by_prompt[0] for d in found])
    shares = ratios.sum(1, keepdim=True) / total.sum()
    errors = shares * total - ratios  # what each prompt adds to the error of a recovery, [k, n]
    errors = errors[errors.square().sum(1) > 1e-24 * total.square().sum()]
    if not len(errors):
        return 0.0
    generator = torch.Generator().manual_seed(seed)
    directions = errors / errors.norm(dim=1, keepdim=True)
    if n > MANY:  # so many prompts know each standard error, and normal errors remain
        noise = torch.randn(DRAWS, n, generator=generator, dtype=errors.dtype)
        return float((noise @ directions.T).abs().max(1).values.quantile(LEVEL))
    largest = []
    for _ in range(DRAWS // AT_ONCE):
        noise = torch.randn(AT_ONCE, n, n, generator=generator, dtype=errors.dtype)
        drawn = noise @ directions.T  # [draws, prompts, candidates]
        largest.append((drawn.mean(1) / drawn.std(1) * n**0.5).abs().max(1).values)
    return float(torch.cat(largest).quantile(LEVEL))
