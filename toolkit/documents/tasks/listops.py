"""ListOps (Nangia and Bowman 2018, arXiv:1804.06028): nested operations on lists of digits."""

import random
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from toolkit.documents.tasks.task import Example, Split, Task, hash_of
from toolkit.errors import InputError

OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "MAX": max,
    "MIN": min,
    "MED": lambda values: int(statistics.median(values)),
    "SM": lambda values: sum(values) % 10,
}
PATIENCE = 10_000  # draws in a row without a new expression: there are no more, or nearly
INSTRUCTION = "Evaluate: {expression}"


@dataclass(frozen=True)
class Operation:
    """An operator and what it takes: digits and operations."""

    operator: str
    arguments: "tuple[Operation | int, ...]"

    def __str__(self) -> str:
        return f"[{self.operator} {' '.join(map(str, self.arguments))} ]"

    @property
    def value(self) -> int:
        return OPERATORS[self.operator]([value_of(argument) for argument in self.arguments])

    @property
    def steps(self) -> list[tuple[str, int]]:
        """Every operation on digits alone, innermost first, with its value."""
        inner = [s for a in self.arguments if isinstance(a, Operation) for s in a.steps]
        flat = Operation(self.operator, tuple(map(value_of, self.arguments)))
        return [*inner, (str(flat), self.value)]


def value_of(node: Operation | int) -> int:
    return node.value if isinstance(node, Operation) else node


def parse(text: str) -> Operation:
    """An expression such as ``[MAX 2 9 [MIN 4 7 ] 0 ]``."""
    stack: list[list] = [[]]
    for token in text.split():
        if token.startswith("["):
            stack.append([token[1:]])
        elif token == "]":
            operator, *arguments = stack.pop()
            stack[-1].append(Operation(operator, tuple(arguments)))
        else:
            stack[-1].append(int(token))
    (root,) = stack.pop()
    return root


@final
class ListOps(Task):
    """Random expressions, made from the seed and the split.

    As the authors make them, an argument is a digit with probability 1/4 until `max_depth` is
    reached; an operation has 2 to `max_args` arguments. `worked`: the response writes out every
    operation, innermost first; else it is the value alone. `prompt` frames the expression.
    """

    name = "listops"

    def __init__(
        self,
        operators: Sequence[str] = tuple(OPERATORS),
        max_depth: int = 2,
        max_args: int = 4,
        worked: bool = False,
        prompt: str = INSTRUCTION,
        digits: float = 0.25,
    ) -> None:
        self.operators, self.max_depth, self.max_args = tuple(operators), max_depth, max_args
        self.worked, self.prompt, self.digits = worked, prompt, digits
        n_operations = sum(max_args**level for level in range(max_depth))
        self.new_tokens = n_operations * (max_args + 3) + 1 if worked else 4

    def examples(self, split: Split, n: int | None = None, seed: int = 0) -> list[Example]:
        """By default 1,000 examples. The hash of an expression says which split it may be in."""
        draw = random.Random(f"{split} {seed}")
        unique: dict[str, Example] = {}
        wanted, stale = n or 1000, 0
        while len(unique) < wanted:
            tree = self._operation(draw, 1)
            if _split_of(str(tree)) == split and str(tree) not in unique:
                unique[str(tree)], stale = self._example(tree), 0
            elif (stale := stale + 1) == PATIENCE:
                raise InputError(
                    f"{wanted} {split} examples are more than there are: {len(unique)} were found; "
                    "ask for fewer, or give a larger max_depth or max_args"
                )
        return list(unique.values())

    def extract(self, text: str) -> str | None:
        """Return the last digit after the last bracket: what stands inside one is no answer."""
        behind = text.rpartition("]")[2]
        found = re.findall(r"(?<![\w.-])\d(?!\w|\.\d)", behind)
        return found[-1] if found and "[" not in behind else None

    def _example(self, tree: Operation) -> Example:
        answer = str(tree.value)
        worked = " ".join(f"{flat} {value}" for flat, value in tree.steps)
        prompt = self.prompt.format(expression=tree)
        return Example(prompt, worked if self.worked else answer, answer)

    def _operation(self, draw: random.Random, depth: int) -> Operation:
        operator = draw.choice(self.operators)
        n = draw.randint(2, self.max_args)
        return Operation(operator, tuple(self._argument(draw, depth) for _ in range(n)))

    def _argument(self, draw: random.Random, depth: int) -> Operation | int:
        if depth >= self.max_depth or draw.random() < self.digits:
            return draw.randint(0, 9)
        return self._operation(draw, depth + 1)


def _split_of(expression: str) -> Split:
    """Short expressions are few and come again: their hash keeps the splits apart."""
    place = hash_of(expression) % 10
    return "test" if place == 0 else "validation" if place == 1 else "train"
