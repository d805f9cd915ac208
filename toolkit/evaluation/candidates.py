"""Candidates: what stands in for fine-tuning."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from toolkit.adapters.attach import Share, steer
from toolkit.adapters.collection import Adapters
from toolkit.adapters.weight_change import WeightChange, changed
from toolkit.models.locations import Sites

Layers = int | Literal["all"]
ROWS = 48  # copies of prompts that are generated from together, at most


@dataclass(frozen=True)
class Candidate:
    """Hold what stands in for fine-tuning: nothing, the oracle, adapters, or a change of weights.

    `key` tells it from others: the spec of the adapters, or the words ``none`` and ``oracle``;
    `layers` is "all" or the one block that is steered. `label` says of a change of
    weights which size it stands beside.
    """

    key: Hashable
    layers: Layers = "all"
    adapters: Adapters | None = field(default=None, compare=False)
    weights: WeightChange | None = field(default=None, compare=False)
    label: str = ""

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

    @contextmanager
    def attached(
        self, model: nn.Module, sites: Sites, share: Share | None = None
    ) -> Iterator[None]:
        """Put it into `model`, the base; with a `share`, into that part of every batch's rows."""
        with ExitStack() as stack:
            if self.adapters is not None:
                stack.enter_context(steer(model, self.adapters, sites, share))
            if self.weights is not None:
                stack.enter_context(changed(model, self.weights, sites))
            yield

    @property
    def shares(self) -> bool:
        """Tell whether it can have a part of a batch: changed weights are every row's."""
        return self.weights is None and self.key != "oracle"

    @property
    def kind(self) -> str:
        """The adapters' kind, or lora, none or oracle."""
        if self.weights is not None:
            return self.weights.kind
        return self.adapters.kind if self.adapters else str(self.key)

    @property
    def location(self) -> str:
        """Tell where it steers; the oracle after the block."""
        if self.adapters:
            return self.adapters.location
        return "post_block" if self.key == "oracle" else ""

    @property
    def rank(self) -> Any:
        """The adapters' rank, or the one rank of all modules; None without either."""
        if self.weights is not None:
            return self.weights.rank if isinstance(self.weights.rank, int) else None
        return self.adapters.rank if self.adapters else None

    @property
    def fit(self) -> str:
        """How the adapters were fitted, or the weights cut; empty without either."""
        if self.weights is not None:
            return self.weights.fit
        return self.adapters.fit if self.adapters else ""

    @property
    def target(self) -> str:
        """Say what the adapters supply: what is missing where they add, or in the block.

        Of a change of weights, which size it stands beside; else empty.
        """
        return self.adapters.info.get("target", "own") if self.adapters else self.label

    @property
    def parameters(self) -> int:
        """Count the numbers of all that is added."""
        parts = (self.adapters, self.weights)
        return sum(part.parameters for part in parts if part is not None)


@contextmanager
def side_by_side(candidates: Sequence[Candidate], model: nn.Module, sites: Sites) -> Iterator[None]:
    """Put each of `candidates` into `model`, in its own of as many equal parts of a batch's rows.

    One alone has all rows.
    """
    n = len(candidates)
    with ExitStack() as stack:
        for part, candidate in enumerate(candidates):
            stack.enter_context(candidate.attached(model, sites, (part, n) if n > 1 else None))
        yield


def group_size(n_prompts: int) -> int:
    """Return how many candidates generate from copies of `n_prompts` prompts in one batch.

    A generated token costs for `ROWS` rows about twice what it does for a few: reading weights is
    half of it.
    """
    return max(1, ROWS // max(n_prompts, 1))


def in_groups(shares: Sequence[bool], n_prompts: int) -> list[list[int]]:
    """Group candidates, by index, that go through the model in one batch of copies of the prompts.

    `shares` tells which can, the others go alone; `n_prompts` are those of the batch.
    """
    size, open_group = group_size(n_prompts), list[int]()
    groups = []
    for index, can_share in enumerate(shares):
        if can_share and open_group and len(open_group) < size:
            open_group.append(index)
            continue
        group = [index]
        if can_share:
            open_group = group
        groups.append(group)
    return groups


NONE = Candidate("none")
ORACLE = Candidate("oracle")
ALWAYS = (None, NONE, ORACLE)  # None is the tuned model itself
