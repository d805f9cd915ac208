"""Adapters that become part of the weights."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.adapters.adapter import Adapter
from toolkit.adapters.collection import Adapters
from toolkit.adapters.linear import Linear
from toolkit.adapters.loreft import LoReFT
from toolkit.adapters.vector import FixedVector
from toolkit.models.locations import mlp_projections, resolve


@torch.no_grad()
def merge_into_down(model: nn.Module, adapters: Adapters) -> None:
    """Put adapters at ``post_mlp`` into the down projections: ``W_d + A W_d``, the post's ΔW_d^eff.

    `model`, which is changed, then gives the logits of the steered model. Raises ValueError where
    weights cannot do what the adapters do, before anything is changed. Where adapters have a
    constant, down projections get a bias; a family whose projections have none forgets it when it
    is saved and loaded by transformers.
    """
    if adapters.location != "post_mlp" or str(adapters.positions) != "every":
        raise ValueError(
            f"these adapters steer {adapters.positions} tokens at {adapters.location}: weights act "
            "after the MLP and on every token, a sequence's first one too. Train with positions "
            'every, or put positions=Positions.parse("every") into them and judge them again'
        )
    sites, projections = resolve(model), mlp_projections(model)
    maps = {layer: _matrix(adapter) for layer, adapter in adapters.by_layer.items()}
    downs: dict[int, Any] = {layer: projections[layer]["down"] for layer in maps}
    for layer, down in downs.items():
        if type(down) is not nn.Linear or down not in sites.at["post_mlp", layer].module.modules():
            raise ValueError(
                f"block {layer}: a norm stands behind the down projection, or it is a "
                f"{type(down).__name__}: there is no plain matrix to merge into"
            )
    for layer, (matrix, bias) in maps.items():
        down = downs[layer]
        weight = down.weight.double()
        matrix, bias = matrix.to(weight), bias.to(weight)
        if down.bias is not None:
            bias = bias + down.bias.double() + matrix @ down.bias.double()
        down.weight.copy_(weight + matrix @ weight)
        if down.bias is not None or bias.any():
            down.bias = nn.Parameter(bias.to(down.weight), requires_grad=False)


def _matrix(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """``Δ = A y + b`` as A `[d, d]` and b `[d]`, in float64."""
    if not isinstance(adapter, FixedVector | Linear | LoReFT):
        raise ValueError(f"a {adapter.kind} adapter is no affine map of the MLP's output")
    width = adapter.config["width"]
    double = copy.deepcopy(adapter).double()
    zero = torch.zeros(width, dtype=torch.float64, device=next(double.parameters()).device)
    bias = double(zero)
    return (double(torch.eye(width).to(zero)) - bias).T, bias
