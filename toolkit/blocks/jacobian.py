"""Jacobian products: what a small change of each token's state does, without a matrix a token.

A Jacobian here is the derivative of a map that acts on every token by itself, taken at n tokens.
Vectors are `[n, d]`, one a token, or `[n, k, d]`, k a token. An MLP's products are closed forms,
three shared matrix products for all tokens; anything else (norms, MLPs that cannot be read) goes
through ``torch.func``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from toolkit.blocks.mlp import MLP


class Jacobian(Protocol):
    """J at n tokens.

    The products of a map ``v = M z + c`` that all tokens share have names of their own: where M has
    few columns they cost less than those of the vectors that it gives.
    """

    def push(self, v: Tensor) -> Tensor:
        """``J v``."""
        ...

    def pull(self, u: Tensor) -> Tensor:
        """``Jᵀ u``."""
        ...

    def push_map(self, z: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        """``J (M z + c)`` of every token's `z` `[n, k]`; `matrix` is M `[d, k]`, `bias` c `[d]`."""
        return self.push(z @ matrix.T + bias)

    def pull_map(self, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """``Σ (Jᵀ u) zᵀ`` `[d, k]` and ``Σ Jᵀ u`` `[d]` over tokens: the adjoint of `push_map`."""
        pulled = self.pull(u)
        return pulled.T @ z, pulled.sum(0)

    def dense(self) -> Tensor:
        """J itself, `[n, d_out, d_in]`: d² numbers a token."""
        ...

    def tokens(self, some: slice) -> "Jacobian":
        """Return the same at some of the tokens."""
        ...


def matrix_of(jacobian: Jacobian) -> Callable[[int], Tensor]:
    """Return each token's J, `[d_out, d_in]`, made when it is asked for."""
    return lambda i: jacobian.tokens(slice(i, i + 1)).dense()[0]


@dataclass(frozen=True)
class MLPJacobian(Jacobian):
    """``A(h) = W_d (diag(σ'(a_g)⊙a_u) W_g + diag(σ(a_g)) W_u)`` at tokens h; make one with `at`.

    `by_gate` and `by_up` are the two diagonals, `[n, d_ff]`; `by_up` is None without a gate.
    """

    mlp: MLP
    by_gate: Tensor
    by_up: Tensor | None

    @classmethod
    def at(cls, mlp: MLP, h: Tensor) -> "MLPJacobian":
        """At tokens `h` `[n, d]`."""
        a_g, a_u = mlp.inner(h)
        value, slope = mlp.slopes(a_g)
        return cls(mlp, slope * a_u, None if mlp.up is None else value)

    def push(self, v: Tensor) -> Tensor:
        inner = _each(self.by_gate, v) * (v @ self.mlp.gate.T)
        if self.mlp.up is not None and self.by_up is not None:
            inner = inner.addcmul_(_each(self.by_up, v), v @ self.mlp.up.T)
        return inner @ self.mlp.down.T

    def pull(self, u: Tensor) -> Tensor:
        inner = u @ self.mlp.down
        pulled = (_each(self.by_gate, u) * inner) @ self.mlp.gate
        if self.mlp.up is not None and self.by_up is not None:
            pulled = pulled + (_each(self.by_up, u) * inner) @ self.mlp.up
        return pulled

    def push_map(self, z: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        if not is_narrow(z, matrix.shape[0]):
            return super().push_map(z, matrix, bias)
        inner = torch.zeros_like(self.by_gate)
        for weight, diagonal in self.inward:
            inner.addcmul_(diagonal, z @ (weight @ matrix).T + weight @ bias)
        return inner @ self.mlp.down.T

    def pull_map(self, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        if not is_narrow(z, self.mlp.gate.shape[1]):
            return super().pull_map(u, z)
        inner, d = u @ self.mlp.down, self.mlp.gate.shape[1]
        matrix, bias = u.new_zeros(d, z.shape[1]), u.new_zeros(d)
        for weight, diagonal in self.inward:
            pulled = diagonal * inner
            matrix += weight.T @ (pulled.T @ z)
            bias += weight.T @ pulled.sum(0)
        return matrix, bias

    @property
    def inward(self) -> list[tuple[Tensor, Tensor]]:
        """Each matrix into the MLP `[d_ff, d]`, and the factors of its outputs `[n, d_ff]`."""
        found = [(self.mlp.gate, self.by_gate)]
        if self.mlp.up is not None and self.by_up is not None:
            found.append((self.mlp.up, self.by_up))
        return found

    def dense(self) -> Tensor:
        mlp, by_up = self.mlp, self.by_up
        found = self.by_gate.new_empty(len(self.by_gate), len(mlp.down), mlp.gate.shape[1])
        for i, by_gate in enumerate(self.by_gate):
            inner = by_gate[:, None] * mlp.gate
            if mlp.up is not None and by_up is not None:
                inner.addcmul_(by_up[i][:, None], mlp.up)
            torch.mm(mlp.down, inner, out=found[i])
        return found

    def tokens(self, some: slice) -> "MLPJacobian":
        by_up = None if self.by_up is None else self.by_up[some]
        return MLPJacobian(self.mlp, self.by_gate[some], by_up)


@dataclass(frozen=True)
class FunctionJacobian(Jacobian):
    """Of any differentiable `function` from tokens `[..., d]` to tokens, at `x` `[n, d]`."""

    function: Callable[[Tensor], Tensor]
    x: Tensor

    def push(self, v: Tensor) -> Tensor:
        return torch.func.jvp(self.function, (self._points(v),), (v,))[1]

    def pull(self, u: Tensor) -> Tensor:
        # Each point's output depends on that point alone, so one pass serves all directions.
        return torch.func.vjp(self.function, self._points(u))[1](u)[0]

    def dense(self) -> Tensor:
        d_out = self.function(self.x[:1]).shape[-1]
        eye = torch.eye(d_out, dtype=self.x.dtype, device=self.x.device)
        return self.pull(eye.repeat(len(self.x), 1, 1))

    def tokens(self, some: slice) -> "FunctionJacobian":
        return FunctionJacobian(self.function, self.x[some])

    def _points(self, vectors: Tensor) -> Tensor:
        """Return every direction's point: `x`, repeated where a token has several directions."""
        if vectors.ndim == 2:
            return self.x
        return self.x[:, None].repeat(1, vectors.shape[1], 1)


@dataclass(frozen=True)
class Chain(Jacobian):
    """``outer ∘ inner``."""

    outer: Jacobian
    inner: Jacobian

    def push(self, v: Tensor) -> Tensor:
        return self.outer.push(self.inner.push(v))

    def pull(self, u: Tensor) -> Tensor:
        return self.inner.pull(self.outer.pull(u))

    def push_map(self, z: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        return self.outer.push(self.inner.push_map(z, matrix, bias))

    def pull_map(self, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.pull_map(self.outer.pull(u), z)

    def dense(self) -> Tensor:
        if isinstance(self.inner, FunctionJacobian):  # its products are the cheaper ones
            return self.inner.pull(self.outer.dense())
        return self.outer.push(self.inner.dense().mT.contiguous()).mT

    def tokens(self, some: slice) -> "Chain":
        return Chain(self.outer.tokens(some), self.inner.tokens(some))


@dataclass(frozen=True)
class Skip(Jacobian):
    """``I + J``: a branch with the residual stream around it."""

    branch: Jacobian

    def push(self, v: Tensor) -> Tensor:
        return v + self.branch.push(v)

    def pull(self, u: Tensor) -> Tensor:
        return u + self.branch.pull(u)

    def push_map(self, z: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        return z @ matrix.T + bias + self.branch.push_map(z, matrix, bias)

    def pull_map(self, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        matrix, bias = self.branch.pull_map(u, z)
        return u.T @ z + matrix, u.sum(0) + bias

    def dense(self) -> Tensor:
        matrices = self.branch.dense()
        return matrices + torch.eye(
            matrices.shape[-1], dtype=matrices.dtype, device=matrices.device
        )

    def tokens(self, some: slice) -> "Skip":
        return Skip(self.branch.tokens(some))


def is_narrow(z: Tensor, d: int) -> bool:
    """Tell whether the products of a map of `z` `[n, k]` to d dimensions cost less than of vectors.

    With a matrix of f rows it is ``f k (d + n)`` products, of vectors ``f n d``.
    """
    n, k = z.shape
    return k * (d + n) < n * d


def _each(diagonal: Tensor, vectors: Tensor) -> Tensor:
    """`diagonal` `[n, d_ff]` as a factor of `vectors`' images."""
    return diagonal if vectors.ndim == 2 else diagonal[:, None]
