"""Adapters in closed form, from fits that the march's statistics give."""

import torch

from toolkit.adapters.adapter import Adapter, columns
from toolkit.adapters.linear import Linear
from toolkit.adapters.loreft import LoReFT
from toolkit.adapters.vector import FixedVector
from toolkit.analysis.linear_fit import RELATIVE_RIDGE, LinearFit, Rank, leading_eigenvectors
from toolkit.statistics import Moments


def adapter_from(fit: LinearFit, rank: Rank, dtype: torch.dtype = torch.float32) -> Adapter:
    """Return the adapter that a fit gives at `rank`: 0 is the fixed vector."""
    bias = fit.bias(rank).to(dtype)
    if rank == 0:
        return FixedVector(bias)
    if rank == "full":
        return Linear(fit.full.to(dtype, copy=True), None, bias)
    up, down = fit.factors(rank)
    return Linear(up.to(dtype, copy=True), down.to(dtype), bias)


def loreft_from(
    moments: Moments, x: str, t: str, rank: Rank, dtype: torch.dtype = torch.float32
) -> LoReFT:
    """The LoReFT ``Rᵀ(W x + b − R x)`` nearest to the target `t`, with the ridge of `fit_linear`.

    LoReFT can add nothing outside R's rows, a constant neither. So R's rows lead the second moment,
    not the covariance, of what the full fit explains: ``C_tx (C_xx + ridge)⁻¹ C_xt + t̄ t̄ᵀ``.
    Half precisions become float32: torch keeps no rows orthonormal in them.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    c_xx, c_tx = moments.covariance[x, x], moments.covariance[t, x]
    d = len(c_xx)
    ridge = RELATIVE_RIDGE * float(c_xx.trace()) / d or 1.0
    eye = torch.eye(d, dtype=c_xx.dtype, device=c_xx.device)
    full = torch.linalg.solve(c_xx + ridge * eye, c_tx.T).T
    mean = moments.mean[t]
    seen = full @ c_tx.T + torch.outer(mean, mean)
    rows = leading_eigenvectors((seen + seen.T) / 2, columns(rank, d)).T.contiguous()
    change = rows @ full
    bias = rows @ mean - change @ moments.mean[x]
    adapter = LoReFT(rows.to(dtype), (rows + change).to(dtype), bias.to(dtype))
    # The parametrisation's own rows differ from those asked for by rounding.
    adapter.target.data = (adapter.rows.detach() + change.to(dtype)).contiguous()
    return adapter
