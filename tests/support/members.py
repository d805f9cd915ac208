"""Several processes of a run, played by threads of this one."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from toolkit.runtime.processes import Processes


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


def reduced(accumulators: Sequence[Any]) -> Sequence[Any]:
    """Reduce `accumulators`, one a process: then each holds the sums of all."""
    table, errors = _Table(len(accumulators)), []

    def reduce(rank: int) -> None:
        try:
            accumulators[rank].reduce(Member(rank, len(accumulators), table))
        except BaseException as error:
            errors.append(error)
            table.barrier.abort()

    threads = [threading.Thread(target=reduce, args=(rank,)) for rank in range(len(accumulators))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return accumulators
