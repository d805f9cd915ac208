"""The contract that every statistic keeps."""

from typing import Any, Protocol

from toolkit.runtime.processes import Processes


class Accumulator(Protocol):
    """Running sums over tokens.

    Sums are float64 and counts integers, whatever the states' precision. Each process of a run
    feeds an accumulator from its own documents; after `reduce` each holds what one accumulator over
    all documents would. A result does not change with later updates.
    """

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add tokens."""

    def reduce(self, processes: Processes) -> None:
        """Add up the sums of all `processes`: then each holds them all."""

    def result(self) -> Any:
        """Return what was asked for, over all tokens so far."""
