"""Steering adapters: seven kinds, where they attach, which tokens they steer, how they are saved.

A kind is one file with one final class; `kinds` lists them, and attaching, saving, training and the
tests find them there. Adapters are functions from a state to what is added to it.
"""

from toolkit.adapters.adapter import Adapter
from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.adapters.gated_heads import GatedHeads
from toolkit.adapters.head_affine import HeadAffine
from toolkit.adapters.head_vector import HeadVector
from toolkit.adapters.kinds import KINDS
from toolkit.adapters.linear import Linear
from toolkit.adapters.loreft import LoReFT
from toolkit.adapters.merge import merge_into_weights
from toolkit.adapters.nonlinear import NonLinear
from toolkit.adapters.oracle import steer_by_oracle
from toolkit.adapters.positions import Positions
from toolkit.adapters.vector import FixedVector

__all__ = [
    "KINDS",
    "Adapter",
    "Adapters",
    "FixedVector",
    "GatedHeads",
    "HeadAffine",
    "HeadVector",
    "Linear",
    "LoReFT",
    "NonLinear",
    "Positions",
    "merge_into_weights",
    "steer",
    "steer_by_oracle",
]
