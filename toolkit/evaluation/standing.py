"""Says what a comparison has found so far, while it runs."""

from collections.abc import Callable, Mapping

from torch import Tensor

from toolkit.analysis.divergence import Divergences, recovered
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.tables.words import candidate_name

ATTRIBUTES = ("location", "kind", "rank", "fit", "layers")


class Standing:
    """Says which candidate is the best so far.

    Candidates are told by `seen` as they come, one batch of prompts after the other: in the first
    batch a better one is said at once, after later ones the best of all is said. With several
    processes the first one says what is better among its own candidates, in the first batch.
    """

    def __init__(self, say: Callable[[str], None], n_candidates: int) -> None:
        self.say, self.n_candidates = say, n_candidates
        self._found: dict[Candidate, Divergences] = {}
        self._best, self._n_seen = 0.0, 0
        self._who: Candidate | None = None

    def seen(self, candidate: Candidate | None, found: Mapping[str, Tensor]) -> None:
        """Take what one batch of prompts gave for `candidate`."""
        if candidate is None or "tuned.nats" not in found:
            return
        part = Divergences(found["tuned.nats"], found["tuned.counted"])
        known = self._found.get(candidate)
        ours = self._found[candidate] = Divergences.join([known, part]) if known else part
        if candidate == NONE:
            self._best, self._n_seen, self._who = 0.0, 0, None
        if candidate.adapters is None:  # no steering, the oracle, or a change of weights
            return
        self._n_seen += 1
        base = self._found.get(NONE)
        # With several processes each looks at some of them: without no steering nothing is said.
        share = recovered(ours, base)[0] if base and len(base.nats) == len(ours.nats) else 0.0
        better, first = share > self._best, known is None
        if better:
            self._best, self._who = share, candidate
        if self._who and (better if first else self._n_seen == self.n_candidates):
            self._say(self._who)

    def _say(self, best: Candidate) -> None:
        name = candidate_name({key: getattr(best, key) for key in ATTRIBUTES})
        n_prompts = len(self._found[best].nats)
        self.say(
            f"best so far: {name} recovers {self._best:.3f} of the KL on {n_prompts} prompts "
            f"({self._n_seen} of {self.n_candidates} looked at)"
        )
