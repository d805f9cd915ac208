"""A low-rank change of weights, module by module: what a LoRA is, attached, saved and counted."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from toolkit.blocks.read import is_linear, is_transposed
from toolkit.errors import InputError
from toolkit.models.locations import Sites, resolve

WeightFit = Literal["metric", "plain"]


@dataclass(frozen=True)
class WeightChange:
    """What is added to the matrices of a model's blocks: ``up @ down``, by block and module.

    `by_module` maps (layer, name of the module in the block) to up `[out, r]` and down `[r, in]`;
    ranks may differ. `fit` says in which metric it was cut to its rank, `rank` is the one of all
    modules, or in words the mean of theirs. Biases and norms are not changed. `blocks` are the full
    names of the model's blocks, `base` is the model's own name and `transposed` says that it keeps
    its matrices as `[in, out]` (GPT-2): files need them.
    """

    by_module: Mapping[tuple[int, str], tuple[Tensor, Tensor]]
    fit: WeightFit
    rank: int | str
    blocks: tuple[str, ...] = ()
    base: str = ""
    transposed: bool = False

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
        return sum(part.numel() for parts in self.by_module.values() for part in parts)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a LoRA's folder, made if it is not there, as PEFT reads it: every scale is 1."""
        if not self.parameters:
            raise InputError("this change is of rank 0 everywhere: there is no LoRA to save")
        if not self.blocks:
            raise InputError("this change does not know its blocks' names: give it `blocks`")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, (up, down) in self._named().items():
            for side, factor in (("A", down), ("B", up)):
                key = f"base_model.model.{name}.lora_{side}.weight"
                tensors[key] = factor.detach().cpu().contiguous()
        self._config().save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def _named(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the factors by the full names of their modules, where a module has any."""
        found = self.by_module.items()
        return {f"{self.blocks[k]}.{name}": both for (k, name), both in found if len(both[1])}

    def _config(self) -> Any:
        from peft import LoraConfig

        ranks = {name: len(down) for name, (_, down) in self._named().items()}
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
        )


@contextmanager
def changed(model: nn.Module, change: WeightChange, sites: Sites | None = None) -> Iterator[None]:
    """Add `change` to the weights of `model`, as long as the context lasts.

    Each matrix is replaced by a new one and then put back, the very same tensor. So nothing else
    that shares the tensor changes: a tuned model that is a LoRA around `model`, or tied weights.
    In half precision the sum is rounded to it, as merging a LoRA does. `sites` saves looking the
    blocks up again. Raises InputError, before anything is changed, where a module does not fit.
    """
    blocks = (sites or resolve(model)).blocks
    modules = {place: _module_at(blocks, *place) for place in change.by_module}
    for place, (up, down) in change.by_module.items():
        _require_fit(place, modules[place], up, down)
    with ExitStack() as stack:
        for place, (up, down) in change.by_module.items():
            module = modules[place]
            stack.callback(setattr, module, "weight", module.weight)
            module.weight = _moved(module, up, down)
        yield


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
