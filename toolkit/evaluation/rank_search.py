"""The smallest set of ranks that brings the steered model within a given KL of the tuned one.

A march says what each direction of each block explains, an error put into each block what it costs
at the end. Together they order all directions of all blocks; sets of more and more of them are
fitted sequentially and judged on the prompts of held-out documents.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from toolkit.adapters.collection import Adapters
from toolkit.analysis.divergence import Divergences, recovered
from toolkit.analysis.rank_budget import ladder, predicted, spread
from toolkit.documents.tokens import encode_all
from toolkit.errors import InputError
from toolkit.evaluation.allocation import BlockErrors, block_errors
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import evaluate
from toolkit.fitting.closed_form import Plan, fit_adapters
from toolkit.models.pair import ModelPair

WIDEST = 64  # of the widest set tried, on average over blocks
AT_ONCE = 3  # sets fitted in one march
NO_STEERING = -1  # its place below the ladder of sets
Row = dict[str, Any]


@dataclass(frozen=True)
class RankSearch:
    """The smallest set of ranks within `max_kl`, and all that was tried.

    ranks: by block; empty where no steering is needed, None where no set that was tried suffices.
    adapters: those of the set (of the nearest, where none suffices; None where none is needed).
    tried: a row for every set, the smallest first: `total` of its ranks, `parameters`, `predicted`
        nats, `kl` and `kl_sem` (tuned forcing), `recovered`, `recovered_sem`, `n_prompts`, `ranks`.
        The first row is no steering.
    """

    max_kl: float
    ranks: tuple[int, ...] | None
    adapters: Adapters | None
    tried: pd.DataFrame = field(compare=False)

    @property
    def chosen(self) -> pd.Series:
        """The row of the smallest set within `max_kl`, or of the nearest."""
        within = self.tried[self.tried.kl <= self.max_kl]
        return self.tried.loc[self.tried.kl.idxmin()] if within.empty else within.iloc[0]

    @property
    def next_smaller(self) -> pd.Series | None:
        """The row of the next smaller set, which was tried too and fails."""
        smaller = self.tried[self.tried.total < self.chosen.total]
        return None if smaller.empty else smaller.iloc[-1]


def smallest_ranks(
    pair: ModelPair,
    documents: Iterable[Any],
    max_kl: float,
    max_length: int = 512,
    new_tokens: int = 32,
    max_prompts: int | None = None,
    seed: int = 0,
    show_progress: bool = False,
    errors: BlockErrors | None = None,
) -> RankSearch:
    """Find the fewest ranks, spread over blocks, whose post-block adapters hold `max_kl`.

    `max_kl` is ``KL(tuned ‖ steered)`` in nats a generated token. Sets form a ladder, each about
    1.19 times the one before; the answer's neighbour below it is tried too, and fails. Both are
    judged on the same held-out prompts, which chose: a bound that is just held may just be missed
    on others. `errors` are those of `block_errors` on the same documents, where they are there
    already: that saves a march. Raises InputError for a bound that is not above 0.
    """
    require_bound(max_kl)
    documents = list(documents)
    errors = errors or block_errors(
        pair, documents, max_length, seed=seed, show_progress=show_progress
    )
    held_out = [d for d in encode_all(documents, pair.tokenizer, max_length) if d.held_out]
    prompts = [d.prompt_ids for d in held_out[:max_prompts]]

    def fit(plans: Sequence[Plan]) -> dict[Plan, Adapters]:
        return fit_adapters(
            pair, documents, plans, max_length=max_length, seed=seed, show_progress=show_progress
        )

    trials = _Trials(pair, prompts, new_tokens, errors, fit)
    index = search(len(trials.sets), trials.guess(max_kl), lambda at: trials.hold(at, max_kl))
    tried = pd.DataFrame([trials.rows[place] for place in sorted(trials.rows)])
    if trials.rows[NO_STEERING]["kl"] <= max_kl:
        return RankSearch(max_kl, (), None, tried)
    if index is None:
        nearest = min(trials.adapters, key=lambda place: trials.rows[place]["kl"])
        return RankSearch(max_kl, None, trials.adapters[nearest], tried)
    return RankSearch(max_kl, trials.sets[index], trials.adapters[index], tried)


def require_bound(max_kl: float) -> None:
    """Raise InputError unless `max_kl` is a number of nats above 0."""
    if not max_kl > 0:
        raise InputError(f"max_kl is {max_kl}: expected nats per token, a number above 0")


class _Trials:
    """A ladder of sets, and what came out of those that were fitted and judged."""

    def __init__(
        self,
        pair: ModelPair,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        errors: BlockErrors,
        fit: Callable[[Sequence[Plan]], dict[Plan, Adapters]],
    ) -> None:
        self.pair, self.prompts, self.new_tokens, self.fit = pair, prompts, new_tokens, fit
        totals = ladder(pair.n_layers, min(WIDEST, len(errors.gains[0])))
        self.sets = [spread(errors.gains, total, errors.costs) for total in totals]
        self.predicted = [predicted(errors.left, errors.costs, ranks) for ranks in self.sets]
        self.rows: dict[int, Row] = {}
        self.adapters: dict[int, Adapters] = {}

    def guess(self, max_kl: float) -> int:
        """The smallest set that is predicted to hold `max_kl`."""
        holding = (place for place, kl in enumerate(self.predicted) if kl <= max_kl)
        return next(holding, len(self.sets) - 1)

    def hold(self, places: Sequence[int], max_kl: float) -> list[bool]:
        """Whether the sets at `places` of the ladder do."""
        plans = {p: Plan("post_block", "linear", self.sets[p], "sequential") for p in places}
        fitted = self.fit(list(plans.values()))
        candidates = {place: Candidate.of(fitted[plan]) for place, plan in plans.items()}
        found = evaluate(
            self.pair, self.prompts, list(candidates.values()), self.new_tokens
        ).divergences
        base = found[NONE, "tuned"]
        self.rows[NO_STEERING] = self._row(NO_STEERING, NONE, base, base)
        for place, candidate in candidates.items():
            self.adapters[place] = fitted[plans[place]]
            self.rows[place] = self._row(place, candidate, found[candidate, "tuned"], base)
        return [self.rows[place]["kl"] <= max_kl for place in places]

    def _row(self, place: int, candidate: Candidate, kl: Divergences, base: Divergences) -> Row:
        share, share_sem = recovered(kl, base)
        ranks = self.sets[place] if place != NO_STEERING else ()
        return {
            "total": sum(ranks),
            "parameters": candidate.parameters,
            "predicted": self.predicted[place] if ranks else float("nan"),
            "kl": kl.mean,
            "kl_sem": kl.sem,
            "recovered": share,
            "recovered_sem": share_sem,
            "n_prompts": len(kl.nats),
            "ranks": "-".join(map(str, ranks)),
        }


def search(n: int, guess: int, holds: Callable[[Sequence[int]], Sequence[bool]]) -> int | None:
    """The smallest of n growing sets that `holds`, or None: the one below it was asked about too.

    `holds` is asked about a few sets at a time, first about `guess` and its surroundings.
    """
    below, above = -1, n
    wanted = sorted({max(guess - AT_ONCE, 0), guess, min(guess + AT_ONCE, n - 1)})
    while wanted:
        held = dict(zip(wanted, holds(wanted), strict=True))
        above = min([above, *(place for place, does in held.items() if does)])
        below = max([below, *(p for p, does in held.items() if not does and p < above)])
        inside = range(below + 1, above)
        if above == n and inside:  # none so far: wider ones, the widest among them
            wanted = sorted({inside[len(inside) // 3], inside[2 * len(inside) // 3], inside[-1]})
        else:
            parts = min(AT_ONCE, len(inside))
            wanted = sorted({inside[(k + 1) * len(inside) // (parts + 1)] for k in range(parts)})
    return above if above < n else None
