"""Of several closed-form fits, the one that comes nearest to the tuned model."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from toolkit.adapters.collection import Adapters
from toolkit.analysis.divergence import recovered
from toolkit.documents.tokens import encode_all
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import evaluate
from toolkit.fitting.closed_form import Plan, fit_adapters
from toolkit.models.pair import ModelPair

BLENDS = (0.25, 0.5, 0.75)


def candidates_of(plan: Plan) -> list[Plan]:
    """`plan` fitted forced, sequentially, and in between."""
    ends = [replace(plan, fit="forced", blend=0.0), replace(plan, fit="sequential", blend=1.0)]
    return ends + [replace(plan, fit="blended", blend=blend) for blend in BLENDS]


def best_fit(
    pair: ModelPair,
    documents: Iterable[Any],
    plans: Sequence[Plan],
    max_length: int = 512,
    new_tokens: int = 32,
    max_prompts: int = 16,
    seed: int = 0,
    show_progress: bool = False,
) -> tuple[Adapters, dict[Plan, tuple[float, float]]]:
    """Fit all of `plans` in one march; keep the one that recovers most of the KL.

    Judged on the prompts of held-out documents, where none was fitted: so it is not worse than any
    of them there. Returns the adapters, and every plan's share recovered with its standard error.
    """
    documents = list(documents)
    fitted = fit_adapters(
        pair, documents, plans, max_length=max_length, seed=seed, show_progress=show_progress
    )
    held_out = [d for d in encode_all(documents, pair.tokenizer, max_length) if d.held_out]
    prompts = [document.prompt_ids for document in held_out[:max_prompts]]
    # Candidates are told apart by their words: two blends of one kind need a name of their own.
    candidates = {plan: replace(Candidate.of(fitted[plan]), fit=plan.name) for plan in plans}
    found = evaluate(pair, prompts, list(candidates.values()), new_tokens).divergences
    shares = {
        plan: recovered(found[candidate, "tuned"], found[NONE, "tuned"])
        for plan, candidate in candidates.items()
    }
    best = max(shares, key=lambda plan: shares[plan][0])
    fitted[best].info["recovered"] = dict(zip(("mean", "sem"), shares[best], strict=True))
    return fitted[best], shares
