"""What is measured, at which budgets and ranks, and the types of arrays and maps."""

import numpy as np
import torch

BRANCHES = ("pre_mlp", "post_mlp", "post_block")
BUDGETS = (0.01, 0.03, 0.1, 0.3, 1.0)
RANKS = (0, 1, 2, 4, 8, 16, 32, 64)
SHARED_RANKS = (0, 1, 8, 32, "full")
Array = np.ndarray
Map = tuple[Array, Array]  # A [d, d] and b [d]


def to_numpy(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy()
