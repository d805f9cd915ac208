"""The inside of a block as functions and matrices: its MLP, the MLP sublayer, and their Jacobians.

`mlp`, `jacobian` and `sublayer` are mathematics on tensors; `read` takes them out of live modules
and proves that they are what the model computes; `parts` hands them out one block at a time.
"""

from toolkit.blocks.jacobian import Jacobian, MLPJacobian
from toolkit.blocks.mlp import MLP, Change, MLPChange
from toolkit.blocks.parts import BlockParts, BlockPartsReader, PlaceSample, Sample
from toolkit.blocks.sublayer import HeadOutputs, MLPSublayer

__all__ = [
    "MLP",
    "BlockParts",
    "BlockPartsReader",
    "Change",
    "HeadOutputs",
    "Jacobian",
    "MLPChange",
    "MLPJacobian",
    "MLPSublayer",
    "PlaceSample",
    "Sample",
]
