"""Inside a block: the rows of the tables that read the MLP as matrices, for sampled tokens."""

from typing import Any

import torch
from torch import Tensor

from toolkit.analysis.first_order import exact_change
from toolkit.analysis.reachability import BUDGETS, Reach, median, reach, residual_quartiles
from toolkit.jacobian import MLPJacobian
from toolkit.mlp import MLP, MLPChange

Row = dict[str, Any]


def reachability_rows(layer: int, base: MLP, change: MLPChange, h: Tensor) -> list[Row]:
    """Of the sampled MLP inputs `h` `[n, d]`; a target that is zero has no rows."""
    if not len(h):
        return []
    targets = mlp_targets(base, change, h)
    if not targets:
        return []
    radii = torch.tensor(BUDGETS, dtype=torch.float64) * h.double().norm(dim=1)[:, None]
    wanted = torch.stack(list(targets.values()), 1)
    found = reach(MLPJacobian.at(base.to(h.dtype), h).dense(), wanted, radii)
    left = through_real(base, h, found, wanted)
    scale = h.double().norm(dim=1)
    return [
        {
            "layer": layer,
            "target": target,
            "budget": budget,
            **residual_quartiles(found.residual[:, i, j]),
            "nonlinear_residual_median": median(left[:, i, j]),
            "min_norm_median": median(found.min_norm[:, i] / scale),
            "rank_median": median(found.rank),
            "n_tokens": len(h),
        }
        for i, target in enumerate(targets)
        for j, budget in enumerate(BUDGETS)
    ]


def mlp_targets(base: MLP, change: MLPChange, h: Tensor) -> dict[str, Tensor]:
    """What fine-tuning did to the MLP at `h`, `[n, d]` float64: ``down`` and ``exact``."""
    h = h.double().cpu()
    exact, down = exact_change(base.to(h.dtype), change.to(h.dtype), h)
    return {name: v for name, v in (("down", down), ("exact", exact)) if bool(v.any(1).all())}


def through_real(function: Any, x: Tensor, found: Reach, wanted: Tensor) -> Tensor:
    """``‖f(x + Δ) − f(x) − v‖ / ‖v‖`` of every Δ in `found`, `[n, m, b]`, in float64."""
    exact = function.to(torch.float64)
    x = x.double().cpu()
    moved = exact(x[:, None, None] + found.steering) - exact(x)[:, None, None]
    return (moved - wanted[:, :, None]).norm(dim=-1) / wanted.norm(dim=-1)[:, :, None]
