"""Mean L2 norms per token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from toolkit.runtime.processes import Processes

Key = tuple[str, str]


@dataclass(frozen=True)
class MeanNorms:
    """``E‖v‖`` of each vector over `n` tokens, by (of, location)."""

    n: int
    mean: dict[Key, float]


class NormSums:
    """Accumulates the L2 norms of named vectors."""

    def __init__(self) -> None:
        self.n = 0
        self._sum: dict[Key, Tensor] = {}

    def update(self, values: Mapping[Key, Tensor]) -> None:
        """Add tokens: each vector `[n, d]`, with the same n."""
        self.n += len(next(iter(values.values())))
        for key, value in values.items():
            norms = torch.linalg.vector_norm(value, dim=1)
            self._add(key, norms.sum(dtype=torch.float64))

    def reduce(self, processes: Processes) -> None:
        """Add up the sums of all `processes`."""
        totals = torch.stack(list(self._sum.values())).tolist() if self._sum else []
        parts = processes.gathered((self.n, dict(zip(self._sum, totals, strict=True))))
        self.n, self._sum = sum(n for n, _ in parts), {}
        for _, part in parts:
            for key, total in part.items():
                self._add(key, torch.tensor(total, dtype=torch.float64))

    def state(self) -> dict[str, Tensor]:
        """Return the sums as tensors by name, for `from_state`."""
        tensors = {"n": torch.tensor(self.n)}
        for (of, location), total in self._sum.items():
            tensors[f"{of}:{location}"] = total.clone()
        return tensors

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Return the accumulator that gave `state`."""
        sums = cls()
        for name, value in state.items():
            if name == "n":
                sums.n = int(value)
            else:
                of, location = name.split(":")
                sums._sum[of, location] = value.clone()
        return sums

    def result(self) -> MeanNorms:
        if self.n == 0:
            raise ValueError("no tokens were counted")
        return MeanNorms(self.n, {key: float(total) / self.n for key, total in self._sum.items()})

    def _add(self, key: Key, total: Tensor) -> None:
        # Not as a number: reading it would wait for a GPU.
        self._sum[key] = self._sum[key] + total if key in self._sum else total
