"""Steering: adapters, attaching them to a model, fitting them in closed form, saving them."""

from toolkit.steering.adapters import Adapters, FixedVector, Linear
from toolkit.steering.attach import steer
from toolkit.steering.fitting import adapter_from
from toolkit.steering.saving import load_adapters, save_adapters

__all__ = [
    "Adapters",
    "FixedVector",
    "Linear",
    "adapter_from",
    "load_adapters",
    "save_adapters",
    "steer",
]
