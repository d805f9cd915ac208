"""A uniform sample of tokens that does not depend on the order in which they come."""

from collections.abc import Mapping

import torch
from torch import Tensor

from toolkit.runtime.placement import for_analyses
from toolkit.runtime.processes import Processes


class Reservoir:
    """Keeps the `size` tokens with the smallest keys, each with all its named vectors.

    Keys are drawn uniformly from a seed and the token's place in the data, so the sample is
    uniform, shards merge to the same sample, and every block samples the same tokens.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._parts: list[tuple[Tensor, dict[str, Tensor]]] = []  # keys, and vectors by name

    @property
    def seen(self) -> bool:
        """Tell whether any tokens came."""
        return bool(self._parts)

    def update(self, values: Mapping[str, Tensor], keys: Tensor) -> None:
        """Add tokens: every vector `[n, d]` (d may differ) with their `keys` `[n]`."""
        self._parts.append(self._smallest(keys, values))
        # Not at every update: joining what is kept costs as much as all of it.
        if sum(len(keys) for keys, _ in self._parts) > 2 * self.size:
            self._join()

    def reduce(self, processes: Processes) -> None:
        """Sample from the tokens of all `processes`."""
        self._join()
        if processes.size == 1:
            return
        mine = [(keys.cpu(), _on_cpu(values)) for keys, values in self._parts]
        self._parts = [part for parts in processes.gathered(mine) for part in parts]
        self._join()

    def result(self) -> dict[str, Tensor]:
        """The sampled tokens' vectors by name, each `[size or fewer, d]`, in the keys' order.

        They are where analyses run; after several processes have sampled, on the CPU.
        """
        if not self._parts:
            raise ValueError("no tokens were counted")
        self._join()
        return {name: for_analyses(value).clone() for name, value in self._parts[0][1].items()}

    def _join(self) -> None:
        """Make one part of all, of the tokens with the smallest keys."""
        if self._parts:
            keys = torch.cat([keys for keys, _ in self._parts])
            names = self._parts[0][1]
            values = {name: torch.cat([part[name] for _, part in self._parts]) for name in names}
            self._parts = [self._smallest(keys, values)]

    def _smallest(
        self, keys: Tensor, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        order = keys.argsort()[: self.size]
        return keys[order], {name: value[order] for name, value in values.items()}


def _on_cpu(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in values.items()}
