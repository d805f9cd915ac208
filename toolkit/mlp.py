"""A block's MLP as matrices: what the first-order and reachability analyses compute with."""

from collections.abc import Callable, Sequence
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
    up_bias: Tensor | float = 0.0

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
        return torch.func.jvp(self.activation, (a_g,), (torch.ones_like(a_g),))  # type: ignore[return-value]

    def to(self, dtype: torch.dtype, device: Any = "cpu") -> "MLP":
        """The same in another precision, on `device`."""
        tensors = {k: v.to(device, dtype) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Change:
    """What fine-tuning changed of a linear module: ``x ↦ ΔW x + Δb``.

    `factors` is ``(ΔW,)``, or ``(B, A)`` with ``ΔW = B A`` where the change is a LoRA: it is never
    multiplied out.
    """

    factors: tuple[Tensor, ...]
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            x = x @ factor.T
        return x + self.bias

    def halves(self) -> tuple["Change", "Change"]:
        """Of a fused projection: the gate's rows, and the up's."""
        first, second = self.factors[0].chunk(2)
        biases = self.bias.chunk(2)
        rest = self.factors[1:]
        return Change((first, *rest), biases[0]), Change((second, *rest), biases[1])

    def scaled(self, by: float) -> "Change":
        """`by` times the change."""
        return Change((self.factors[0] * by, *self.factors[1:]), self.bias * by)

    def to(self, dtype: torch.dtype, device: Any = "cpu") -> "Change":
        """The same in another precision, on `device`."""
        return Change(tuple(f.to(device, dtype) for f in self.factors), self.bias.to(device, dtype))


@dataclass(frozen=True)
class MLPChange:
    """The changes of an `MLP`'s matrices and biases."""

    gate: Change
    down: Change
    up: Change | None = None

    def scaled(self, by: float) -> "MLPChange":
        """`by` times every change."""
        return MLPChange(**{name: part and part.scaled(by) for name, part in vars(self).items()})

    def to(self, dtype: torch.dtype, device: Any = "cpu") -> "MLPChange":
        """The same in another precision, on `device`."""
        parts = {name: part and part.to(dtype, device) for name, part in vars(self).items()}
        return MLPChange(**parts)


def mlps(base: nn.Module, tuned: nn.Module) -> list[tuple[MLP, MLPChange]]:
    """The base model's dense MLP in every block, and what fine-tuning changed of it.

    Raises ValueError, with the reason, where a block has no MLP that can be read.
    """
    return list(MLPs(base, tuned))


class MLPs(Sequence[tuple[MLP, MLPChange]]):
    """`mlps`, each read when it is asked for.

    Raises ValueError, with the reason, where a block has no MLP, and later where it cannot be read.
    """

    def __init__(self, base: nn.Module, tuned: nn.Module) -> None:
        self._activation = _activation(causal_lm(base).config)
        self._base, self._tuned = mlp_projections(base), mlp_projections(tuned)

    def __len__(self) -> int:
        return len(self._base)

    def __getitem__(self, layer: Any) -> Any:
        ours, theirs = self._base[layer], self._tuned[layer]
        return _mlp(self._activation, ours), _mlp_change(ours, theirs)


def _mlp(activation: Activation, projections: dict[str, nn.Module]) -> MLP:
    gate, gate_bias = affine(projections["pre"])
    down, down_bias = affine(projections["down"])
    if "linear" not in projections:
        return MLP(activation, gate, gate_bias, down, down_bias)
    if _is_fused(projections):
        (gate, up), (gate_bias, up_bias) = gate.chunk(2), gate_bias.chunk(2)
    else:
        up, up_bias = affine(projections["linear"])
    return MLP(activation, gate, gate_bias, down, down_bias, up, up_bias)


def _mlp_change(base: dict[str, nn.Module], tuned: dict[str, nn.Module]) -> MLPChange:
    gate, down = (module_change(base[name], tuned[name]) for name in ("pre", "down"))
    if "linear" not in base:
        return MLPChange(gate, down)
    if _is_fused(base):
        gate, up = gate.halves()
        return MLPChange(gate, down, up)
    return MLPChange(gate, down, module_change(base["linear"], tuned["linear"]))


def _is_fused(projections: dict[str, nn.Module]) -> bool:
    """Whether one projection computes both branches: the gate's rows, then the up's."""
    return projections["linear"] is projections["pre"]


def module_change(base: nn.Module, tuned: nn.Module) -> Change:
    """What fine-tuning changed of one linear module; a LoRA's factors stay factors."""
    if factors := _lora_factors(base, tuned):
        return Change(factors, factors[0].new_zeros(len(factors[0])))
    (weight, bias), (tuned_weight, tuned_bias) = affine(base), affine(tuned)
    return Change((tuned_weight - weight,), tuned_bias - bias)


def _lora_factors(base: Any, tuned: Any) -> tuple[Tensor, ...]:
    """B and A of plain LoRAs on base's own weights; nothing where `tuned` is anything else."""
    if not hasattr(tuned, "lora_A") or not hasattr(base, "weight"):
        return ()
    names = tuned.active_adapters
    plain = all(name in tuned.lora_A and not tuned.use_dora.get(name) for name in names)
    shared = tuned.get_base_layer().weight.data_ptr() == base.weight.data_ptr()
    biased = any(tuned.lora_B[name].bias is not None for name in names if name in tuned.lora_B)
    if not (plain and shared) or biased:
        return ()
    ups = [tuned.lora_B[name].weight.detach() * tuned.scaling[name] for name in names]
    downs = [tuned.lora_A[name].weight.detach() for name in names]
    return torch.cat(ups, 1), torch.cat(downs)


@torch.no_grad()
def affine(module: Any) -> tuple[Tensor, Tensor]:
    """Weight `[out, in]` and bias `[out]` of a linear module, wrapped by PEFT or not."""
    if hasattr(module, "get_base_layer"):  # whatever the adapter does, it does it to the identity
        weight, _ = affine(module.get_base_layer())
        bias = module(weight.new_zeros(1, weight.shape[1]))[0]
        eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return (module(eye) - bias).T, bias
    weight = module.weight
    if type(module).__name__ == "Conv1D":  # GPT-2 keeps its weights as [in, out]
        weight = weight.T
    elif not isinstance(module, nn.Linear):
        raise ValueError(f"a {type(module).__name__} is not a linear projection that can be read")
    bias = module.bias if module.bias is not None else weight.new_zeros(len(weight))
    return weight.detach(), bias.detach()


def _activation(config: Any) -> Activation:
    from transformers.activations import ACT2FN

    for name in ("hidden_act", "hidden_activation", "activation_function", "activation"):
        if getattr(config, name, None):
            return ACT2FN[getattr(config, name)]
    raise ValueError(f"{type(config).__name__} does not name its MLP's activation")
