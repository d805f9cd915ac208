"""How large the two gains of a gated MLP are: histograms of sizes over powers of ten.

A gated MLP ``y(h) = W_d (σ(a_g) ⊙ a_u)`` passes a small change of its input on through
``W_d (diag(σ'(a_g) ⊙ a_u) W_g + diag(σ(a_g)) W_u)``: `gate` is ``|σ'(a_g) ⊙ a_u|``, `up` is
``|σ(a_g)|``. Where both are small in a neuron, steering before the MLP does not get through it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from toolkit.runtime.processes import Processes

QUANTITIES = ("gate", "up")
LOWEST, HIGHEST, PER_DECADE = -7, 4, 10  # powers of ten, and bins in each


def gate_gains(value: Tensor, slope: Tensor, a_u: Tensor) -> dict[str, Tensor]:
    """By quantity, from ``σ(a_g)``, ``σ'(a_g)`` and ``a_u``, each `[n, d_ff]`."""
    return {"gate": (slope * a_u).abs(), "up": value.abs()}


@dataclass(frozen=True)
class SizeHistogram:
    """`counts` int64 `[n_bins + 2]` of `n` sizes: below the range (zeros too), in it, above it.

    Bin k is ``[10 ** edges[k - 1], 10 ** edges[k])``; `edges` `[n_bins + 1]` are evenly spaced.
    """

    n: int
    edges: np.ndarray
    counts: np.ndarray

    def quantile(self, share: float) -> float:
        """Return the size that a `share` in (0, 1] of all stays below.

        Within a bin sizes are taken as even in their logarithm: it errs by a bin's width, a factor
        of ``10 ** (1 / PER_DECADE)``, at most. 0 below the range, inf above it.
        """
        if not 0 < share <= 1:
            raise ValueError(f"a share in (0, 1] was expected, not {share}")
        reached = np.cumsum(self.counts)
        bin_ = int(np.searchsorted(reached, share * self.n))
        if bin_ in (0, len(self.edges)):
            return float("inf") if bin_ else 0.0
        low, high = self.edges[bin_ - 1 : bin_ + 1]
        into = 1 - (reached[bin_] - share * self.n) / self.counts[bin_]
        return float(10 ** (low + into * (high - low)))


class SizeCounts:
    """Accumulates a `SizeHistogram`."""

    def __init__(self) -> None:
        self._edges = np.linspace(LOWEST, HIGHEST, (HIGHEST - LOWEST) * PER_DECADE + 1)
        self._counts = torch.zeros(len(self._edges) + 1, dtype=torch.int64)

    def update(self, values: Tensor) -> None:
        """Add the sizes of `values`, of any shape."""
        if not values.isfinite().all():
            raise ValueError("finite values were expected")
        bounds = torch.from_numpy(10.0**self._edges).to(values.device)
        bins = torch.bucketize(values.abs().double().flatten(), bounds, right=True)
        self._counts += bins.bincount(minlength=len(self._counts)).cpu()

    def reduce(self, processes: Processes) -> None:
        """Add up the counts of all `processes`."""
        processes.add(self._counts)

    def result(self) -> SizeHistogram:
        n = int(self._counts.sum())
        if n == 0:
            raise ValueError("no tokens were counted")
        return SizeHistogram(n, self._edges.copy(), self._counts.numpy().copy())
