"""The processes of one run, as ``torchrun`` starts them.

Each marches its share of the documents. Sums are added up over all, so that every process holds
the same bits and takes the same decisions; what then is left to compute is spread as tasks. The
first process alone writes files and shows progress.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.errors import InputError

T = TypeVar("T")
_PATIENCE = timedelta(hours=12)  # one process may analyse for long while the others wait


class LostProcessError(RuntimeError):
    """Another process of the run has ended."""


@dataclass(frozen=True)
class Processes:
    """`size` processes, of which this is number `rank`. Alone, every function returns at once."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def owners(self, costs: Sequence[float], lead: int | None = None) -> list[int]:
        """Return which process each of `costs` falls to, so that all cost alike.

        The dearest are shared out first, each to the process with the least; index `lead` is the
        first process's.
        """
        load, owner = [0.0] * self.size, [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda i: (i != lead, -costs[i])):
            owner[index] = 0 if index == lead else min(range(self.size), key=load.__getitem__)
            load[owner[index]] += costs[index]
        return owner

    def shares(self, costs: Sequence[int], lead: int = 0) -> list[int]:
        """Return the indices of this process's part of `costs`, shared out so that all cost alike.

        Index `lead` comes first, in the first process; the others follow in their order.
        """
        owners = self.owners(costs, lead)
        mine = [index for index, rank in enumerate(owners) if rank == self.rank]
        return sorted(mine, key=lambda index: index != lead)

    def add(self, *totals: Tensor) -> None:
        """Put the sum over all processes in place of each tensor."""
        if self.size > 1:
            for total in totals:
                with _together():
                    dist.all_reduce(total)

    def gathered(self, found: T) -> list[T]:
        """Return what every process found, in the order of ranks."""
        if self.size == 1:
            return [found]
        everyone: list[Any] = [None] * self.size
        with _together():
            dist.all_gather_object(everyone, found)
        return everyone

    def from_first(self, made: Callable[[], T]) -> T:
        """Return what ``made()`` returns in the first process; its InputError is raised in all."""
        if self.size == 1:
            return made()
        box: list[Any] = [None]
        if self.first:
            try:
                box = [made()]
            except InputError as error:
                box = [error]
        with _together():
            dist.broadcast_object_list(box, 0)
        if isinstance(box[0], InputError):
            raise box[0]
        return box[0]

    def spread(
        self, tasks: Sequence[Callable[[], T]], costs: Sequence[float] | None = None
    ) -> list[T]:
        """Return the results of all `tasks`, each computed by one process; they cost alike if not
        told.
        """
        owners = self.owners(costs or [1.0] * len(tasks))
        own = [task() for task, rank in zip(tasks, owners, strict=True) if rank == self.rank]
        parts = [iter(part) for part in self.gathered(own)]
        return [next(parts[rank]) for rank in owners]

    def wait(self) -> None:
        """Until every process is here."""
        self.gathered(None)


ALONE = Processes()


class Rota:
    """Spread like tasks over processes again and again, by the seconds that each took last time."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._seconds: list[float] = []

    def spread(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Return the results of all `tasks`, each computed by one process."""
        known = self._seconds if len(self._seconds) == len(tasks) else None
        found = self.processes.spread([partial(_timed, task) for task in tasks], known)
        self._seconds = [seconds for _, seconds in found]
        return [result for result, _ in found]


def _timed(task: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    return task(), time.perf_counter() - started


@contextmanager
def joined(device: str | torch.device = "cpu") -> Iterator[Processes]:
    """Yield the run that ``torchrun`` started this process for; `ALONE` without it.

    A process of several that is told to end, because another one did, raises `LostProcessError`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield ALONE
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    previous = signal.signal(signal.SIGTERM, _ended)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        signal.signal(signal.SIGTERM, previous)
        dist.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LostProcessError):
            raise
        raise LostProcessError(str(error)) from error


def _ended(*_: Any) -> None:
    raise LostProcessError("told to end")
