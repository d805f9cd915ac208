"""Several processes of a run, played by threads of this one."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from toolkit.runtime.processes import Processes

T = TypeVar("T")


class _Table:
    """Exchanges parts: each member lays its own down and takes everyone's."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.parts: list[Any] = [None] * size

    def exchange(self, rank: int, part: Any) -> list[Any]:
        """Return what every member has laid down, in the order of ranks."""
        self.parts[rank] = part
        self.barrier.wait()
        everyone = list(self.parts)
        self.barrier.wait()
        return everyone


class Member(Processes):
    """One of several processes; the others are threads."""

    def __init__(self, rank: int, size: int, table: _Table) -> None:
        super().__init__(rank, size)
        object.__setattr__(self, "table", table)

    def add(self, *totals: torch.Tensor) -> None:
        for total in totals:
            parts = self.table.exchange(self.rank, total.clone())
            total.copy_(sum(parts[1:], parts[0].clone()))

    def gathered(self, found: Any) -> list[Any]:
        return self.table.exchange(self.rank, found)

    def from_first(self, made: Callable[[], Any]) -> Any:
        return self.table.exchange(self.rank, made() if self.first else None)[0]


def together(size: int, job: Callable[[Processes], T]) -> list[T]:
    """Let `size` processes do `job` at the same time; what it gives in each, by rank."""
    table, errors, found = _Table(size), list[BaseException](), dict[int, T]()

    def work(rank: int) -> None:
        try:
            found[rank] = job(Member(rank, size, table))
        except BaseException as error:
            errors.append(error)
            table.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [found[rank] for rank in range(size)]


def reduced(accumulators: Sequence[Any]) -> Sequence[Any]:
    """Reduce `accumulators`, one a process: then each holds the sums of all."""
    together(len(accumulators), lambda processes: accumulators[processes.rank].reduce(processes))
    return accumulators
