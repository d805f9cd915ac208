"""A block's MLP as matrices: what the first-order and reachability analyses compute with."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MLP:
    """``y(h) = W_d (σ(a_g) ⊙ a_u) + b_d`` with ``a_g = W_g h + b_g``, ``a_u = W_u h + b_u``.

    Without a gate (`up` is None) ``y(h) = W_d σ(a_g) + b_d``: `gate` is then the one inner
    projection. Weights are `[out, in]`; tokens are rows.
    """

    activation: Activation
    gate: Tensor
    gate_bias: Tensor
    down: Tensor
    down_bias: Tensor
    up: Tensor | None = None
    up_bias: Tensor | float = 0.0

    def inner(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """``a_g`` and ``a_u`` (ones without a gate) of `h` `[n, d]`, each `[n, d_ff]`."""
        a_g = h @ self.gate.T + self.gate_bias
        if self.up is None:
            return a_g, torch.ones_like(a_g)
        return a_g, h @ self.up.T + self.up_bias

    def __call__(self, h: Tensor) -> Tensor:
        a_g, a_u = self.inner(h)
        return (self.activation(a_g) * a_u) @ self.down.T + self.down_bias

    def slopes(self, a_g: Tensor) -> tuple[Tensor, Tensor]:
        """``σ(a_g)`` and ``σ'(a_g)``, elementwise."""
        # An activation is elementwise, so its derivative is its Jacobian-vector product with ones.
        return torch.func.jvp(self.activation, (a_g,), (torch.ones_like(a_g),))  # type: ignore[return-value]

    def to(self, dtype: torch.dtype, device: Any = None) -> "MLP":
        """Return the same in another precision, on `device` (None: where it is)."""
        held = {name: part for name, part in vars(self).items() if isinstance(part, Tensor)}
        tensors = {name: part.to(dtype=dtype, device=device) for name, part in held.items()}
        return replace(self, **tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Change:
    """Hold what fine-tuning changed of a linear module: ``x ↦ ΔW x + Δb``.

    `factors` is ``(ΔW,)``, or ``(B, A)`` with ``ΔW = B A`` where the change is a LoRA: it is never
    multiplied out.
    """

    factors: tuple[Tensor, ...]
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            x = x @ factor.T
        return x + self.bias

    def halves(self) -> tuple["Change", "Change"]:
        """Split the change of a fused projection into the gate's rows and the up's."""
        first, second = self.factors[0].chunk(2)
        biases = self.bias.chunk(2)
        rest = self.factors[1:]
        return Change((first, *rest), biases[0]), Change((second, *rest), biases[1])

    def scaled(self, by: float) -> "Change":
        """`by` times the change."""
        return Change((self.factors[0] * by, *self.factors[1:]), self.bias * by)

    def to(self, dtype: torch.dtype | None = None, device: Any = None) -> "Change":
        """Return the same in another precision, on `device` (None: as it is)."""
        *factors, bias = (p.to(dtype=dtype, device=device) for p in (*self.factors, self.bias))
        return Change(tuple(factors), bias)


@dataclass(frozen=True)
class MLPChange:
    """The changes of an `MLP`'s matrices and biases."""

    gate: Change
    down: Change
    up: Change | None = None

    def scaled(self, by: float) -> "MLPChange":
        """`by` times every change."""
        return MLPChange(**{name: part and part.scaled(by) for name, part in vars(self).items()})

    def to(self, dtype: torch.dtype, device: Any = None) -> "MLPChange":
        """Return the same in another precision, on `device` (None: where it is)."""
        parts = {name: part and part.to(dtype, device) for name, part in vars(self).items()}
        return MLPChange(**parts)
