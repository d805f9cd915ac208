"""A block's MLP as matrices: what the first-order and reachability analyses compute with."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.locations import causal_lm, mlp_projections

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MLP:
    """``y(h) = W_d (σ(a_g) ⊙ a_u) + b_d`` with ``a_g = W_g h + b_g``, ``a_u = W_u h + b_u``.

    Without a gate (`up` is None) ``y(h) = W_d σ(a_g) + b_d``: `gate` is then the one inner
    projection. Weights are `[out, in]`; tokens are rows.
    """

    activation: Activation
    gate: Tensor
    gate_bias: Tensor
    down: Tensor
    down_bias: Tensor
    up: Tensor | None = None
    up_bias: Tensor | None = None

    def inner(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """``a_g`` and ``a_u`` (ones without a gate) of `h` `[n, d]`, each `[n, d_ff]`."""
        a_g = h @ self.gate.T + self.gate_bias
        if self.up is None:
            return a_g, torch.ones_like(a_g)
        return a_g, h @ self.up.T + self.up_bias

    def __call__(self, h: Tensor) -> Tensor:
        a_g, a_u = self.inner(h)
        return (self.activation(a_g) * a_u) @ self.down.T + self.down_bias

    def slopes(self, a_g: Tensor) -> tuple[Tensor, Tensor]:
        """``σ(a_g)`` and ``σ'(a_g)``, elementwise."""
        # An activation is elementwise, so its derivative is its Jacobian-vector product with ones.
        value, slope = torch.func.jvp(self.activation, (a_g,), (torch.ones_like(a_g),))
        return value, slope

    def jacobian(self, h: Tensor) -> Tensor:
        """``A(h) = W_d J(h)`` of one token `h` `[d]`: `[d, d]`."""
        a_g, a_u = self.inner(h[None])
        value, slope = self.slopes(a_g)
        inner = (slope * a_u).T * self.gate
        if self.up is not None:
            inner = inner + value.T * self.up
        return self.down @ inner

    def minus(self, other: "MLP") -> "MLP":
        """The weight change ``self − other``, as weights."""
        names = ["gate", "gate_bias", "down", "down_bias"]
        names += ["up", "up_bias"] if self.up is not None else []
        return replace(self, **{name: getattr(self, name) - getattr(other, name) for name in names})

    def to(self, dtype: torch.dtype) -> "MLP":
        """The same in another precision."""
        tensors = {k: v.to(dtype) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def mlps(model: nn.Module) -> list[MLP]:
    """The dense MLP of every block of `model`; ValueError, with the reason, if it has none."""
    return [_mlp(causal_lm(model), projections) for projections in mlp_projections(model)]


def _mlp(model: nn.Module, projections: dict[str, nn.Module]) -> MLP:
    gate, gate_bias = affine(projections["pre"])
    down, down_bias = affine(projections["down"])
    activation = _activation(model.config)
    if "linear" not in projections:
        return MLP(activation, gate, gate_bias, down, down_bias)
    if projections["linear"] is projections["pre"]:  # fused: the gate's rows, then the up's
        (gate, up), (gate_bias, up_bias) = gate.chunk(2), gate_bias.chunk(2)
    else:
        up, up_bias = affine(projections["linear"])
    return MLP(activation, gate, gate_bias, down, down_bias, up, up_bias)


def affine(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight `[out, in]` and bias `[out]` of a linear module; a LoRA's update is added."""
    if hasattr(module, "get_base_layer"):  # a PEFT layer: its base layer and active adapters
        weight, bias = affine(module.get_base_layer())
        for name in module.active_adapters:
            weight = weight + module.get_delta_weight(name).to(weight.dtype)
        return weight, bias
    weight = module.weight.detach()
    if type(module).__name__ == "Conv1D":  # GPT-2 keeps its weights as [in, out]
        weight = weight.T
    elif not isinstance(module, nn.Linear):
        raise ValueError(f"a {type(module).__name__} is not a linear projection that can be read")
    bias = module.bias.detach() if module.bias is not None else weight.new_zeros(len(weight))
    return weight, bias


def _activation(config: Any) -> Activation:
    from transformers.activations import ACT2FN

    for name in ("hidden_act", "hidden_activation", "activation_function"):
        if getattr(config, name, None):
            return ACT2FN[getattr(config, name)]
    raise ValueError(f"{type(config).__name__} does not name its MLP's activation")
