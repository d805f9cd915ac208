"""First and second moments of several vectors per token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from toolkit.runtime.placement import for_analyses
from toolkit.runtime.processes import Processes
from toolkit.statistics.frame import Frame, add, frames_of

Pair = tuple[str, str]


@dataclass(frozen=True)
class Moments:
    """Means and covariances over `n` tokens, float64.

    `mean` maps a variable to `[d]`; `covariance` maps a pair (a, b) to
    ``E[(a − Ea)(b − Eb)ᵀ]``, `[d_a, d_b]`.
    """

    n: int
    mean: dict[str, Tensor]
    covariance: dict[Pair, Tensor]

    def second_moment(self, a: str, b: str | None = None) -> Tensor:
        """Return the uncentred ``E[abᵀ]``, `[d_a, d_b]`; of `a` with itself by default."""
        b = b or a
        return torch.outer(self.mean[a], self.mean[b]).add_(self.covariance[a, b])

    def pooled(self, other: Self, pairs: Sequence[Pair]) -> Self:
        """Return the moments over the tokens of both, for `pairs` alone."""
        n = self.n + other.n
        mean, gap = {}, {}
        for name in dict.fromkeys(name for pair in pairs for name in pair):
            gap[name] = other.mean[name] - self.mean[name]
            mean[name] = self.mean[name] + gap[name] * (other.n / n)
        between = self.n * other.n / n**2
        covariance = {
            (a, b): self.covariance[a, b] * (self.n / n)
            + other.covariance[a, b] * (other.n / n)
            + torch.outer(gap[a], gap[b]) * between
            for a, b in pairs
        }
        return type(self)(n, mean, covariance)

    def energy(self, a: str) -> float:
        """``E‖a‖²``."""
        return float(self.covariance[a, a].trace() + self.mean[a].square().sum())


class FramedSums:
    """Sums over tokens of named vectors, and of their products for the `pairs` that are asked for.

    Products are taken in the precision of the tokens (float32 or float64) in a fixed `Frame` of
    each vector, and summed in float64 on the frame's grid: so a mean much larger than the spread
    (massive activations) costs no digits, and the order of updates and of processes no bit. Without
    `frames`, those of the first tokens seen are taken.
    """

    def __init__(self, pairs: Sequence[Pair], frames: Mapping[str, Frame] | None = None) -> None:
        self.pairs = tuple(pairs)
        self.names = tuple(dict.fromkeys(name for pair in pairs for name in pair))
        self.n = 0
        self._frames: dict[str, Frame] = {}
        self._sum: dict[str, Tensor] = {}
        self._product: dict[Pair, Tensor] = {}
        if frames is not None:
            self._start(frames)

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add tokens: each variable `[n, d]`, with the same n."""
        n = len(next(iter(values.values())))
        if n == 0:
            return
        if not self._frames:
            self._start(frames_of({name: values[name] for name in self.names}))
        framed = {name: self._frames[name].applied(values[name]) for name in self.names}
        self.n += n
        for name, value in framed.items():
            add(self._sum[name], value.sum(0, dtype=torch.float64), value.dtype)
        self._add(framed)

    def reduce(self, processes: Processes) -> None:
        """Add up the sums of all `processes`, which have the same frames."""
        n = torch.tensor(self.n)
        processes.add(n, *self._totals())
        self.n = int(n)

    def result(self, pairs: Sequence[Pair] | None = None) -> Moments:
        """Return the moments, where analyses run; of `pairs` alone, where not all are wanted."""
        if self.n == 0:
            raise ValueError("no tokens were counted")
        mean, covariance = {}, {}
        for name, frame in self._frames.items():
            mean[name] = for_analyses(frame.centre + self._sum[name] / self.n * frame.unit)
        for a, b in self.pairs if pairs is None else pairs:
            framed = self._covariance(a, b)
            framed *= self._frames[b].unit
            framed *= self._frames[a].unit[:, None]
            covariance[a, b] = for_analyses(framed)
        return Moments(self.n, mean, covariance)

    def _start(self, frames: Mapping[str, Frame]) -> None:
        for name in self.names:
            self._frames[name] = frames[name]
            self._sum[name] = torch.zeros_like(frames[name].centre)
        for a, b in self.pairs:
            shape = (len(self._sum[a]), self._columns(b))
            self._product[a, b] = self._sum[a].new_zeros(shape)

    def _totals(self) -> tuple[Tensor, ...]:
        """All that grows with the tokens."""
        return (*self._sum.values(), *self._product.values())

    def _columns(self, name: str) -> int:
        """Count how many numbers a product's second vector has."""
        raise NotImplementedError

    def _add(self, framed: Mapping[str, Tensor]) -> None:
        """Add the products of vectors in their frames."""
        raise NotImplementedError

    def _covariance(self, a: str, b: str) -> Tensor:
        """A new tensor: the covariance of vectors in their frames."""
        raise NotImplementedError


class MomentSums(FramedSums):
    """Accumulates the moments of named vectors exactly: whole products."""

    def state(self) -> dict[str, Tensor]:
        """Return the sums as tensors by name, for `from_state`."""
        tensors = {"n": torch.tensor(self.n)}
        for name, frame in self._frames.items():
            tensors |= {f"centre:{name}": frame.centre.clone(), f"unit:{name}": frame.unit.clone()}
        tensors |= {f"sum:{name}": value.clone() for name, value in self._sum.items()}
        tensors |= {f"product:{a}:{b}": value.clone() for (a, b), value in self._product.items()}
        return tensors

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Return the accumulator that gave `state`."""
        split = {name: tuple(name.split(":")) for name in state}
        sums = cls([(key[1], key[2]) for key in split.values() if key[0] == "product"])
        sums.n = int(state["n"])
        for name, key in split.items():
            if key[0] == "sum":
                centre = state[f"centre:{key[1]}"].clone()
                # Statistics kept before frames had units are in units of 1.
                unit = state.get(f"unit:{key[1]}", torch.ones_like(centre)).clone()
                sums._frames[key[1]] = Frame(centre, unit)
                sums._sum[key[1]] = state[name].clone()
            elif key[0] == "product":
                sums._product[key[1], key[2]] = state[name].clone()
        return sums

    def _columns(self, name: str) -> int:
        return len(self._sum[name])

    def _add(self, framed: Mapping[str, Tensor]) -> None:
        for a, b in self.pairs:
            if a == b:
                _add_gram(self._product[a, a], framed[a])
            else:
                add(self._product[a, b], framed[a].T @ framed[b], framed[a].dtype)

    def _covariance(self, a: str, b: str) -> Tensor:
        left, right = self._sum[a] / self.n, self._sum[b] / self.n
        centred = torch.addr(self._product[a, b], left, right, alpha=-1, beta=1 / self.n)
        if a == b:
            _mirror(centred)
        return centred


_STRIPES = 6  # of a symmetric product's rows: 21 of 36 squares are computed


def _add_gram(total: Tensor, x: Tensor) -> None:
    """Add the upper triangle of ``xᵀx``, in stripes of rows (the rest of `total` is not used)."""
    d = x.shape[1]
    edges = [round(d * i / _STRIPES) for i in range(_STRIPES + 1)]
    for start, stop in pairwise(edges):
        if stop > start:
            add(total[start:stop, start:], x[:, start:stop].T @ x[:, start:], x.dtype)


def _mirror(upper: Tensor) -> None:
    """Make a square matrix symmetric, from its upper triangle, in place."""
    upper.triu_()
    upper += upper.triu(1).T
