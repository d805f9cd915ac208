"""A uniform sample of tokens that does not depend on the order in which they come."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor


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
        values = dict(values)
        if self._keys is not None:
            values = {name: torch.cat([self._values[name], new]) for name, new in values.items()}
            keys = torch.cat([self._keys, keys])
        order = keys.argsort()[: self.size]
        self._keys = keys[order].clone()
        self._values = {name: value[order].clone() for name, value in values.items()}

    def merge(self, other: Self) -> None:
        if other._keys is not None:
            self.update(other._values, other._keys)

    def result(self) -> dict[str, Tensor]:
        """The sampled tokens' vectors by name, each `[size or fewer, d]`, in the keys' order."""
        if self._keys is None:
            raise ValueError("no tokens were counted")
        return {name: value.clone() for name, value in self._values.items()}
