"""The task itself: which questions each model answers rightly, and which it keeps and gains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from toolkit.documents.documents import Document
from toolkit.documents.tasks.task import Example, Task
from toolkit.errors import InputError
from toolkit.evaluation.accuracy import bootstrap, correct, share_right
from toolkit.evaluation.named_models import BASE, TUNED, NamedModels, each_model, n_own
from toolkit.runtime.processes import ALONE, Processes

QUESTIONS_A_BATCH = 64


@dataclass(frozen=True)
class Questions:
    """Test questions of a task; `left_out` counts those that are documents of the data as well."""

    task: Task
    examples: Sequence[Example]
    left_out: int

    @classmethod
    def of(cls, task: Task, documents: Sequence[Document], n: int) -> "Questions":
        """Return the first `n` test questions of `task` that are none of `documents`.

        A question is a document where it is its prompt, or where the document's text begins with
        it. Raises InputError where none is left.
        """
        known = {document.prompt.strip() for document in documents if document.prompt}
        texts = tuple(document.text.strip() for document in documents if document.text)
        examples: list[Example] = []
        left_out = 0
        for example in task.examples("test"):
            asked = example.prompt.strip()
            if asked in known or any(text.startswith(asked) for text in texts):
                left_out += 1
            elif len(examples) < n:
                examples.append(example)
        if not examples:
            raise InputError(
                f"all {left_out} test questions of {task.name} are documents of the data: give "
                "others"
            )
        return cls(task, examples, left_out)

    def n_batches(self, models: NamedModels, processes: Processes = ALONE) -> int:
        """Count how often `task_rows` advances in this process."""
        return n_own(models, processes) * -(-len(self.examples) // QUESTIONS_A_BATCH)


def task_rows(
    models: NamedModels,
    tokenizer: Any,
    questions: Questions,
    advance: Callable[[], None] = lambda: None,
    processes: Processes = ALONE,
) -> list[dict[str, Any]]:
    """Return the rows of the table ``task``: each model's accuracy on `questions`.

    All `processes` share the models.
    """
    task, examples = questions.task, questions.examples

    def look(_: str, model: nn.Module) -> np.ndarray:
        return correct(model, tokenizer, task, examples, QUESTIONS_A_BATCH, advance)

    right = each_model(models, look, processes)
    return [{**row, "left_out": questions.left_out} for row in compared(right)]


def compared(right: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Compare models by what each has right, bool `[n_questions]` by name, on the same questions.

    Intervals are at 95 %, by the bootstrap over questions; that of a difference is paired.
    """
    base, tuned = right[BASE], right[TUNED]
    rows = []
    for name, ours in right.items():
        low, high = bootstrap(ours)
        difference = ours.astype(float) - tuned
        least, most = bootstrap(difference)
        kept, kept_of = share_right(ours, base)
        gained, gained_of = share_right(ours, tuned & ~base)
        rows.append(
            {
                "model": name,
                "accuracy": float(ours.mean()),
                "accuracy_low": low,
                "accuracy_high": high,
                "difference": float(difference.mean()),
                "difference_low": least,
                "difference_high": most,
                "kept": kept,
                "kept_of": kept_of,
                "gained": gained,
                "gained_of": gained_of,
                "right": int(ours.sum()),
                "n_questions": len(ours),
            }
        )
    return rows
