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

    def features(self, z: Tensor) -> Tensor:
        """Return each token's features and a constant, scaled as the norm scales, `[n, k + 1]`."""
        return self.scale * _beside(z, z.new_ones(len(z), 1))


def _same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two are equal but for rounding; NaN equals nothing."""
    return bool((a - b).abs().max() <= _TOLERANCE * torch.finfo(b.dtype).eps * b.abs().max())


@dataclass(frozen=True)
class MLPAfterNorm(Chain):
    """An MLP after a norm. Where that only scales, maps of few features go round it."""

    outer: MLPJacobian
    inner: FunctionJacobian

    def push_map(self, z: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        norm = self.scaling if is_narrow(z, len(matrix)) else None
        if norm is None:
            return super().push_map(z, matrix, bias)
        turned = ((norm.turn @ matrix) * z).sum(1, keepdim=True) + (norm.turn @ bias)[:, None]
        columns, features = norm.gain[:, None] * _beside(matrix, bias[:, None]), norm.features(z)
        inner = self._turning * turned
        for weight, diagonal in self.outer.inward:
            inner.addcmul_(diagonal, features @ (weight @ columns).T)
        return inner @ self.outer.mlp.down.T

    def pull_map(self, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.scaling if is_narrow(z, self.inner.x.shape[1]) else None
        if norm is None:
            return super().pull_map(u, z)
        inner, features = u @ self.outer.mlp.down, norm.features(z)
        turned = (self._turning * inner).sum(1, keepdim=True)
        columns = norm.turn.T @ (turned * _beside(z, torch.ones_like(turned)))
        for weight, diagonal in self.outer.inward:
            columns += norm.gain[:, None] * (weight.T @ ((diagonal * inner).T @ features))
        return columns[:, :-1], columns[:, -1]

    def tokens(self, some: slice) -> "MLPAfterNorm":
        return MLPAfterNorm(self.outer.tokens(some), self.inner.tokens(some))

    @cached_property
    def scaling(self) -> ScalingNorm | None:
        """The norm at the tokens, when first needed; None where it does more than scale."""
        return ScalingNorm.of(self.inner.function, self.inner.x)

    @cached_property
    def _turning(self) -> Tensor:
        """Return what a change of the norm's scale does inside the MLP, `[n, d_ff]`."""
        assert self.scaling is not None
        images = [diagonal * (self.scaling.y @ weight.T) for weight, diagonal in self.outer.inward]
        return torch.stack(images).sum(0)


def _beside(left: Tensor, right: Tensor) -> Tensor:
    return torch.cat([left, right], 1)
