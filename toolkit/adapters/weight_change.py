"""A low-rank change of weights, module by module: what a LoRA is, attached, saved and counted."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from toolkit.blocks.read import is_linear, is_transposed
from toolkit.errors import InputError
from toolkit.models.locations import Sites, resolve
from toolkit.runtime.heap import release_freed

WeightFit = Literal["metric", "plain", "exact"]


@dataclass(frozen=True)
class WeightChange:
    """What is added to the matrices of a model's blocks: ``up @ down``, by block and module.

    `by_module` maps (layer, name of the module in the block) to up `[out, r]` and down `[r, in]`;
    ranks may differ. `fit` says in which metric it was cut to its rank (exact: it was not), `rank`
    is the one of all modules, or in words the mean of theirs. `blocks` are the full names of the
    model's blocks, `base` is the model's own name and `transposed` says that it keeps its matrices
    as `[in, out]` (GPT-2): files need them. `biases` `[out]` are added to those modules' own, or
    are theirs where they have none; their modules are in `by_module` too, with r = 0 at least.
    """

    by_module: Mapping[tuple[int, str], tuple[Tensor, Tensor]]
    fit: WeightFit
    rank: int | str
    blocks: tuple[str, ...] = ()
    base: str = ""
    transposed: bool = False
    biases: Mapping[tuple[int, str], Tensor] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return "lora"

    @property
    def location(self) -> str:
        """Name no location: weights change in all of the block."""
        return ""

    @property
    def parameters(self) -> int:
        """Count the numbers that the change holds."""
        factors = sum(part.numel() for parts in self.by_module.values() for part in parts)
        return factors + sum(bias.numel() for bias in self.biases.values())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a LoRA's folder, made if it is not there, as PEFT reads it: every scale is 1.

        Biases are PEFT's ``lora_bias``; a module that has nothing else gets factors of zeros.
        """
        if not self.parameters:
            raise InputError("this change is of rank 0 everywhere: there is no LoRA to save")
        if not self.blocks:
            raise InputError("this change does not know its blocks' names: give it `blocks`")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        named = self._named()
        for name, (up, down, bias) in named.items():
            key = f"base_model.model.{name}.lora"
            tensors[f"{key}_A.weight"], tensors[f"{key}_B.weight"] = down, up
            if self.biases:
                tensors[f"{key}_B.bias"] = bias
        self._config({name: len(down) for name, (_, down, _) in named.items()}).save_pretrained(
            str(folder)
        )
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def _named(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Return factors and bias by the full names of their modules, where a module has any."""
        found = {}
        for (layer, name), (up, down) in self.by_module.items():
            bias = self.biases.get((layer, name))
            if len(down) == 0 and bias is None:
                continue
            if len(down) == 0:
                up, down = up.new_zeros(len(up), 1), down.new_zeros(1, down.shape[1])
            bias = up.new_zeros(len(up)) if bias is None else bias
            found[f"{self.blocks[layer]}.{name}"] = up, down, bias
        return found

    def _config(self, ranks: dict[str, int]) -> Any:
        from peft import LoraConfig

        widest = max(ranks.values())
        return LoraConfig(
            base_model_name_or_path=self.base or None,
            task_type="CAUSAL_LM",
            inference_mode=True,
            r=widest,
            lora_alpha=widest,
            rank_pattern=dict(ranks),
            alpha_pattern=dict(ranks),
            target_modules=sorted(ranks),
            fan_in_fan_out=self.transposed,
            lora_bias=bool(self.biases),
        )


@contextmanager
def changed(model: nn.Module, change: WeightChange, sites: Sites | None = None) -> Iterator[None]:
    """Add `change` to the weights of `model`, as long as the context lasts.

    Each matrix is replaced by a new one and then put back, the very same tensor. So nothing else
    that shares the tensor changes: a tuned model that is a LoRA around `model`, or tied weights.
    In half precision the sum is rounded to it, as merging a LoRA does. `sites` saves looking the
    blocks up again. Raises InputError, before anything is changed, where a module does not fit.

    The new matrices are as large as the blocks: room is made for them, and given back at the end.
    """
    release_freed()
    with ExitStack() as stack:
        stack.callback(release_freed)  # called last
        for module, name, parameter in _parameters(model, change, sites):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, parameter)
        yield


def apply(model: nn.Module, change: WeightChange, sites: Sites | None = None) -> None:
    """Add `change` to the weights of `model` for good; see `changed`."""
    for module, name, parameter in _parameters(model, change, sites):
        setattr(module, name, parameter)


def _parameters(
    model: nn.Module, change: WeightChange, sites: Sites | None
) -> Iterator[tuple[Any, str, nn.Parameter]]:
    """Yield each module that changes, the name of its parameter, and the new one.

    Raises InputError before the first is made.
    """
    blocks = (sites or resolve(model)).blocks
    modules = {place: _module_at(blocks, *place) for place in change.by_module}
    for place, (up, down) in change.by_module.items():
        _require_fit(place, modules[place], up, down)
    for place, (up, down) in change.by_module.items():
        yield modules[place], "weight", _moved(modules[place], up, down)
    for place, bias in change.biases.items():
        yield modules[place], "bias", _shifted(modules[place], bias)


def _module_at(blocks: tuple[nn.Module, ...], layer: int, name: str) -> Any:
    """Return a linear module, or what PEFT has wrapped."""
    try:
        module: Any = blocks[layer].get_submodule(name)
    except (AttributeError, IndexError) as error:
        raise InputError(f"this model has no {name!r} in a block {layer}") from error
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _require_fit(place: tuple[int, str], module: Any, up: Tensor, down: Tensor) -> None:
    layer, name = place
    if not is_linear(module):
        raise InputError(f"{name!r} of block {layer} is a {type(module).__name__}, not a matrix")
    if module.weight.is_meta:
        raise InputError(
            "this model's weights come from disk when they are needed (offload): load it without, "
            "or save the change and load it as a LoRA"
        )
    rows, columns = reversed(module.weight.shape) if is_transposed(module) else module.weight.shape
    if (len(up), down.shape[1]) != (rows, columns):
        raise InputError(
            f"{name!r} of block {layer} is {rows} × {columns}, the change is {len(up)} × "
            f"{down.shape[1]}"
        )


@torch.no_grad()
def _moved(module: Any, up: Tensor, down: Tensor) -> nn.Parameter:
    """Return the module's matrix and its change added up, in the module's layout and precision."""
    weight = module.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    delta = up.to(weight.device, dtype) @ down.to(weight.device, dtype)
    total = weight.to(dtype) + (delta.T if is_transposed(module) else delta)
    return nn.Parameter(total.to(weight.dtype), requires_grad=weight.requires_grad)


@torch.no_grad()
def _shifted(module: Any, bias: Tensor) -> nn.Parameter:
    """Return the module's bias, if it has one, and `bias` added up, in the weights' precision."""
    weight = module.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    total = bias.to(weight.device, dtype)
    if module.bias is not None:
        total = total + module.bias.to(dtype)
    return nn.Parameter(total.to(weight.dtype), requires_grad=weight.requires_grad)
