"""The ceiling of every place: adapters of two sizes, trained through the network on the KL."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from toolkit.adapters.collection import Adapters
from toolkit.diagnosis.distillation_plan import Plan, plans
from toolkit.diagnosis.options import Options
from toolkit.documents.corpus import Corpus
from toolkit.evaluation.candidates import Candidate
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
