"""Adapters as affine maps of the state: what weights, and the formats of others, can hold."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.adapters.adapter import Adapter
from toolkit.adapters.gated_heads import GatedHeads
from toolkit.adapters.head_affine import HeadAffine
from toolkit.adapters.head_vector import HeadVector
from toolkit.adapters.linear import Linear
from toolkit.adapters.loreft import LoReFT
from toolkit.adapters.vector import FixedVector

DIAGONAL = (HeadVector, HeadAffine, GatedHeads)  # kinds that scale each number by itself


@dataclass(frozen=True)
class Affine:
    """Hold ``Δ = up (down h) + bias`` in float64: `up` `[d, r]`, `down` `[r, d]`, `bias` `[d]`.

    r is 0 for a constant. Full rank has an `up` or a `down` that is the identity.
    """

    up: Tensor
    down: Tensor
    bias: Tensor


@torch.no_grad()
def affine(adapter: Adapter) -> Affine | None:
    """Return `adapter` as an affine map; None where it is none (the non-linear kind)."""
    adapter = copy.deepcopy(adapter).cpu().double()
    if isinstance(adapter, FixedVector):
        width = len(adapter.bias)
        return Affine(adapter.bias.new_zeros(width, 0), adapter.bias.new_zeros(0, width),
                      adapter.bias.detach())  # fmt: skip
    if isinstance(adapter, Linear):
        up = adapter.up.detach()
        down = torch.eye(len(up)).to(up) if adapter.down is None else adapter.down.detach()
        bias = up.new_zeros(len(up)) if adapter.bias is None else adapter.bias.detach()
        return Affine(up, down, bias)
    if isinstance(adapter, LoReFT):
        rows = adapter.rows
        return Affine(rows.T, adapter.target - rows, adapter.bias @ rows)
    if isinstance(adapter, DIAGONAL):
        scale, bias = diagonal(adapter)
        chosen = scale.nonzero()[:, 0]
        rows = torch.eye(len(scale)).to(scale)[chosen]
        return Affine(rows.T, scale[chosen, None] * rows, bias)
    return None


def affine_maps(by_layer: Mapping[int, Adapter]) -> dict[int, Affine] | None:
    """Return the maps of the blocks that change anything, in order; None where one is no map."""
    found = {layer: affine(adapter) for layer, adapter in sorted(by_layer.items())}
    maps = {layer: one for layer, one in found.items() if one is not None}
    if len(maps) < len(found):
        return None
    return {layer: one for layer, one in maps.items() if len(one.down) or one.bias.any()}


@torch.no_grad()
def diagonal(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Return the scale and the constant of an adapter of a `DIAGONAL` kind, float64 `[d]`."""
    adapter = copy.deepcopy(adapter).cpu().double()
    bias = adapter(torch.zeros(adapter.config["width"], dtype=torch.float64))
    return adapter(torch.ones_like(bias)) - bias, bias
