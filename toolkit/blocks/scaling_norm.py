"""Norms that only scale, and an MLP after one: maps that all tokens share cost a third there.

An RMSNorm gives ``y = r(x) g ⊙ x`` with one number r a token, so its Jacobian is
``v ↦ r g ⊙ v + y (q·v)``. A matrix W after it therefore needs no product a token: of a shared map M
it is ``r (W g⊙M) z + (W y) (q·Mz)``, and ``W y`` is the same for all maps. Whether a module
is such a norm is not read from its class but found out at the tokens themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from toolkit.blocks.jacobian import Chain, FunctionJacobian, MLPJacobian, is_narrow

_TOLERANCE = 30.0  # roundings, of the largest entry


@dataclass(frozen=True)
class ScalingNorm:
    """``y = r g ⊙ x`` at n tokens, and its Jacobian ``r g ⊙ v + y (q·v)``.

    `gain` is g `[d]`, `scale` r `[n, 1]`, `y` `[n, d]`, `turn` q `[n, d]`.
    """

    gain: Tensor
    scale: Tensor
    y: Tensor
    turn: Tensor

    @classmethod
    def of(cls, norm: Callable[[Tensor], Tensor], x: Tensor) -> Self | None:
        """Return `norm` at tokens `x` `[n, d]`; None where it does more than scale."""
        gain, y = norm(torch.ones_like(x[:1]))[0], norm(x)
        plain = gain * x
        scale = y.norm(dim=1, keepdim=True) / plain.norm(dim=1, keepdim=True)
        jacobian = FunctionJacobian(norm, x)
        along = jacobian.pull(y) - scale * gain * y  # of Jᵀ y, what is not r g ⊙ y: q ‖y‖²
        found = cls(gain, scale, y, along / y.square().sum(1, keepdim=True))
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(x.shape, generator=generator).to(x)
        pushed = scale * gain * v + y * (found.turn * v).sum(1, keepdim=True)
        same = _same(scale * plain, y) and _same(pushed, jacobian.push(v))
        return found if same else None


def _same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two are equal but for rounding; NaN equals nothing."""
    return bool((a - b).abs().max() <= _TOLERANCE * torch.finfo(b.dtype).eps * b.abs().max())


@dataclass(frozen=True)
class MLPAfterNorm(Chain):
    """An MLP after a norm that only scales; `scaling` says how."""

    outer: MLPJacobian
    inner: FunctionJacobian
    scaling: ScalingNorm

    def push_map(self, z: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        if not is_narrow(z, len(matrix)):
            return super().push_map(z, matrix, bias)
        norm = self.scaling
        turned = ((norm.turn @ matrix) * z).sum(1, keepdim=True) + (norm.turn @ bias)[:, None]
        scaled, shift = norm.gain[:, None] * matrix, norm.gain * bias
        inner = torch.zeros_like(self.outer.by_gate)
        for weight, diagonal, image in self._inner:
            pushed = norm.scale * (z @ (weight @ scaled).T + weight @ shift)
            inner.addcmul_(diagonal, pushed.addcmul_(image, turned))
        return inner @ self.outer.mlp.down.T

    def pull_map(self, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.scaling
        if not is_narrow(z, len(norm.gain)):
            return super().pull_map(u, z)
        inner, turned = u @ self.outer.mlp.down, u.new_zeros(len(u))
        matrix, bias = u.new_zeros(len(norm.gain), z.shape[1]), torch.zeros_like(norm.gain)
        for weight, diagonal, image in self._inner:
            pulled = diagonal * inner
            turned += (image * pulled).sum(1)
            pulled *= norm.scale
            matrix += weight.T @ (pulled.T @ z)
            bias += weight.T @ pulled.sum(0)
        matrix = norm.gain[:, None] * matrix + norm.turn.T @ (turned[:, None] * z)
        return matrix, norm.gain * bias + norm.turn.T @ turned

    @cached_property
    def _inner(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The matrices into the MLP, the factor of each one's outputs, and their images of its input."""
        mlp, outer = self.outer.mlp, self.outer
        found = [(mlp.gate, outer.by_gate, self.scaling.y @ mlp.gate.T)]
        if mlp.up is not None and outer.by_up is not None:
            found.append((mlp.up, outer.by_up, self.scaling.y @ mlp.up.T))
        return found


def after_norm(mlp: MLPJacobian, norm: Callable[[Tensor], Tensor], x: Tensor) -> Chain:
    """Return the Jacobian of an MLP after `norm` at tokens `x` `[n, d]`."""
    inner, scaling = FunctionJacobian(norm, x), ScalingNorm.of(norm, x)
    return MLPAfterNorm(mlp, inner, scaling) if scaling else Chain(mlp, inner)
