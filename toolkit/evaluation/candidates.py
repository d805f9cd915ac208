"""Candidates: what stands in for fine-tuning."""

from dataclasses import dataclass, field
from typing import Literal

from toolkit.adapters.collection import Adapters
from toolkit.analysis.linear_fit import Rank

Layers = int | Literal["all"]


@dataclass(frozen=True)
class Candidate:
    """What stands in for fine-tuning: nothing, the oracle, or adapters.

    `kind` is none, oracle, vector or linear; `layers` is "all" or the one block that is steered.
    """

    kind: str
    location: str = ""
    rank: Rank | None = None
    fit: str = ""
    layers: Layers = "all"
    adapters: Adapters | None = field(default=None, compare=False)

    @classmethod
    def of(cls, adapters: Adapters, layers: Layers = "all") -> "Candidate":
        """Adapters in every block, or (`layers` a number) in that block alone."""
        if layers != "all":
            one = {layers: adapters.by_layer[layers]}
            adapters = Adapters(adapters.location, one, adapters.fit, adapters.info)
        return cls(adapters.kind, adapters.location, adapters.rank, adapters.fit, layers, adapters)

    @property
    def parameters(self) -> int:
        return self.adapters.parameters if self.adapters else 0


NONE = Candidate("none")
ORACLE = Candidate("oracle", "post_block")
ALWAYS = (None, NONE, ORACLE)  # None is the tuned model itself
