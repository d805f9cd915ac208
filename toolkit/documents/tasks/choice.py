"""Questions with a few answers to choose from, in the wording of LLM-Adapters (Hu et al. 2023).

``the correct answer is X`` is what training teaches; X is read from anywhere in a response, the
last one counts.
"""

import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, final

from toolkit.documents.tasks.task import Example, StoredTask


class Choice(StoredTask):
    """A task whose answers are among the words that `words` matches."""

    words: str
    new_tokens = 12

    @abstractmethod
    def from_hub(self, row: Mapping[str, Any]) -> Example: ...

    def extract(self, text: str) -> str | None:
        found = re.findall(rf"\b(?:{self.words})\b", text.lower())
        return found[-1] if found else None


@final
class BoolQ(Choice):
    """Yes or no, without the passage (Clark et al. 2019, arXiv:1905.10044)."""

    name = "boolq"
    hub = ("google/boolq", None, "train", "validation")
    words = "true|false"

    def from_hub(self, row: Mapping[str, Any]) -> Example:
        prompt = (
            f"Please answer the following question with true or false, question: {row['question']}?"
        )
        return _example(f"{prompt}\n\nAnswer format: true/false", str(row["answer"]).lower())


@final
class ARC(Choice):
    """School science, easy or challenging (Clark et al. 2018, arXiv:1803.05457)."""

    words = "answer[1-5]"

    def __init__(self, level: str = "Easy", *files: Any) -> None:
        super().__init__(*files)
        self.name = f"arc-{level.lower()}"
        self.hub = ("allenai/ai2_arc", f"ARC-{level}", "train", "test")

    def from_hub(self, row: Mapping[str, Any]) -> Example:
        texts, labels = row["choices"]["text"], row["choices"]["label"]
        return _chosen(
            f"Please choose the correct answer to the question: {row['question']}",
            texts,
            labels.index(row["answerKey"]),
        )


@final
class Winogrande(Choice):
    """Who or what fills the gap (Sakaguchi et al. 2019, arXiv:1907.10641)."""

    name = "winogrande"
    hub = ("allenai/winogrande", "winogrande_xl", "train", "validation")
    words = "option[12]"

    def from_hub(self, row: Mapping[str, Any]) -> Example:
        prompt = (
            "Please choose the correct answer to fill in the blank to complete the given sentence: "
            f"{row['sentence']}\n\nOption1: {row['option1']} Option2: {row['option2']} "
            "Answer format: option1/option2"
        )
        return _example(prompt, f"option{row['answer']}")


def _chosen(question: str, texts: list[str], right: int) -> Example:
    numbered = " ".join(f"Answer{i}: {text}" for i, text in enumerate(texts, 1))
    form = "/".join(f"answer{i}" for i in range(1, len(texts) + 1))
    prompt = f"{question}\n\n{numbered}\n\nAnswer format: {form}"
    return _example(prompt, f"answer{right + 1}")


def _example(prompt: str, answer: str) -> Example:
    return Example(prompt, f"the correct answer is {answer}", answer)
