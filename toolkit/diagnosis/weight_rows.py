"""Every linear module's change: of a pair in memory, or streamed from safetensors files."""

import re
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from toolkit.analysis.weight_change import weight_row
from toolkit.blocks.adapter_files import AdapterFiles
from toolkit.blocks.mlp import Change
from toolkit.blocks.read import affine, is_transposed, linear_modules, module_change
from toolkit.errors import InputError
from toolkit.models.loading import model_source
from toolkit.models.locations import blocks_of
from toolkit.models.merged_files import renamed
from toolkit.models.offload import empty_model
from toolkit.models.peft_adapter import is_adapter
from toolkit.models.runner import BlockRunner
from toolkit.models.weight_files import WeightFiles, model_paths
from toolkit.runtime.placement import for_analyses
from toolkit.runtime.processes import ALONE, Processes

Row = dict[str, Any]


def weight_rows(base: BlockRunner, tuned: BlockRunner, processes: Processes = ALONE) -> list[Row]:
    """A row for every matrix of every block of two models: linear modules, and fused experts.

    All `processes` share the matrices.
    """
    tasks = [
        partial(_module_row, base, tuned, layer, name)
        for layer, block in enumerate(base.sites.blocks)
        for name in linear_modules(block)
    ]
    tasks += [
        partial(_expert_rows, base, tuned, layer, name)
        for layer, block in enumerate(base.sites.blocks)
        for name, parameter in block.named_parameters()
        if parameter.ndim == 3
    ]
    rows = [row for found in processes.spread(tasks) for row in found]
    return sorted(rows, key=lambda row: row["layer"])


class StreamedWeights:
    """The rows of every matrix's change, from files: one matrix of each model is in memory.

    `base` and `tuned` are what `ModelPair.load` takes, except that hub ids must be downloaded.
    `unserved` names what an adapter changes beside matrices of the language model's blocks.
    """

    def __init__(self, base: str | Path, tuned: str | Path) -> None:
        self._ours, folder = _Matrices(Path(model_source(base))), Path(tuned)
        self.unserved: list[str] = []
        if is_adapter(folder):
            files = AdapterFiles(folder)
            self._theirs: AdapterFiles | _Matrices = files
            outside = files.changed - self._ours.places.keys()
            self.unserved = sorted({*files.unserved, *outside})
        else:
            self._theirs = _Matrices(Path(model_source(tuned)))
            for name in self._ours.places.keys() & self._theirs.places.keys():
                _require_same(self._ours.shape(name), self._theirs.shape(name), name)
            if different := self._ours.places.keys() ^ self._theirs.places.keys():
                raise InputError(f"{min(different)!r} is in one of the two models only")

    def __iter__(self) -> Iterator[Row]:
        for name, (layer, module) in self._ours.places.items():
            if name not in self._theirs:
                continue
            weight = self._ours[name]
            if weight.ndim == 2:
                yield _row(layer, module, weight, self._change(name))
            elif weight.ndim == 3 and isinstance(self._theirs, _Matrices):
                tuned = self._theirs[name]
                for expert, (ours, theirs) in enumerate(zip(weight, tuned, strict=True)):
                    yield _row(layer, f"{module}.{expert}", ours, _difference(ours, theirs))

    def _change(self, name: str) -> Change:
        if isinstance(self._theirs, AdapterFiles):
            ours = self._ours
            return self._theirs.change(name, ours.__getitem__, ours.is_transposed(name))
        return _difference(self._ours[name], self._theirs[name])


def _module_row(base: BlockRunner, tuned: BlockRunner, layer: int, name: str) -> list[Row]:
    with base.resident(layer), tuned.resident(layer):
        ours, theirs = (b.sites.blocks[layer].get_submodule(name) for b in (base, tuned))
        return [_row(layer, name, affine(ours)[0], module_change(ours, theirs))]


def _expert_rows(base: BlockRunner, tuned: BlockRunner, layer: int, name: str) -> list[Row]:
    """Return a row for every expert of a parameter that holds a matrix for each."""
    with base.resident(layer), tuned.resident(layer):
        ours = base.sites.blocks[layer].get_parameter(name).detach()
        theirs = _experts(tuned.sites.blocks[layer], name)
        return [
            _row(layer, f"{name}.{expert}", weight, _difference(weight, other))
            for expert, (weight, other) in enumerate(zip(ours, theirs, strict=True))
        ]


@torch.no_grad()
def _experts(block: Any, name: str) -> Tensor:
    """Return the experts' matrices `[experts, rows, columns]`, what PEFT adds to them included."""
    module, _, leaf = name.rpartition(".")
    owner = block.get_submodule(module)
    added: list[Tensor] = []
    while isinstance(owner, ParamWrapper):  # nested, one for each parameter that is adapted
        if owner.parameter_name == leaf:
            added += [owner.get_delta_weight(adapter) for adapter in owner.active_adapters]
        owner = owner.base_layer
    return sum(added, getattr(owner, leaf).detach())


def _row(layer: int, module: str, weight: Tensor, change: Change) -> Row:
    weight = for_analyses(weight)
    change = change.to(device=weight.device)
    return {"layer": layer, "module": module, **asdict(weight_row(weight, change))}


class _Matrices:
    """The tensors of a model's blocks by the model's own names, read when asked for, `[out, in]`.

    `places` gives the block and the name in it of each. Experts that transformers merges on loading
    keep the names of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.files = WeightFiles(model_paths(folder))
        model = empty_model(folder, "auto")
        modules = dict(model.named_modules())
        numbers = {id(block): layer for layer, block in enumerate(blocks_of(model))}
        prefixes = {f"{n}.": numbers[id(m)] for n, m in modules.items() if id(m) in numbers}
        self.places: dict[str, tuple[int, str]] = {}
        self._stored: dict[str, str] = {}
        self._transposed = {f"{n}.weight" for n, m in modules.items() if is_transposed(m)}
        order = {name: index for index, name in enumerate(model.state_dict())}
        found = sorted(renamed(model, self.files.names), key=lambda each: order.get(each[1], -1))
        for stored, name, merged in found:
            prefix = next((p for p in prefixes if name.startswith(p)), None)
            if prefix is None or len(self.files.shape(stored)) < 2:
                continue
            known = stored if merged else name
            inside = re.sub(r"^.*?\.\d+\.", "", stored) if merged else name.removeprefix(prefix)
            self.places[known] = prefixes[prefix], inside.removesuffix(".weight")
            self._stored[known] = stored

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.files[self._stored[name]]
        return tensor.T if self.is_transposed(name) else tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in the files."""
        return self.files.shape(self._stored[name])

    def is_transposed(self, name: str) -> bool:
        """Return whether the files hold the matrix `name` as `[in, out]`."""
        return name in self._transposed


def _require_same(ours: tuple[int, ...], theirs: tuple[int, ...], name: str) -> None:
    if ours != theirs:
        raise InputError(
            f"{name} is {ours} in the base and {theirs} in the tuned model: expected two models of "
            "one shape"
        )


def _difference(weight: Tensor, tuned: Tensor) -> Change:
    delta = tuned.to(torch.promote_types(tuned.dtype, torch.float32)) - weight
    return Change((delta,), delta.new_zeros(len(delta)))
