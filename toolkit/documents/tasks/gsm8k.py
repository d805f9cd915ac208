"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): school mathematics in words."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from toolkit.documents.tasks.task import Example, StoredTask

# Commas belong to a number where they stand before three digits; a dash after one is no sign.
NUMBER = r"(?:(?<!\d)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"


@final
class GSM8K(StoredTask):
    """The answer is the last number of the response."""

    name = "gsm8k"
    hub = ("openai/gsm8k", "main", "train", "test")

    def __init__(self, train: str | Path | None = None, test: str | Path | None = None) -> None:
        super().__init__(train, test)
        self.new_tokens = 200

    def from_hub(self, row: Mapping[str, Any]) -> Example:
        answer = row["answer"].split("#### ")[-1].replace(",", "")
        return Example(row["question"], row["answer"], answer)

    def extract(self, text: str) -> str | None:
        numbers = re.findall(NUMBER, text)
        return numbers[-1].replace(",", "") if numbers else None

    def correct(self, text: str, example: Example) -> bool:
        said = self.extract(text)
        return said is not None and float(said) == float(example.answer)
