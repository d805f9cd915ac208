"""The ceiling of every place: adapters of two sizes, trained through the network on the KL."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from toolkit.adapters.collection import Adapters
from toolkit.diagnosis.options import Options
from toolkit.documents.corpus import Corpus
from toolkit.evaluation.candidates import Candidate
from toolkit.fitting.spec import FitSpec
from toolkit.models.pair import ModelPair
from toolkit.runtime.processes import ALONE, Processes
from toolkit.training.distillation import (
    Row,
    continuations,
    default_options,
    distil,
    set_apart,
)
from toolkit.training.methods import Method

RANK = 8
PASSES = 3.5  # of a token: the tuned model's, the steered model's and back, and the head


@dataclass(frozen=True)
class Plan:
    """What is distilled at one place: from which fit."""

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


# many parameters: what a run has, and how it shows and shares its work
def distilled_candidates(
    pair: ModelPair,
    corpus: Corpus,
    candidates: Sequence[Candidate],
    options: Options,
    folder: Path | None = None,
    processes: Processes = ALONE,
    show_progress: bool = False,
) -> list[Candidate]:
    """Distil adapters at every place; with a `folder`, finished ones are read from there."""
    todo = plans(candidates, pair.branches)
    rows: list[Row] = []

    def sampled() -> list[Row]:
        if not rows:
            fit, _ = set_apart(corpus.fit)
            rows.extend(continuations(pair, fit, 64, options.seed, show_progress))
        return rows

    def made(plan: Plan) -> Adapters:
        place = folder / plan.name if folder else None
        if place and (place / "adapters.json").is_file():
            return Adapters.from_pretrained(place)
        chosen = default_options(pair, True, options.distil, seed=options.seed)
        start = plan.start.adapters
        found = distil(
            pair,
            corpus,
            Method(plan.name, plan.kind, plan.location, plan.rank),
            chosen,
            start=start,
            sampled=sampled(),
            folder=place / "checkpoints" if place else None,
            show_progress=show_progress,
        ).adapters
        if place:
            found.save_pretrained(place)
        return found

    adapters = processes.spread([partial(made, plan) for plan in todo])
    return [
        Candidate(("distilled", plan.location, plan.rank), adapters=found)
        for plan, found in zip(todo, adapters, strict=True)
    ]


def estimated_seconds(
    corpus: Corpus, n_plans: int, steps: int, march_seconds: float, n_streams: int
) -> float:
    """Estimate what distilling every place takes, from the speed of the march that has run."""
    tokens = sum(len(document.ids) for document in corpus.encoded)
    fit = [len(document.ids) for document in corpus.fit]
    passed = 3.0 * tokens + n_streams * sum(fit)
    batch = 8 * sum(fit) / max(len(fit), 1)
    return march_seconds / max(passed, 1.0) * PASSES * batch * steps * n_plans
