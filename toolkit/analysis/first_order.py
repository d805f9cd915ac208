"""How much of what fine-tuning did to an MLP its first-order terms explain.

``exact = y_tuned(h) − y_base(h)`` at the MLP itself, on the base model's input ``h``, against
``down = ΔW_d m``, ``gate = W_d[(σ'(a_g)⊙a_u)⊙(ΔW_g h)]`` and ``up = W_d[σ(a_g)⊙(ΔW_u h)]``;
changes of biases belong to their matrix's term. An MLP without a gate has no gate term, and
``up = W_d[σ'(a)⊙(ΔW_u h)]``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.blocks.mlp import MLP, MLPChange
from toolkit.runtime.processes import Processes


@dataclass(frozen=True)
class FirstOrder:
    """Shares ``E⟨term, exact⟩ / E‖exact‖²`` of the three terms, and what they leave.

    remainder: ``E‖exact − down − gate − up‖² / E‖exact‖²``.
    relative_change: ``rms‖exact‖ / rms‖y_base‖``. The shares sum to 1 up to ``⟨rest, exact⟩``;
    single shares may be negative. All are 0 where the MLP did not change. `first_order` of a long
    update misleads when `remainder` is not small.
    """

    down: float
    gate: float
    up: float
    remainder: float
    relative_change: float


class FirstOrderSums:
    """Accumulates the shares over tokens."""

    NAMES = ("down", "gate", "up", "remainder", "exact", "base")  # in the order of `sums`

    def __init__(self, base: MLP, change: MLPChange) -> None:
        self.base, self.change = base, change
        self.sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=base.down.device)

    def update(self, h: Tensor) -> None:
        """Add tokens: the base MLP's inputs, `[n, d]`."""
        self.add(first_order_terms(self.base, self.change, h))

    def add(self, terms: "Terms") -> None:
        """Add tokens whose terms are known."""
        exact = terms.exact
        rest = exact - terms.down - terms.gate - terms.up
        shares = [getattr(terms, name) * exact for name in ("down", "gate", "up")]
        squares = [vector.square() for vector in (rest, exact, terms.y)]
        self.sums += torch.stack([p.sum(dtype=torch.float64) for p in (*shares, *squares)])

    def reduce(self, processes: Processes) -> None:
        """Add up the sums of all `processes`."""
        processes.add(self.sums)

    def result(self) -> FirstOrder:
        sums = dict(zip(self.NAMES, self.sums.tolist(), strict=True))
        exact = sums["exact"]
        if exact == 0:
            return FirstOrder(0.0, 0.0, 0.0, 0.0, 0.0)
        shares = {name: sums[name] / exact for name in ("down", "gate", "up", "remainder")}
        return FirstOrder(**shares, relative_change=(exact / sums["base"]) ** 0.5)


@dataclass(frozen=True)
class Terms:
    """The first-order terms, the exact change and the base MLP's output y; each `[n, d]`."""

    down: Tensor
    gate: Tensor
    up: Tensor
    exact: Tensor
    y: Tensor


def first_order_terms(base: MLP, change: MLPChange, h: Tensor) -> Terms:
    """Compute the first-order terms at MLP inputs `h` `[n, d]`.

    The exact change is ``W_d (m' − m) + ΔW_d m' + Δb_d``: from the weights' changes, so that a
    small update is not lost in the rounding of y.
    """
    a_g, a_u = base.inner(h)
    value, slope = base.slopes(a_g)
    m = value * a_u
    d_g = change.gate(h)
    d_u = change.up(h) if change.up else d_g.new_zeros(())
    tuned_m = base.activation(a_g + d_g) * (a_u + d_u)
    exact = (tuned_m - m) @ base.down.T + change.down(tuned_m)
    inner = (slope * a_u * d_g) @ base.down.T
    y = m @ base.down.T + base.down_bias
    if change.up:
        return Terms(change.down(m), inner, (value * d_u) @ base.down.T, exact, y)
    # The one inner projection is called up.
    return Terms(change.down(m), torch.zeros_like(inner), inner, exact, y)
