"""The oracle delta, defined once."""

import torch
from torch import Tensor


def wide(states: Tensor) -> Tensor:
    """`states` in the precision of statistics' inputs: float64 stays, all else becomes float32."""
    return states if states.dtype == torch.float64 else states.float()


def delta(tuned: Tensor, base: Tensor) -> Tensor:
    """Return the oracle delta, ``tuned − base``, of any shape."""
    return wide(tuned) - wide(base)
