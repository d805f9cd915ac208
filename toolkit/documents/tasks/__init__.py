"""Tasks: examples by split, and how an answer is read and scored."""

from collections.abc import Callable
from pathlib import Path

from toolkit.documents.tasks.answers import Answers
from toolkit.documents.tasks.choice import ARC, BoolQ, Winogrande
from toolkit.documents.tasks.gsm8k import GSM8K
from toolkit.documents.tasks.jsonl import JSONLines
from toolkit.documents.tasks.listops import ListOps
from toolkit.documents.tasks.task import Example, Task, chance
from toolkit.errors import InputError

TASKS: dict[str, Callable[..., Task]] = {
    "listops": lambda *_: ListOps(),
    "listops-worked": lambda *_: ListOps(worked=True, prompt="{expression} ="),
    "gsm8k": GSM8K,
    "boolq": BoolQ,
    "arc-easy": lambda *files: ARC("Easy", *files),
    "arc-challenge": lambda *files: ARC("Challenge", *files),
    "winogrande": Winogrande,
    "jsonl": JSONLines,
    "answers": Answers,
}


def make_task(name: str, train: Path | None = None, test: Path | None = None) -> Task:
    """Return the task called `name`, from the hub, a generator, or the files that are given."""
    if name not in TASKS:
        raise InputError(f"no task is called {name!r}: expected one of {', '.join(TASKS)}")
    made = TASKS[name](train, test)
    if isinstance(made, ListOps) and (train or test):
        raise InputError(f"{name} draws its own examples: leave out --train and --test")
    return made


__all__ = [
    "ARC",
    "GSM8K",
    "TASKS",
    "BoolQ",
    "Example",
    "JSONLines",
    "ListOps",
    "Task",
    "Winogrande",
    "chance",
    "make_task",
]
