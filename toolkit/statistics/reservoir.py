"""A uniform sample of tokens that does not depend on the order in which they come."""

from collections.abc import Mapping

import torch
from torch import Tensor

from toolkit.runtime.processes import Processes


class Reservoir:
    """Keeps the `size` tokens with the smallest keys, each with all its named vectors.

    Keys are drawn uniformly from a seed and the token's place in the data, so the sample is
    uniform, shards merge to the same sample, and every block samples the same tokens.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._keys: Tensor | None = None
        self._values: dict[str, Tensor] = {}

    def update(self, values: Mapping[str, Tensor], keys: Tensor) -> None:
        """Add tokens: every vector `[n, d]` (d may differ) with their `keys` `[n]`."""
        order = keys.argsort()[: self.size]  # of the new ones, none beyond these is kept
        keys, values = keys[order], {name: value[order] for name, value in values.items()}
        if self._keys is not None:
            values = {name: torch.cat([self._values[name], new]) for name, new in values.items()}
            keys = torch.cat([self._keys, keys])
            order = keys.argsort()[: self.size]
            keys, values = keys[order], {name: value[order] for name, value in values.items()}
        self._keys, self._values = keys, values

    def reduce(self, processes: Processes) -> None:
        """Sample from the tokens of all `processes`."""
        mine = None if self._keys is None else (self._keys.cpu(), self._on_cpu())
        parts = [part for part in processes.gathered(mine) if part is not None]
        self._keys, self._values = None, {}
        for keys, values in parts:
            self.update(values, keys)

    def result(self) -> dict[str, Tensor]:
        """The sampled tokens' vectors by name, each `[size or fewer, d]`, in the keys' order."""
        if self._keys is None:
            raise ValueError("no tokens were counted")
        return {name: value.clone() for name, value in self._on_cpu().items()}

    def _on_cpu(self) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in self._values.items()}
