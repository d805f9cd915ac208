"""The one loop over blocks: listeners gather from a march's steps, and what they find steers it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from toolkit.documents.batches import Batch
from toolkit.runtime.heap import release_freed
from toolkit.runtime.processes import ALONE, Processes

R = TypeVar("R")


class Marching(Protocol):
    """A march of two models (`March`) or of one (`SingleMarch`)."""

    def layers(self) -> Iterator[int]:
        """Yield the blocks that are still to be passed."""
        ...

    def resident(self, layer: int) -> AbstractContextManager[None]:
        """Keep the weights of block `layer` in memory."""
        ...

    def steps(self, layer: int) -> Iterator[Any]:
        """Run block `layer` on every batch."""
        ...

    def advance(self, layer: int, adapters: Any) -> None:
        """Carry steered streams past block `layer`."""
        ...


class Listener(Protocol):
    """Hold what gathers from the steps of one block."""

    def update(self, step: Any) -> None:
        """Add one batch."""
        ...

    def start(self) -> None:
        """Agree with the other processes on frames, where no batch has come."""
        ...

    def reduce(self, processes: Processes) -> None:
        """Add up the sums of all `processes`."""
        ...


def march_through(
    march: Marching,
    listen: Callable[[int], Mapping[Any, Listener]],
    conclude: Callable[[int, Any], tuple[R, Any]],
    processes: Processes = ALONE,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[R]:
    """March on, and yield what `conclude` makes of every block as soon as it is passed.

    `listen` gives the listeners of a block by name; `conclude` takes the layer and the listeners,
    whose sums are then those of all `processes`, and returns a result and the adapters that the
    march's steered streams take on.
    """
    for layer in march.layers():
        with march.resident(layer):
            listeners = listen(layer)
            _gather(march.steps(layer), listeners, advance)
            release_freed()  # what passes freed lies in pieces that analyses could not use
            # All start before any reduces: processes must talk of the same things in one order.
            for listener in listeners.values():
                listener.start()
            for listener in listeners.values():
                listener.reduce(processes)
            result, adapters = conclude(layer, listeners)
            march.advance(layer, adapters)
        yield result


def _gather(
    steps: Iterator[Any], listeners: Mapping[Any, Listener], advance: Callable[[], None]
) -> None:
    """Show every step to all listeners; when this returns, nothing holds the last step's states."""
    for step in steps:
        for listener in listeners.values():
            listener.update(step)
        advance()


def shared_out(batches: Sequence[Batch], processes: Processes) -> list[int]:
    """Return the indices of this process's batches.

    The first process begins with a fit batch of which tokens count: all statistics can see it.
    """
    lead = next((i for i, b in enumerate(batches) if not b.held_out and b.counted.any()), 0)
    return processes.shares([batch.ids.numel() for batch in batches], lead)
