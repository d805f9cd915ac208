"""What a task is: examples by split, and whether an answer is right."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from toolkit.errors import InputError

Split = Literal["train", "validation", "test"]
Source = Literal["train", "test"]
VALIDATION_SHARE = 8  # one training example in eight chooses learning rates, and is not trained on


@dataclass(frozen=True)
class Example:
    """A prompt, the response that training teaches, and the answer that is scored."""

    prompt: str
    response: str
    answer: str


class Task(ABC):
    """Examples by split, and how an answer is read out of what a model says.

    `new_tokens`: how long a response may get.
    """

    name: str
    new_tokens: int = 32

    @abstractmethod
    def examples(self, split: Split, n: int | None = None, seed: int = 0) -> list[Example]:
        """Return the examples of `split`, at most `n`; no prompt is in two splits."""

    @abstractmethod
    def extract(self, text: str) -> str | None:
        """Return the answer that `text` gives, or None."""

    def correct(self, text: str, example: Example) -> bool:
        return self.extract(text) == example.answer


class StoredTask(Task):
    """A task whose examples are rows of a hub data set, or of two JSON-lines files.

    Each line is an object with ``prompt``, ``response`` and, where it cannot be read out of the
    response, ``answer``. Validation examples are cut from the training split by the hash of their
    prompts.
    """

    hub: tuple[str, str | None, str, str]  # path, configuration, train and test split

    def __init__(self, train: str | Path | None = None, test: str | Path | None = None) -> None:
        self.files = {"train": train, "test": test}

    @abstractmethod
    def from_hub(self, row: Mapping[str, Any]) -> Example:
        """A row of the hub's data set."""

    def examples(self, split: Split, n: int | None = None, seed: int = 0) -> list[Example]:
        source: Source = "test" if split == "test" else "train"
        unique = {example.prompt: example for example in self._stored(source)}
        if split != "test":
            for prompt in self._tested():
                unique.pop(prompt, None)
        found = list(unique.values())
        if split != "test":
            found = [e for e in found if _validates(e) == (split == "validation")]
        if not found:
            raise InputError(f"{self.name} has no {split} examples: give more training examples")
        return found[:n]

    def _tested(self) -> set[str]:
        """The prompts of the test split, where it comes from where the training split does."""
        if self.files["test"] is None and self.files["train"] is not None:
            return set()
        return {example.prompt for example in self._stored("test")}

    def _stored(self, source: Source) -> list[Example]:
        path = self.files[source]
        if path is not None:
            return [self._parse(*line) for line in _lines(Path(path))]
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise InputError(
                f"{self.name} needs --{source} FILE (JSON lines with prompt, response, answer), "
                "or the package datasets to take it from the hub "
                "(pip install 'oracle-toolkit[hub]')"
            ) from error
        name, configuration, *splits = self.hub
        try:
            rows = load_dataset(name, configuration, split=splits[source == "test"])
        except OSError as error:
            raise InputError(
                f"the hub's data set {name} cannot be had ({error}): give --{source} FILE "
                "(JSON lines with prompt, response, answer)"
            ) from error
        return [self.from_hub(row) for row in rows]

    def _parse(self, where: str, line: str) -> Example:
        try:
            row = json.loads(line)
            prompt, response = row["prompt"], row["response"]
            answer = self.extract(row.get("answer", response)) or ""
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f'{where}: expected an object with "prompt", "response", "answer" ({error!r})'
            ) from error
        if not all(isinstance(text, str) and text for text in (prompt, response, answer)):
            raise InputError(
                f"{where}: prompt and response must be texts, not empty, and the answer "
                f"one that {self.name} can read"
            )
        return Example(prompt, response, answer)


def chance(train: Sequence[Example], test: Sequence[Example]) -> float:
    """The accuracy on `test` of always giving the answer that is most frequent in `train`."""
    constant = Counter(example.answer for example in train).most_common(1)[0][0]
    return sum(example.answer == constant for example in test) / len(test)


def hash_of(text: str) -> int:
    """32 bits of the text's sha256: what decides a split depends on the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def _validates(example: Example) -> bool:
    return hash_of(example.prompt) % VALIDATION_SHARE == 0


def _lines(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise InputError(f"no such data file: {path}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    return [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
