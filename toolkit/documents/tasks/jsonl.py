"""Any file of prompts and responses."""

from collections.abc import Mapping
from typing import Any, final

from toolkit.documents.tasks.task import Example, Source, StoredTask
from toolkit.errors import InputError


@final
class JSONLines(StoredTask):
    """The answer is the whole response, without the space around it."""

    name = "jsonl"
    new_tokens = 64

    def from_hub(self, row: Mapping[str, Any]) -> Example:
        raise NotImplementedError

    def _stored(self, source: Source) -> list[Example]:
        if self.files[source] is None:
            raise InputError(f"the task jsonl needs --{source} FILE")
        return super()._stored(source)

    def extract(self, text: str) -> str | None:
        return text.strip() or None

    def correct(self, text: str, example: Example) -> bool:
        return self.extract(text) == example.answer.strip()
