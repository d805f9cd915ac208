"""Every affine adapter in LoReFT's form (Wu et al. 2024, arXiv:2404.03592)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.adapters.affine import Affine

INSIDE = 1e-9  # of a constant's length: what of it may lie outside a span in float64


@dataclass(frozen=True)
class Subspace:
    """Hold ``Δ = Rᵀ(W h + b − R h)``: R `rows` `[r, d]`, orthonormal, W `[r, d]`, b `[r]`."""

    rows: Tensor
    target: Tensor
    bias: Tensor


def subspace(found: Affine) -> Subspace:
    """Return `found` with orthonormal rows R, in float64.

    R spans the range of `up`, by QR: ``up (down h) + c = Rᵀ((R + R up down) h + R c − R h)``. A
    constant c outside of that range takes one more row.
    """
    basis = torch.linalg.qr(found.up).Q
    outside = found.bias - basis @ (basis.T @ found.bias)
    if outside.norm() > INSIDE * found.bias.norm():
        basis = torch.linalg.qr(torch.cat([found.up, found.bias[:, None]], dim=1)).Q
    rows = basis.T.contiguous()
    return Subspace(rows, rows + (rows @ found.up) @ found.down, rows @ found.bias)
