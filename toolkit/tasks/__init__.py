"""Tasks: examples by split, and how an answer is read and scored."""

from collections.abc import Callable
from pathlib import Path

from toolkit.errors import InputError
from toolkit.tasks.choice import ARC, BoolQ, Winogrande
from toolkit.tasks.gsm8k import GSM8K
from toolkit.tasks.jsonl import JSONLines
from toolkit.tasks.listops import ListOps
from toolkit.tasks.task import Example, Task, chance

TASKS: dict[str, Callable[..., Task]] = {
    "listops": lambda *_: ListOps(),
    "listops-worked": lambda *_: ListOps(worked=True, prompt="{expression} ="),
    "gsm8k": GSM8K,
    "boolq": BoolQ,
    "arc-easy": lambda *files: ARC("Easy", *files),
    "arc-challenge": lambda *files: ARC("Challenge", *files),
    "winogrande": Winogrande,
    "jsonl": JSONLines,
}


def make_task(name: str, train: Path | None = None, test: Path | None = None) -> Task:
    """The task called `name`, from the hub, a generator, or the files that are given."""
    if name not in TASKS:
        raise InputError(f"no task is called {name!r}: expected one of {', '.join(TASKS)}")
    return TASKS[name](train, test)


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
