"""First and second moments of several vectors per token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

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
        """The uncentred ``E[abᵀ]``, `[d_a, d_b]`; of `a` with itself by default."""
        b = b or a
        return self.covariance[a, b] + torch.outer(self.mean[a], self.mean[b])

    def pooled(self, other: Self, pairs: Sequence[Pair]) -> Self:
        """The moments over the tokens of both, for `pairs` alone."""
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


class MomentSums:
    """Accumulates the moments of named vectors, for the `pairs` that are asked for.

    Products are taken in the precision of the tokens (float32 or float64) about a fixed centre,
    the mean of the first tokens seen, and summed in float64: so a mean much larger than the spread
    (massive activations) costs no digits.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = tuple(pairs)
        self.names = tuple(dict.fromkeys(name for pair in pairs for name in pair))
        self.n = 0
        self._centre: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}
        self._product: dict[Pair, Tensor] = {}

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add tokens: each variable `[n, d]`, with the same n."""
        n = len(next(iter(values.values())))
        if n == 0:
            return
        if not self._centre:
            self._start(values)
        shifted = {
            name: values[name] - self._centre[name].to(values[name].dtype) for name in self.names
        }
        self.n += n
        for name, value in shifted.items():
            self._sum[name] += value.sum(0, dtype=torch.float64)
        for a, b in self.pairs:
            if a == b:
                _add_gram(self._product[a, a], shifted[a])
            else:
                self._product[a, b] += shifted[a].T @ shifted[b]

    def merge(self, other: Self) -> None:
        """Add the tokens of `other`, whose centre may differ."""
        if other.n == 0:
            return
        if self.n == 0:
            self.n = other.n
            self._centre = {k: v.clone() for k, v in other._centre.items()}
            self._sum = {k: v.clone() for k, v in other._sum.items()}
            self._product = {k: v.clone() for k, v in other._product.items()}
            return
        step = {name: other._centre[name] - self._centre[name] for name in self.names}
        for a, b in self.pairs:
            self._product[a, b] += (
                other._product[a, b]
                + torch.outer(other._sum[a], step[b])
                + torch.outer(step[a], other._sum[b])
                + other.n * torch.outer(step[a], step[b])
            )
        for name in self.names:
            self._sum[name] += other._sum[name] + other.n * step[name]
        self.n += other.n

    def result(self) -> Moments:
        if self.n == 0:
            raise ValueError("no tokens were counted")
        offset = {name: total / self.n for name, total in self._sum.items()}
        mean = {name: self._centre[name] + offset[name] for name in self.names}
        covariance = {}
        for (a, b), product in self._product.items():
            covariance[a, b] = torch.outer(offset[a], offset[b]).neg_()
            covariance[a, b].add_(_full(product, a == b), alpha=1 / self.n)
        on_cpu = {pair: value.cpu() for pair, value in covariance.items()}
        return Moments(self.n, {name: value.cpu() for name, value in mean.items()}, on_cpu)

    def state(self) -> dict[str, Tensor]:
        """The sums as tensors by name, for `from_state`."""
        tensors = {"n": torch.tensor(self.n)}
        tensors |= {f"centre:{name}": value.clone() for name, value in self._centre.items()}
        tensors |= {f"sum:{name}": value.clone() for name, value in self._sum.items()}
        tensors |= {f"product:{a}:{b}": value.clone() for (a, b), value in self._product.items()}
        return tensors

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """The accumulator that gave `state`."""
        split = {name: tuple(name.split(":")) for name in state}
        sums = cls([(key[1], key[2]) for key in split.values() if key[0] == "product"])
        sums.n = int(state["n"])
        for name, key in split.items():
            if key[0] == "centre":
                sums._centre[key[1]] = state[name].clone()
            elif key[0] == "sum":
                sums._sum[key[1]] = state[name].clone()
            elif key[0] == "product":
                sums._product[key[1], key[2]] = state[name].clone()
        return sums

    def _start(self, values: Mapping[str, Tensor]) -> None:
        for name in self.names:
            self._centre[name] = values[name].mean(0).double()
            self._sum[name] = torch.zeros_like(self._centre[name])
        for a, b in self.pairs:
            shape = (values[a].shape[1], values[b].shape[1])
            self._product[a, b] = self._centre[a].new_zeros(shape)


_STRIPES = 4  # of a symmetric product's rows: 10 of 16 squares are computed


def _add_gram(total: Tensor, x: Tensor) -> None:
    """Add the upper triangle of ``xᵀx``, in stripes of rows (the rest of `total` is not used)."""
    for rows in torch.arange(x.shape[1]).tensor_split(_STRIPES):
        if len(rows):
            start, stop = int(rows[0]), int(rows[-1]) + 1
            total[start:stop, start:] += x[:, start:stop].T @ x[:, start:]


def _full(product: Tensor, symmetric: bool) -> Tensor:
    if not symmetric:
        return product
    return product.triu().add_(product.triu(1).T)
