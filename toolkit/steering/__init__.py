"""Steering: adapters, attaching them to a model, fitting them in closed form, saving them."""

from toolkit.steering.adapter import Adapter
from toolkit.steering.adapters import KINDS, Adapters
from toolkit.steering.attach import steer
from toolkit.steering.fitting import adapter_from, loreft_from
from toolkit.steering.gated_heads import GatedHeads
from toolkit.steering.head_affine import HeadAffine
from toolkit.steering.head_vector import HeadVector
from toolkit.steering.linear import Linear
from toolkit.steering.loreft import LoReFT
from toolkit.steering.merging import merge_into_down
from toolkit.steering.nonlinear import NonLinear
from toolkit.steering.oracle import steer_by_oracle
from toolkit.steering.positions import Positions
from toolkit.steering.saving import load_adapters, save_adapters
from toolkit.steering.vector import FixedVector

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
    "adapter_from",
    "load_adapters",
    "loreft_from",
    "merge_into_down",
    "save_adapters",
    "steer",
    "steer_by_oracle",
]
