"""Adapters in closed form, from fits that the march's statistics give."""

import torch

from toolkit.analysis.linear_fit import LinearFit, Rank
from toolkit.steering.adapters import Adapter, FixedVector, Linear


def adapter_from(fit: LinearFit, rank: Rank, dtype: torch.dtype = torch.float32) -> Adapter:
    """The adapter that a fit gives at `rank`: 0 is the fixed vector."""
    bias = fit.bias(rank).to(dtype)
    if rank == 0:
        return FixedVector(bias)
    if rank == "full":
        return Linear(fit.full.to(dtype, copy=True), None, bias)
    up, down = fit.factors(rank)
    return Linear(up.to(dtype, copy=True), down.to(dtype), bias)
