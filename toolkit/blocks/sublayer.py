"""The rest of a block after its attention branch, as a function of the residual stream.

``x ↦ x + post(mlp(norm(x)))``, with `x` the stream after the first skip (``resid_mid``): steering
the attention's contribution adds to `x`, so this is what a steering vector at ``pre_mlp`` passes
through. `norm` and `post` are the model's own modules; families have either, both or none.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.blocks.jacobian import Chain, FunctionJacobian, Jacobian, MLPJacobian, Skip
from toolkit.blocks.mlp import MLP
from toolkit.blocks.scaling_norm import MLPAfterNorm


@dataclass(frozen=True)
class MLPSublayer:
    """``x + post(mlp(norm(x)))``; `norm` and `post` are None where a family has none."""

    mlp: MLP
    norm: nn.Module | None = None
    post: nn.Module | None = None

    def inputs(self, x: Tensor) -> Tensor:
        """Return the MLP's input ``h = norm(x)``."""
        return self.norm(x) if self.norm else x

    def contributed(self, y: Tensor) -> Tensor:
        """Return what the MLP's output `y` adds to the stream, ``post(y)``."""
        return self.post(y) if self.post else y

    def branch(self, x: Tensor) -> Tensor:
        """Return the MLP branch's contribution."""
        return self.contributed(self.mlp(self.inputs(x)))

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    def to_branch(self, x: Tensor) -> Jacobian:
        """``J_post A J_norm`` at tokens `x` `[n, d]`."""
        h = self.inputs(x)
        mlp = MLPJacobian.at(self.mlp, h)
        found: Jacobian = MLPAfterNorm(mlp, FunctionJacobian(self.norm, x)) if self.norm else mlp
        return Chain(FunctionJacobian(self.post, self.mlp(h)), found) if self.post else found

    def to_block(self, x: Tensor) -> Jacobian:
        """``I + J_post A J_norm`` at tokens `x` `[n, d]`."""
        return Skip(self.to_branch(x))

    def to(self, dtype: torch.dtype, device: Any = None) -> "MLPSublayer":
        """Return the same in another precision, on `device` (None: where it is)."""
        norms = {name: _in(getattr(self, name), dtype, device) for name in ("norm", "post")}
        return replace(self, mlp=self.mlp.to(dtype, device), **norms)


@dataclass(frozen=True)
class HeadOutputs:
    """How the heads' outputs reach the stream: ``post(W_o z + b_o)``.

    `weight` `[d, n_heads · head_dim]`; `post` is the norm on the attention's output, where a
    family has one.
    """

    weight: Tensor
    bias: Tensor
    n_heads: int
    post: nn.Module | None = None

    def attended(self, z: Tensor) -> Tensor:
        """Return the projection's output ``W_o z + b_o``, `[n, d]`."""
        weight, bias = (part.to(z) for part in (self.weight, self.bias))
        return z @ weight.T + bias

    def directions(self, z: Tensor) -> Tensor:
        """Orthonormal bases of what each head can add to the stream at tokens `z`.

        `z` `[n, n_heads · head_dim]`; `[n, n_heads, d, head_dim]`.
        """
        columns = self.weight.to(z).T[None]  # the same for all tokens, but for a norm
        if self.post:
            columns = columns.expand(len(z), -1, -1)
            columns = FunctionJacobian(_in(self.post, z.dtype, z.device), self.attended(z)).push(
                columns
            )
        bases = orthonormal(columns.unflatten(1, (self.n_heads, -1)))
        return bases.mT.expand(len(z), -1, -1, -1)


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal bases of the spans of `rows` `[..., k, d]`, by Cholesky in float64.

    As products of stacks they are many times faster than stacks of QR decompositions.
    """
    wide = rows.double()
    gram = wide @ wide.mT
    level = 1e-13 * gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    gram = gram + (level + 1e-300) * eye
    factor = torch.linalg.cholesky(gram)
    return torch.linalg.solve_triangular(factor, wide, upper=False).to(rows.dtype)


def _in(module: Any, dtype: torch.dtype, device: Any) -> Any:
    """A copy of `module` in `dtype`, on `device` (None: where it is)."""
    return copy.deepcopy(module).to(device=device, dtype=dtype) if module is not None else None
