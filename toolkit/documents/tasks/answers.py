"""Any file of questions with their final answers."""

import json
import re
from collections.abc import Mapping
from typing import Any, final

from toolkit.documents.tasks.gsm8k import NUMBER
from toolkit.documents.tasks.task import Example, Source, StoredTask
from toolkit.errors import InputError

MARKER = re.compile(r"####|answer is", re.IGNORECASE)
WORD = re.compile(rf"{NUMBER}|\w+")


@final
class Answers(StoredTask):
    """Questions of a file, each with ``prompt``, ``answer`` and perhaps ``response``.

    A text is right where the answer's words stand in it, whole and one after the other: in the line
    after its last ``####`` or ``answer is``, or anywhere if it has neither. Case, punctuation and
    the commas within numbers do not matter.
    """

    name = "answers"
    new_tokens = 128

    def from_hub(self, row: Mapping[str, Any]) -> Example:
        raise NotImplementedError

    def _stored(self, source: Source) -> list[Example]:
        if self.files[source] is None:
            raise InputError(f"the task answers needs --{source} FILE")
        found = super()._stored(source)
        if source == "train" and not all(example.response for example in found):
            raise InputError(
                "a line of --train has no response to learn from: expected JSON lines with prompt, "
                "answer and response"
            )
        return found

    def extract(self, text: str) -> str | None:
        """Return the words among which the answer is looked for, a space between them."""
        *_, last = MARKER.split(text)
        stated = last.strip().split("\n")[0] if MARKER.search(text) else text
        return " ".join(word.replace(",", "") for word in WORD.findall(stated.casefold())) or None

    def correct(self, text: str, example: Example) -> bool:
        return f" {example.answer} " in f" {self.extract(text)} "

    def _parse(self, where: str, line: str) -> Example:
        try:
            row = json.loads(line)
            prompt, answer, response = row["prompt"], row["answer"], row.get("response", "")
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f'{where}: expected an object with "prompt" and "answer" ({error!r})'
            ) from error
        texts = all(isinstance(text, str) for text in (prompt, answer, response))
        words = self.extract(answer) if texts else None
        if not (words and prompt):
            raise InputError(
                f"{where}: prompt, answer and response must be texts, the first two not empty"
            )
        return Example(prompt, response, words)
