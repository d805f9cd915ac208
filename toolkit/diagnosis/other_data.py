"""What a run looks at beside its documents: a task's questions, and prompts from elsewhere."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.documents.documents import Document, as_document, read_bytes
from toolkit.documents.formats import rows_of
from toolkit.documents.tasks import make_task
from toolkit.documents.tasks.answers import Answers
from toolkit.documents.tasks.task import Task
from toolkit.documents.tokens import encode
from toolkit.errors import InputError
from toolkit.evaluation.accuracy import prompts_of
from toolkit.evaluation.questions import Questions
from toolkit.models.pair import ModelPair
from toolkit.tables.words import OWN_PROMPTS

N_QUESTIONS = 200
MOST_PROMPTS = 24  # of each file from elsewhere, its first
RESPONSES = ("response", "completion")


@dataclass(frozen=True)
class OtherData:
    """Hold the `questions` whose answers are scored, and documents `elsewhere`, by file name.

    `identity` says what was read, with hashes of it.
    """

    questions: Questions | None = None
    elsewhere: Mapping[str, Sequence[Document]] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)

    def prompts(self, pair: ModelPair, n_new: int) -> dict[str, list[tuple[int, ...]]]:
        """Tokenise the first prompts of each file.

        Raises InputError where the models of `pair` cannot read these with `n_new` tokens after
        each, or the questions with the tokens of an answer.
        """
        if self.questions:
            asked = prompts_of(pair.tokenizer, self.questions.examples)
            task = self.questions.task
            pair.require_prompts(asked, task.new_tokens, f"the task {task.name}")
        found = self.tokens(pair.tokenizer)
        for name, prompts in found.items():
            pair.require_prompts(prompts, n_new, name)
        return found

    def tokens(self, tokenizer: Any) -> dict[str, list[tuple[int, ...]]]:
        """Tokenise the first prompts of each file; raises InputError where one has none."""
        found = {}
        for name, documents in self.elsewhere.items():
            every = (encode(document, tokenizer).prompt_ids for document in documents)
            found[name] = [prompt for prompt in every if prompt]
            if not found[name]:
                raise InputError(f"{name} has no prompt with a token")
        return found


@dataclass(frozen=True)
class OtherFiles:
    """Name the files of `OtherData`, as a command does.

    A `task` with its `test` file, or a file of `answers`, of which the first `n_questions` (None:
    200) are asked; and files of prompts `elsewhere`.
    """

    task: str | None = None
    test: Path | None = None
    answers: Path | None = None
    n_questions: int | None = None
    elsewhere: Sequence[Path] = ()

    def read(self, documents: Sequence[Document]) -> OtherData:
        """Read the files; questions that are `documents` of the data are left out."""
        questions = None
        identity: dict[str, Any] = {}
        if task := self._task():
            questions = Questions.of(task, documents, self.n_questions or N_QUESTIONS)
            identity["task"] = {
                "name": task.name,
                "file": str(self.test or self.answers or ""),
                "questions": len(questions.examples),
                "left_out": questions.left_out,
                "sha256": _hash([vars(example) for example in questions.examples]),
            }
        elsewhere: dict[str, list[Document]] = {}
        for path in self.elsewhere:
            if path.name in elsewhere:
                raise InputError(f"two files of --elsewhere are called {path.name}: rename one")
            if path.name == OWN_PROMPTS:
                raise InputError(
                    f"--elsewhere {path}: tables call the data's prompts so: rename it"
                )
            elsewhere[path.name] = _read_prompts(path)[:MOST_PROMPTS]
        if elsewhere:
            hashes = {name: _hash([d.content for d in found]) for name, found in elsewhere.items()}
            identity["elsewhere"] = hashes
        return OtherData(questions, elsewhere, identity)

    def _task(self) -> Task | None:
        if self.task and self.answers:
            raise InputError("--task and --answers both name questions: give one of them")
        if self.test and not self.task:
            raise InputError("--test has the questions of a task: give --task NAME as well")
        if self.n_questions is not None and self.n_questions < 1:
            raise InputError(f"--questions is {self.n_questions}: expected 1 or more")
        if self.n_questions and not (self.task or self.answers):
            raise InputError("--questions counts a task's questions: give --task or --answers too")
        if self.answers:
            return Answers(test=self.answers)
        return make_task(self.task, test=self.test) if self.task else None


def _read_prompts(path: Path) -> list[Document]:
    """Read documents as those of any data file; here a prompt needs no response."""
    found = []
    for where, row in rows_of(read_bytes(path), path):
        alone = isinstance(row, dict) and "prompt" in row and not any(n in row for n in RESPONSES)
        found.append(as_document({**row, "response": "."} if alone else row, where))
    return found


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
