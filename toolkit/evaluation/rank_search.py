"""The smallest set of ranks that brings the steered model within a given KL of the tuned one.

A march says what each direction of each block explains, an error put into each block what it costs
at the end. Together they order all directions of all blocks; sets of more and more of them are
fitted sequentially and judged on the prompts of held-out documents.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import pandas as pd

from toolkit.adapters.collection import Adapters
from toolkit.analysis.divergence import Divergences, recovered
from toolkit.analysis.rank_budget import ladder, predicted, spread
from toolkit.documents.corpus import Corpus, Reading
from toolkit.errors import InputError
from toolkit.evaluation.allocation import BlockErrors, block_errors
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import Evaluation, Tensors, evaluate, reference_of
from toolkit.evaluation.reference import Reference
from toolkit.fitting.block_result import KeptMarch
from toolkit.fitting.closed_form import fit_adapters
from toolkit.fitting.spec import FitSpec
from toolkit.models.pair import ModelPair
from toolkit.runtime.processes import ALONE, Processes

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


@dataclass(frozen=True)
class KeptRound:
    """Where one round of the search keeps what is finished: its march, and what candidates gave."""

    march: KeptMarch
    outcomes: MutableMapping[str, Tensors]


@dataclass(frozen=True)
class Known:
    """Hold what a diagnosis knows before the search: every block's errors, and the tuned model's
    continuations of the prompts.
    """

    errors: BlockErrors
    reference: Reference


# many parameters: all but three say how, and have defaults
def smallest_ranks(
    pair: ModelPair,
    documents: Iterable[Any] | Corpus,
    max_kl: float,
    new_tokens: int = 32,
    max_prompts: int | None = None,
    *,
    show_progress: bool = False,
    known: Known | None = None,
    kept: Callable[[str], KeptRound] | None = None,
    processes: Processes = ALONE,
    **reading: Unpack[Reading],
) -> RankSearch:
    """Find the fewest ranks, spread over blocks, whose post-block adapters hold `max_kl`.

    `max_kl` is ``KL(tuned ‖ steered)`` in nats a generated token. Sets form a ladder, each about
    1.19 times the one before; the answer's neighbour below it is tried too, and fails. Both are
    judged on the same held-out prompts, which chose: a bound that is just held may just be missed
    on others. `known` is what a diagnosis of the same documents has already: it saves a march and
    a generation. `kept` gives the folders of a round by its name; all `processes` share the work.
    Raises InputError for a bound that is not above 0.
    """
    require_bound(max_kl)
    corpus = pair.corpus(documents, **reading)
    if known is None:
        errors = block_errors(pair, corpus, show_progress)
        known = Known(errors, reference_of(pair, corpus.prompts(max_prompts), new_tokens))
    judge = _Judge(pair, corpus, known.reference, show_progress, kept, processes)
    trials = _Trials(known.errors, judge)
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


@dataclass(frozen=True)
class _Judge:
    """Fits sets of ranks and compares them with the tuned model."""

    pair: ModelPair
    corpus: Corpus
    reference: Reference
    show_progress: bool
    kept: Callable[[str], KeptRound] | None
    processes: Processes

    def __call__(
        self, sets: Mapping[int, tuple[int, ...]]
    ) -> tuple[dict[int, Candidate], Evaluation]:
        """Return the candidates of `sets`, by their places on the ladder, and what came out."""
        specs = {p: FitSpec("post_block", "linear", r, "sequential") for p, r in sets.items()}
        kept = self.kept("-".join(map(str, sets))) if self.kept else None
        fitted = fit_adapters(
            self.pair,
            self.corpus,
            list(specs.values()),
            show_progress=self.show_progress,
            kept=kept.march if kept else None,
            processes=self.processes,
        )
        candidates = {p: Candidate.of(fitted[spec], key=spec) for p, spec in specs.items()}
        found = evaluate(
            self.pair,
            self.reference,
            list(candidates.values()),
            kept=kept.outcomes if kept else None,
            processes=self.processes,
        )
        return candidates, found


class _Trials:
    """A ladder of sets, and what came out of those that were fitted and judged."""

    def __init__(self, errors: BlockErrors, judge: _Judge) -> None:
        self.judge = judge
        totals = ladder(len(errors.gains), min(WIDEST, len(errors.gains[0])))
        self.sets = [spread(errors.gains, total, errors.costs) for total in totals]
        self.predicted = [predicted(errors.left, errors.costs, ranks) for ranks in self.sets]
        self.rows: dict[int, Row] = {}
        self.adapters: dict[int, Adapters] = {}

    def guess(self, max_kl: float) -> int:
        """Return the smallest set that is predicted to hold `max_kl`."""
        holding = (place for place, kl in enumerate(self.predicted) if kl <= max_kl)
        return next(holding, len(self.sets) - 1)

    def hold(self, places: Sequence[int], max_kl: float) -> list[bool]:
        """Return whether the sets at `places` of the ladder do."""
        candidates, evaluation = self.judge({place: self.sets[place] for place in places})
        found = evaluation.divergences
        base = found[NONE, "tuned"]
        self.rows[NO_STEERING] = self._row(NO_STEERING, NONE, base, base)
        for place, candidate in candidates.items():
            assert candidate.adapters is not None
            self.adapters[place] = candidate.adapters
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
