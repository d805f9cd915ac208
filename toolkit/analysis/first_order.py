"""How much of what fine-tuning did to an MLP its first-order terms explain.

``exact = y_tuned(h) − y_base(h)`` at the MLP itself, on the base model's input ``h``, against
``down = ΔW_d m``, ``gate = W_d[(σ'(a_g)⊙a_u)⊙(ΔW_g h)]`` and ``up = W_d[σ(a_g)⊙(ΔW_u h)]``;
changes of biases belong to their matrix's term. An MLP without a gate has no gate term, and
``up = W_d[σ'(a)⊙(ΔW_u h)]``.
"""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from toolkit.mlp import MLP


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

    NAMES = ("down", "gate", "up", "remainder", "exact", "base")

    def __init__(self, base: MLP, tuned: MLP) -> None:
        self.base, self.tuned = base, tuned
        self._change = tuned.minus(base)
        self.sums = dict.fromkeys(self.NAMES, 0.0)

    def update(self, h: Tensor) -> None:
        """Add tokens: the base MLP's inputs, `[n, d]`."""
        terms, exact, base = _terms(self.base, self.tuned, self._change, h)
        rest = exact - sum(terms.values())
        for name, term in terms.items():
            self.sums[name] += _sum(term * exact)
        for name, vector in (("remainder", rest), ("exact", exact), ("base", base)):
            self.sums[name] += _sum(vector.square())

    def merge(self, other: Self) -> None:
        for name, value in other.sums.items():
            self.sums[name] += value

    def result(self) -> FirstOrder:
        exact = self.sums["exact"]
        if exact == 0:
            return FirstOrder(0.0, 0.0, 0.0, 0.0, 0.0)
        shares = {name: self.sums[name] / exact for name in ("down", "gate", "up", "remainder")}
        return FirstOrder(**shares, relative_change=(exact / self.sums["base"]) ** 0.5)


def exact_change(base: MLP, change: MLP, h: Tensor) -> tuple[Tensor, Tensor]:
    """``y_tuned(h) − y_base(h)`` and the change of ``down`` alone, ``ΔW_d m``; each `[n, d]`.

    Computed from the weights' changes, so that a small update is not lost in the rounding of y.
    """
    a_g, a_u = base.inner(h)
    m = base.activation(a_g) * a_u
    d_g, d_u = _inner_change(change, h)
    tuned_m = base.activation(a_g + d_g) * (a_u + d_u)
    exact = (tuned_m - m) @ base.down.T + tuned_m @ change.down.T + change.down_bias
    return exact, m @ change.down.T + change.down_bias


def _terms(
    base: MLP, tuned: MLP, change: MLP, h: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    a_g, a_u = base.inner(h)
    value, slope = base.slopes(a_g)
    m = value * a_u
    d_g, d_u = _inner_change(change, h)
    tuned_m = base.activation(a_g + d_g) * (a_u + d_u)
    exact = (tuned_m - m) @ base.down.T + tuned_m @ change.down.T + change.down_bias
    gate = (slope * a_u * d_g) @ base.down.T
    if base.up is None:  # the one inner projection is called up
        up, gate = gate, gate.new_zeros(())
    else:
        up = (value * d_u) @ base.down.T
    terms = {"down": m @ change.down.T + change.down_bias, "gate": gate, "up": up}
    return terms, exact, m @ base.down.T + base.down_bias


def _inner_change(change: MLP, h: Tensor) -> tuple[Tensor, Tensor]:
    """``ΔW_g h`` and ``ΔW_u h`` (0 without a gate), biases' changes included."""
    d_g = h @ change.gate.T + change.gate_bias
    if change.up is None:
        return d_g, d_g.new_zeros(())
    return d_g, h @ change.up.T + change.up_bias


def _sum(products: Tensor) -> float:
    return float(products.sum(dtype=products.double().dtype))
