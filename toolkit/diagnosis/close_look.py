"""A close look at the few models that the report speaks of, on prompts that did not choose them.

The comparison looks at many candidates in one way; this looks at few in many ways.
"""

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from toolkit.analysis.divergence import FLOOR_NATS, Divergences
from toolkit.diagnosis.certificates import certificates
from toolkit.diagnosis.consequences import consequences
from toolkit.diagnosis.distribution_rows import distribution_tables
from toolkit.diagnosis.other_data import OtherData
from toolkit.documents.corpus import Corpus
from toolkit.documents.tokens import Encoded
from toolkit.evaluation.candidates import NONE, Candidate
from toolkit.evaluation.compare import Evaluation, evaluate
from toolkit.evaluation.named_models import BASE, RECOMMENDED, RUNNER_UP, TUNED
from toolkit.evaluation.recommend import Recommendation
from toolkit.evaluation.reference import Reference
from toolkit.models.pair import ModelPair
from toolkit.runtime.check import Check
from toolkit.runtime.processes import ALONE, Processes

Row = dict[str, Any]


@dataclass(frozen=True)
class Shown:
    """One model that the report speaks of: the base as `candidate` changes it, or (None) the tuned.

    `name` is base, tuned, recommended or runner-up.
    """

    name: str
    candidate: Candidate | None

    @contextmanager
    def model(self, pair: ModelPair) -> Iterator[nn.Module]:
        """Give the model; the base is as it was afterwards."""
        if self.candidate is None:
            yield pair.tuned
            return
        with self.candidate.attached(pair.base, pair.base_runner.sites):
            yield pair.base


@dataclass(frozen=True)
class Reporting:
    """The documents whose prompts report, and what the tuned model generated from the first ones.

    `known` are its tokens, by prompt, of at most `n_new`. `apart`: these prompts had no part in
    choosing.
    """

    documents: Sequence[Encoded]
    known: Sequence[Sequence[int]]
    apart: bool
    n_new: int

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The tokens of the prompts."""
        return [document.prompt_ids for document in self.documents]


@dataclass(frozen=True)
class CloseLook:
    """Hold what was found: `rows` by table, and what was proved of the models.

    `evaluation` has the divergences of no steering, the recommended and the runner-up on the
    prompts that report; `apart`: these had no part in choosing.
    """

    evaluation: Evaluation
    rows: dict[str, list[Row]]
    checks: list[Check]
    apart: bool


def sides(
    asked: Sequence[Encoded], reporting: Sequence[Encoded], base: Divergences
) -> tuple[list[int], list[int]]:
    """Return which rows of `asked` choose, and which of them report.

    All do both where no document is `reporting`, or where there is nothing to recover on one side;
    `base` are the divergences of `asked` without steering.
    """
    every = list(range(len(asked)))
    ours = [row for row in every if asked[row].reports]
    chooses = [row for row in every if not asked[row].reports]
    changed = [base.of_prompts(side).mean >= FLOOR_NATS for side in (chooses, ours) if side]
    return (chooses, ours) if reporting and all(changed) else (every, every)


def shown_models(choice: Recommendation | None) -> list[Shown]:
    """Return base, tuned, and, where something was chosen, the recommended and the runner-up."""
    found = [Shown(BASE, NONE), Shown(TUNED, None)]
    if choice:
        found.append(Shown(RECOMMENDED, choice.chosen))
        if choice.runner_up:
            found.append(Shown(RUNNER_UP, choice.runner_up))
    return found


def named_candidates(models: Sequence[Shown]) -> dict[str, Candidate]:
    """Return, by name, the candidates among `models`: all but the tuned model."""
    return {shown.name: shown.candidate for shown in models if shown.candidate is not None}


def close_look(
    pair: ModelPair,
    corpus: Corpus,
    reporting: Reporting,
    models: Sequence[Shown],
    other: OtherData,
    show_progress: bool = False,
    kept: MutableMapping[str, dict[str, Tensor]] | None = None,
    processes: Processes = ALONE,
) -> CloseLook:
    """Look at `models` on the prompts that report, and at `other` questions and prompts as well.

    `kept` has what an interrupted run compared on these prompts, and is given what this one does.
    All `processes` share the work.
    """
    documents, prompts, n_new = reporting.documents, reporting.prompts, reporting.n_new
    reference = Reference(pair.tuned, pair.tokenizer, prompts, n_new)
    reference.remember(reporting.known)
    steered = [shown.candidate for shown in models if shown.candidate not in (None, NONE)]
    compared = [candidate for candidate in steered if candidate]
    evaluation = evaluate(pair, reference, compared, kept=kept, processes=processes)
    named = {shown.name: partial(shown.model, pair) for shown in models}
    rows = consequences(pair, named, corpus, documents, reference, other, show_progress, processes)
    rows |= distribution_tables(
        pair, corpus, documents, named_candidates(models), evaluation, n_new, processes
    )
    checks = certificates(named, corpus, prompts, processes)
    return CloseLook(evaluation, rows, checks, reporting.apart)
