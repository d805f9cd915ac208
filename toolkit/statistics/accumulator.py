"""The contract that every statistic keeps."""

from typing import Any, Protocol, Self


class Accumulator(Protocol):
    """Running sums over tokens.

    Sums are float64 and counts integers, whatever the states' precision. Accumulators of shards of
    the tokens, merged, hold what one accumulator over all of them would; the donor of a merge is
    unchanged, and a result does not change with later updates.
    """

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add tokens."""

    def merge(self, other: Self) -> None:
        """Add what `other` has seen."""

    def result(self) -> Any:
        """Return what was asked for, over all tokens so far."""
