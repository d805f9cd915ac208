"""Every linear module's change: of a pair in memory, or streamed from safetensors files."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.analysis.weight_change import weight_row
from toolkit.blocks.adapter_files import AdapterFiles
from toolkit.blocks.mlp import Change
from toolkit.blocks.read import affine, linear_modules, module_change
from toolkit.errors import InputError
from toolkit.models.loading import plain_folder
from toolkit.models.peft_adapter import is_adapter
from toolkit.models.runner import BlockRunner
from toolkit.models.weight_files import WeightFiles
from toolkit.runtime.processes import ALONE, Processes

_LAYER = re.compile(r"^(?:.*?\.)?(?:layers|h|blocks)\.(\d+)\.(.+)\.weight$")
_CONV1D = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")


def weight_rows(
    base: BlockRunner, tuned: BlockRunner, processes: Processes = ALONE
) -> list[dict[str, Any]]:
    """A row for every linear module of every block of two models.

    All `processes` share the matrices.
    """
    tasks = [
        partial(_module_row, base, tuned, layer, name)
        for layer, block in enumerate(base.sites.blocks)
        for name in linear_modules(block)
    ]
    return processes.spread(tasks)


class StreamedWeights:
    """The rows of every matrix's change, from files: one matrix of each model is in memory.

    `base` and `tuned` are what `ModelPair.load` takes, except that hub ids must be downloaded.
    `unserved` names what an adapter changes beside matrices of numbered blocks.
    """

    def __init__(self, base: str | Path, tuned: str | Path) -> None:
        self._ours, folder = _Matrices(Path(plain_folder(base))), Path(tuned)
        self.unserved: list[str] = []
        if is_adapter(folder):
            files = AdapterFiles(folder)
            self._theirs: AdapterFiles | _Matrices = files
            outside = [name for name in files.saved if not _LAYER.match(name)]
            self.unserved = sorted({*files.unserved, *outside})
        else:
            self._theirs = _Matrices(Path(plain_folder(tuned)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for name in sorted(self._ours.files.names, key=_place):
            found = _LAYER.match(name)
            if found and name in self._theirs:
                weight = self._ours[name]
                if weight.ndim == 2:
                    yield _row(int(found[1]), found[2], weight, self._change(name))

    def _change(self, name: str) -> Change:
        if isinstance(self._theirs, AdapterFiles):
            ours = self._ours
            return self._theirs.change(name, ours.__getitem__, ours.is_transposed(name))
        return _difference(self._ours, self._theirs, name)


def _module_row(base: BlockRunner, tuned: BlockRunner, layer: int, name: str) -> dict[str, Any]:
    with base.resident(layer), tuned.resident(layer):
        ours, theirs = (b.sites.blocks[layer].get_submodule(name) for b in (base, tuned))
        return _row(layer, name, affine(ours)[0], module_change(ours, theirs))


def _row(layer: int, module: str, weight: Tensor, change: Change) -> dict[str, Any]:
    return {"layer": layer, "module": module, **asdict(weight_row(weight, change))}


def _place(name: str) -> tuple[int, str]:
    found = _LAYER.match(name)
    return (int(found[1]), found[2]) if found else (-1, name)


class _Matrices:
    """A model folder's tensors by name, each read when it is asked for, matrices as `[out, in]`."""

    def __init__(self, folder: Path) -> None:
        self.files = WeightFiles(folder)
        config = folder / "config.json"
        family = json.loads(config.read_text()).get("model_type") if config.is_file() else None
        self.transposed = family == "gpt2"  # its files hold [in, out]

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.files[name]
        return tensor.T if self.is_transposed(name) else tensor

    def is_transposed(self, name: str) -> bool:
        """Return whether the files hold the matrix `name` as `[in, out]`."""
        return self.transposed and bool(_CONV1D.search(name))


def _difference(ours: _Matrices, theirs: _Matrices, name: str) -> Change:
    weight, tuned = ours[name], theirs[name]
    if weight.shape != tuned.shape:
        raise InputError(
            f"{name} is {tuple(weight.shape)} in the base and {tuple(tuned.shape)} in the tuned "
            "model: expected two models of one shape"
        )
    delta = tuned.to(torch.promote_types(tuned.dtype, torch.float32)) - weight
    return Change((delta,), delta.new_zeros(len(delta)))
