"""Plan what is distilled at every place, and how long that takes, without the trainer."""

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.documents.corpus import Corpus
from toolkit.evaluation.candidates import Candidate
from toolkit.fitting.spec import FitSpec

RANK = 8
PASSES = 3.5  # of a token: the tuned model's, the steered model's and back, and the head


@dataclass(frozen=True)
class Plan:
    """Hold what is distilled at one place, and from which fit."""

    location: str
    kind: str
    rank: int
    start: Candidate

    @property
    def name(self) -> str:
        return f"{self.location}-{self.rank}"


def plans(candidates: Sequence[Candidate], branches: Sequence[str]) -> list[Plan]:
    """Return what is distilled: a vector and a map of rank 8 at every place, from its fit.

    The start is fixed beforehand, not chosen on the prompts that judge: for a map the sequential
    fit; for a vector the forced one, since a sequential vector can be worse than nothing.
    """
    known = {candidate.key: candidate for candidate in candidates if candidate.layers == "all"}
    found = []
    for location in branches:
        for rank, fit in ((0, "forced"), (RANK, "sequential")):
            spec = FitSpec.linear(location, rank, fit)  # type: ignore[arg-type]
            if spec in known:
                found.append(Plan(location, spec.kind, rank, known[spec]))
    return found


def estimated_seconds(
    corpus: Corpus, n_plans: int, steps: int, march_seconds: float, n_streams: int
) -> float:
    """Estimate what distilling every place takes, from the speed of the march that has run."""
    tokens = sum(len(document.ids) for document in corpus.encoded)
    fit = [len(document.ids) for document in corpus.fit]
    passed = 3.0 * tokens + n_streams * sum(fit)
    batch = 8 * sum(fit) / max(len(fit), 1)
    return march_seconds / max(passed, 1.0) * PASSES * batch * steps * n_plans
