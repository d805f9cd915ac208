"""A uniform sample of tokens that does not depend on the order in which they come."""

from typing import Self

import torch
from torch import Tensor


class Reservoir:
    """Keeps the `size` tokens with the smallest keys.

    Keys are drawn uniformly from a seed and the token's place in the data, so the sample is
    uniform, shards merge to the same sample, and every block samples the same tokens.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def update(self, values: Tensor, keys: Tensor) -> None:
        """Add tokens: `values` `[n, d]` with their `keys` `[n]`."""
        if self._keys is not None and self._values is not None:
            values, keys = torch.cat([self._values, values]), torch.cat([self._keys, keys])
        order = keys.argsort()[: self.size]
        self._keys, self._values = keys[order].clone(), values[order].clone()

    def merge(self, other: Self) -> None:
        if other._keys is not None and other._values is not None:
            self.update(other._values, other._keys)

    def result(self) -> Tensor:
        """The sampled tokens, `[size or fewer, d]`, by key."""
        if self._values is None:
            raise ValueError("no tokens were counted")
        return self._values.clone()
