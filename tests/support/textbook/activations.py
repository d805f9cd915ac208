"""Every family's activation function is written out with its derivative."""

from collections.abc import Callable

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special

from tests.support.textbook.definitions import Array


def normal_cdf(x: Array) -> Array:
    return scipy.special.ndtr(x)


def normal_pdf(x: Array) -> Array:
    return np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_tanh_slope(x: Array) -> Array:
    t = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    inner = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * inner


def sigmoid(x: Array) -> Array:
    return scipy.special.expit(x)


ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "silu": (
        lambda x: x * sigmoid(x),
        lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x))),
    ),
    "gelu_tanh": (gelu_tanh, gelu_tanh_slope),
    "gelu": (lambda x: x * normal_cdf(x), lambda x: normal_cdf(x) + x * normal_pdf(x)),
    "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0).astype(float)),
}
ACTIVATION_OF = {"Gemma": "gelu_tanh", "GPT2": "gelu_tanh", "GPTNeoX": "gelu", "OPT": "relu"}
