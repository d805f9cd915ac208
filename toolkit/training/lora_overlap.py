"""LoRA and post-block adapters trained together: how far what they write overlaps."""

from typing import Any

import torch
from torch import Tensor, nn

from toolkit.adapters.collection import Adapters
from toolkit.adapters.linear import Linear
from toolkit.models.locations import causal_lm, mlp_projections, resolve


def written_by_lora(model: Any) -> list[list[nn.Parameter]]:
    """For each block, the LoRA factors B whose columns it adds to the residual stream.

    They are those of the attention's output projection and of the MLP's down projection.
    """
    sites = resolve(model)
    factors = []
    for layer, projections in enumerate(mlp_projections(model)):
        outputs: tuple[Any, ...] = (sites.at["heads", layer].module, projections["down"])
        factors.append([module.lora_B["default"].weight for module in outputs])
    return factors


class Overlap:
    """The mean squared cosine between what LoRA and what adapters write in a block.

    With columns scaled to unit length (a zero column stays zero), ``‖Uᵀ B‖²_F`` over the number of
    their pairs: 0 where the two output subspaces are orthogonal, 1 where they are one line.
    """

    def __init__(self, model: nn.Module, adapters: Adapters) -> None:
        self.pairs = []
        for layer, factors in enumerate(written_by_lora(causal_lm(model))):
            adapter = adapters.by_layer[layer]
            assert isinstance(adapter, Linear)
            self.pairs += [(adapter.up, factor) for factor in factors]

    def __call__(self) -> Tensor:
        shares = [(_unit(up).T @ _unit(factor)).square().mean() for up, factor in self.pairs]
        return torch.stack(shares).mean()


def _unit(matrix: Tensor) -> Tensor:
    return matrix / (matrix.norm(dim=0, keepdim=True) + 1e-6)
