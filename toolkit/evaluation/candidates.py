"""Candidates: what stands in for fine-tuning."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

from toolkit.adapters.collection import Adapters

Layers = int | Literal["all"]


@dataclass(frozen=True)
class Candidate:
    """Hold what stands in for fine-tuning: nothing, the oracle, or adapters.

    `key` tells it from others: the spec of the adapters, or the words ``none`` and ``oracle``;
    `layers` is "all" or the one block that is steered.
    """

    key: Hashable
    layers: Layers = "all"
    adapters: Adapters | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls, adapters: Adapters, layers: Layers = "all", key: Hashable | None = None
    ) -> "Candidate":
        """Make a candidate of adapters in every block, or (`layers` a number) in that block alone.

        `key` is by default what the adapters are and how they were fitted.
        """
        if key is None:
            blend = adapters.info.get("blend")
            key = (adapters.location, adapters.kind, adapters.rank, adapters.fit, blend)
        if layers != "all":
            one = {layers: adapters.by_layer[layers]}
            adapters = Adapters(adapters.location, one, adapters.fit, adapters.info)
        return cls(key, layers, adapters)

    @property
    def kind(self) -> str:
        """The adapters' kind, or none or oracle."""
        return self.adapters.kind if self.adapters else str(self.key)

    @property
    def location(self) -> str:
        """Tell where it steers; the oracle after the block."""
        if self.adapters:
            return self.adapters.location
        return "post_block" if self.key == "oracle" else ""

    @property
    def rank(self) -> Any:
        """The adapters' rank; None without adapters."""
        return self.adapters.rank if self.adapters else None

    @property
    def fit(self) -> str:
        """How the adapters were fitted; empty without adapters."""
        return self.adapters.fit if self.adapters else ""

    @property
    def target(self) -> str:
        """What the adapters supply: what is missing where they add, or in the block; else empty."""
        return self.adapters.info.get("target", "own") if self.adapters else ""

    @property
    def parameters(self) -> int:
        """How many numbers the adapters hold."""
        return self.adapters.parameters if self.adapters else 0


NONE = Candidate("none")
ORACLE = Candidate("oracle")
ALWAYS = (None, NONE, ORACLE)  # None is the tuned model itself
