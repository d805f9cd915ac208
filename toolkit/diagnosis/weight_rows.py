"""Every linear module's change: of a pair in memory, or streamed from safetensors files."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from toolkit.analysis.weight_change import weight_row
from toolkit.blocks.mlp import Change
from toolkit.blocks.read import affine, module_change
from toolkit.errors import InputError
from toolkit.models.loading import plain_folder
from toolkit.models.runner import BlockRunner
from toolkit.runtime.processes import ALONE, Processes

_LAYER = re.compile(r"^(?:.*?\.)?(?:layers|h|blocks)\.(\d+)\.(.+)\.weight$")
_CONV1D = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")
_LORA = re.compile(r"^base_model\.model\.(.+)\.lora_([AB])\.weight$")


def weight_rows(
    base: BlockRunner, tuned: BlockRunner, processes: Processes = ALONE
) -> list[dict[str, Any]]:
    """A row for every linear module of every block of two models.

    All `processes` share the matrices.
    """
    tasks = [
        partial(_module_row, base, tuned, layer, name)
        for layer, block in enumerate(base.sites.blocks)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    return processes.spread(tasks)


def streamed_weight_rows(base: str | Path, tuned: str | Path) -> Iterator[dict[str, Any]]:
    """The same from files: one matrix of each model is in memory at a time.

    `base` and `tuned` are what `ModelPair.load` takes, except that hub ids must be downloaded.
    """
    with ExitStack() as stack:
        ours, folder = _Matrices(Path(plain_folder(base)), stack), Path(tuned)
        if (folder / "adapter_config.json").is_file():
            changes = _adapter(folder, stack)
        else:
            theirs = _Matrices(Path(plain_folder(tuned)), stack)
            changes = {name: partial(_difference, ours, theirs, name) for name in theirs.files}
        for name in sorted(ours.files, key=_place):
            found = _LAYER.match(name)
            if found and name in changes:
                weight = ours[name]
                if weight.ndim == 2:
                    yield _row(int(found[1]), found[2], weight, changes[name]())


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

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.files = _open(folder, stack)
        config = folder / "config.json"
        family = json.loads(config.read_text()).get("model_type") if config.is_file() else None
        self.transposed = family == "gpt2"  # its files hold [in, out]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.files[name].get_tensor(name)
        return tensor.T if self.transposed and _CONV1D.search(name) else tensor


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Each tensor's name with the open file that holds it."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no safetensors: give a model folder or an adapter folder")
    opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118


def _difference(ours: _Matrices, theirs: _Matrices, name: str) -> Change:
    weight, tuned = ours[name], theirs[name]
    if weight.shape != tuned.shape:
        raise InputError(
            f"{name} is {tuple(weight.shape)} in the base and {tuple(tuned.shape)} in the tuned "
            "model: expected two models of one shape"
        )
    delta = tuned.to(torch.promote_types(tuned.dtype, torch.float32)) - weight
    return Change((delta,), delta.new_zeros(len(delta)))


def _adapter(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Each base matrix's name with what gives its LoRA's two factors."""
    config = json.loads((folder / "adapter_config.json").read_text())
    unplain = [k for k in ("use_dora", "rank_pattern", "alpha_pattern") if config.get(k)]
    if config.get("peft_type") != "LORA" or unplain:
        kind = ", ".join([str(config.get("peft_type")), *unplain])
        raise InputError(f"{folder} is not a plain LoRA ({kind}): merge it into a model folder")
    r = config["r"]
    scaling = config["lora_alpha"] / (r**0.5 if config.get("use_rslora") else r)
    files = _open(folder, stack)
    modules = {found[1] for name in files if (found := _LORA.match(name))}

    def factors(module: str) -> Change:
        b, a = (
            files[key].get_tensor(key).float()
            for key in (f"base_model.model.{module}.lora_{side}.weight" for side in "BA")
        )
        return Change((b * scaling, a), b.new_zeros(len(b)))

    return {f"{module}.weight": partial(factors, module) for module in modules}
