"""Every kind of adapter, wherever it makes sense: found in KINDS, so that new ones are tested."""

import inspect

import torch

from toolkit.adapters.kinds import KINDS
from toolkit.models.locations import resolve
from toolkit.training.methods import Method, new_adapters, width_of

LOCATIONS = ("pre_mlp", "post_mlp", "post_block", "heads")
RANK = 3
# Arguments away from their defaults, for the kinds that have them.
OPTIONS = {"bias": True, "activation": "gelu", "l0": 0.01, "l1": 0.02, "heads": [0, 2]}


def _arguments(kind):
    return inspect.signature(KINDS[kind].identity).parameters


CASES = [
    (kind, location)
    for kind in KINDS
    for location in (("heads",) if "n_heads" in _arguments(kind) else LOCATIONS)
]


def method_of(kind, location, positions="all"):
    """The kind as a method, from which training makes its adapters."""
    options = {name: value for name, value in OPTIONS.items() if name in _arguments(kind)}
    return Method(kind, kind, location, RANK, positions, options=options)


def identical(model, kind, location, positions="all"):
    """Adapters that change nothing yet."""
    return new_adapters(model, method_of(kind, location, positions), resolve(model))


def randomised(model, kind, location, positions="all", size=0.1, seed=2):
    """Adapters some way from the identity, in the model's precision: trained on noise for a bit.

    Random numbers written into the parameters would break what constrains them (LoReFT's rows).
    """
    adapters = identical(model, kind, location, positions)
    modules = adapters.modules.to(model.dtype).requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    width = width_of(model.config.get_text_config(), location)
    draw = lambda: torch.randn(50, width, generator=generator, dtype=torch.float64).to(model.dtype)  # noqa: E731
    optimiser = torch.optim.Adam(modules.parameters(), size)
    for _ in range(4):
        optimiser.zero_grad()
        sum((a(draw()) - draw()).square().mean() for a in adapters.by_layer.values()).backward()
        optimiser.step()
    modules.zero_grad()
    modules.requires_grad_(False)
    return adapters
