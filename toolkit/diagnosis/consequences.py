"""What steering is worth beyond a divergence: on responses, on the task, and elsewhere."""

from collections.abc import Sequence
from typing import Any

from toolkit.diagnosis.other_data import OtherData
from toolkit.documents.corpus import Corpus
from toolkit.documents.tokens import Encoded
from toolkit.evaluation.elsewhere import elsewhere_rows
from toolkit.evaluation.named_models import NamedModels
from toolkit.evaluation.questions import task_rows
from toolkit.evaluation.reference import Reference
from toolkit.evaluation.response_loss import response_loss_rows
from toolkit.models.pair import ModelPair
from toolkit.runtime.processes import ALONE, Processes
from toolkit.runtime.progress import progress
from toolkit.tables.words import OWN_PROMPTS


def consequences(
    pair: ModelPair,
    models: NamedModels,
    corpus: Corpus,
    documents: Sequence[Encoded],
    here: Reference,
    other: OtherData,
    show_progress: bool,
    processes: Processes = ALONE,
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of ``response_loss``, ``task`` and ``elsewhere``, by table.

    `documents` are those that report, and `here` what the tuned model makes of their prompts. All
    `processes` share the work.
    """
    found = {"response_loss": response_loss_rows(models, corpus, documents, processes)}
    if questions := other.questions:
        n_batches = questions.n_batches(models, processes)
        with progress("answering the task's questions", n_batches, show_progress) as advance:
            found["task"] = task_rows(models, pair.tokenizer, questions, advance, processes)
    n_new = here.batches[0].n_new
    if elsewhere := other.prompts(pair, n_new):
        references = {OWN_PROMPTS: here} | {
            name: Reference(pair.tuned, pair.tokenizer, prompts, n_new)
            for name, prompts in elsewhere.items()
        }
        found["elsewhere"] = elsewhere_rows(models, references, processes)
    return found
