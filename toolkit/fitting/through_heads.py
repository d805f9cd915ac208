"""Least squares through the output projection: what the heads must add to supply the stream.

``min E‖r − W_o Δ(z)‖²``, Δ an affine map of the heads' outputs z and r what the stream misses. The
best affine map of r from z is fitted within the columns of W_o, and taken back through W_o.

Where a family norms what attention contributes (Gemma, OLMo-2), the projection's output y arrives
as ``w ⊙ y / rms(y)``. To first order, at the norm's own scale, ``rms(y) r`` is to be supplied
through ``diag(w) W_o``: that scale is each token's own, and the weights that it would give tokens
in the sum of squares are left out.
"""

import torch
from torch import Tensor, nn

from toolkit.adapters.adapter import Adapter
from toolkit.adapters.linear import Linear
from toolkit.adapters.vector import FixedVector
from toolkit.blocks.sublayer import HeadOutputs
from toolkit.errors import InputError
from toolkit.runtime.placement import for_analyses
from toolkit.statistics import Moments

CUTOFF = 1e-4  # of the largest singular value: what is smaller would ask for steering without bound


class HeadProjection:
    """The way from one block's heads to the stream, and back.

    `basis` `[d, k]` spans what the heads can add; `inverse` `[n_heads · head_dim, d]` takes it back
    to the heads.
    """

    def __init__(self, heads: HeadOutputs) -> None:
        self.heads, self.scale = heads, None
        self._norm_is_known = False
        matrix = heads.weight.double()
        if heads.post is not None:
            self.scale = _scale_of(heads.post, matrix)
            matrix = self.scale.double()[:, None] * matrix
        u, sizes, v = torch.linalg.svd(for_analyses(matrix), full_matrices=False)
        kept = sizes > CUTOFF * sizes[0]
        self.basis = u[:, kept]
        self.inverse = (v[kept].T / sizes[kept]) @ self.basis.T

    def target(self, z: Tensor, missing: Tensor) -> Tensor:
        """Return what the matrix is to supply `[n, d]` for the stream to get what is `missing`."""
        if self.scale is None or self.heads.post is None:
            return missing
        y = self.heads.attended(z)
        scaled, normed = self.scale.to(y) * y, self.heads.post(y.to(self.scale.dtype)).to(y)
        rms = scaled.norm(dim=-1, keepdim=True) / normed.norm(dim=-1, keepdim=True)
        if not self._norm_is_known:  # at every batch it would wait for a GPU
            self._require_rms(normed * rms, scaled)
        return missing * rms

    def _require_rms(self, expected: Tensor, scaled: Tensor) -> None:
        """Raise InputError where the norm is not what makes `expected` of `scaled`."""
        if not torch.allclose(expected, scaled, rtol=1e-2, atol=1e-3 * float(scaled.std())):
            raise InputError(
                "heads cannot be fitted: what attention contributes passes a "
                f"{type(self.heads.post).__name__} that is not a root-mean-square norm"
            )
        self._norm_is_known = True

    def at_heads(self, target: Tensor) -> Tensor:
        """Return the least that the heads must add to supply `target` `[n, d]`."""
        return target @ self.inverse.T.to(target)

    def within(self, moments: Moments, x: str, t: str) -> Moments:
        """Return the moments of (x, x) and (t, x) with what the heads cannot add left out of t."""
        mean, covariance = dict(moments.mean), dict(moments.covariance)
        mean[t] = self.basis @ (self.basis.T @ mean[t])
        covariance[t, x] = self.basis @ (self.basis.T @ covariance[t, x])
        return Moments(moments.n, mean, covariance)

    def back(self, adapter: Adapter) -> Adapter:
        """Return the adapter at the heads that adds to the stream what `adapter` would."""

        def at_heads(part: Tensor) -> Tensor:
            return (self.inverse.to(part.device) @ part.double()).to(part.dtype)

        if isinstance(adapter, FixedVector):
            return FixedVector(at_heads(adapter.bias.data))
        assert isinstance(adapter, Linear)
        assert adapter.bias is not None
        down = None if adapter.down is None else adapter.down.data
        return Linear(at_heads(adapter.up.data), down, at_heads(adapter.bias.data))


@torch.no_grad()
def _scale_of(norm: nn.Module, like: Tensor) -> Tensor:
    """Return the weights w of a root-mean-square norm: what it makes of ones."""
    parameter = next(norm.parameters(), None)
    dtype = like.dtype if parameter is None else parameter.dtype
    return norm(torch.ones(1, len(like), dtype=dtype, device=like.device))[0]
