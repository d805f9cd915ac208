"""Models larger than memory: blocks whose weights are read from safetensors as they are reached.

A model is built without weights (on torch's meta device). What lies outside its blocks is read at
once; a block's weights when the block is entered, or is held by `Offload.resident`, and they are
dropped after it. On a CPU files are mapped into memory: a block in their precision is not copied.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GenerationConfig

from toolkit.errors import InputError
from toolkit.models.hooks import within
from toolkit.models.loading import auto_class, load_config, require_whole
from toolkit.models.locations import causal_lm, resolve
from toolkit.models.merged_files import MergedFiles
from toolkit.models.quantised import quantisation
from toolkit.models.weight_files import WeightFiles, model_paths


class Offload:
    """One model whose blocks are without weights until they are needed.

    `names` maps the full name of each parameter that is in the files to its name in the `reader`;
    parameters in blocks that it does not know (an adapter's) stay as they are.
    """

    def __init__(self, model: nn.Module, names: Mapping[str, str], reader: MergedFiles) -> None:
        self.names, self.reader = dict(names), reader
        self._blocks = resolve(model).blocks
        self._held = [0] * len(self._blocks)
        self._empty: list[dict[str, nn.Parameter]] = []
        self._named = [_names_in(model, block, names) for block in self._blocks]
        for block, named in zip(self._blocks, self._named, strict=True):
            parameters = {name: block.get_parameter(name) for name in named}
            self._empty.append({name: _parameter(p.to("meta")) for name, p in parameters.items()})
        self._watch = ExitStack()  # for as long as the model lives
        for layer in range(len(self._blocks)):
            self._drop(layer)
            self._watch.enter_context(self._on_its_own(layer))

    @contextmanager
    def resident(self, layer: int) -> Iterator[None]:
        """Keep the weights of block `layer`."""
        self._held[layer] += 1
        try:
            if self._held[layer] == 1:
                for name, stored in self._named[layer].items():
                    _put(self._blocks[layer], name, _parameter(self.reader[stored]))
            yield
        finally:
            self._held[layer] -= 1
            if not self._held[layer]:
                self._drop(layer)

    def release(self) -> None:
        """Drop the weights of every block, whatever was put in their place."""
        for layer in range(len(self._blocks)):
            self._drop(layer)

    def _drop(self, layer: int) -> None:
        for name, empty in self._empty[layer].items():
            _put(self._blocks[layer], name, empty)

    def _on_its_own(self, layer: int) -> Any:
        """Whenever the model calls the block. A bypassed block, which only hands on, needs none."""
        block, entered = self._blocks[layer], list[ExitStack]()

        def enter(_: Any) -> None:
            entered.append(ExitStack())
            if "forward" not in vars(block):
                entered[-1].enter_context(self.resident(layer))

        return within(block, enter, lambda: entered.pop().close())


def empty_model(folder: str | Path, dtype: torch.dtype | str) -> Any:
    """The model in `folder` without weights: parameters on the meta device, buffers as they are."""
    config = load_config(folder)
    if method := quantisation(config):
        raise InputError(
            f"{folder} is quantised ({method}), and its files are read as they are here: load it "
            "whole (no --offload), or save it de-quantised"
        )
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    with init_empty_weights(include_buffers=False):
        model = auto_class(config, folder).from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()  # on the meta device no two parameters are one
    if model.can_generate() and (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval().requires_grad_(False)


def offloaded(
    folder: Path, dtype: torch.dtype | str, device: str | torch.device
) -> tuple[Any, Offload]:
    """Return the model in `folder` and what brings its blocks' weights.

    Raises InputError where a parameter is not in the files.
    """
    model = empty_model(folder, dtype)
    files = WeightFiles(model_paths(folder), next(model.parameters()).dtype, device)
    reader = MergedFiles(model, files)
    _require_whole(model, reader, folder)
    names = reader.names
    inside = {id(p) for block in resolve(model).blocks for p in block.parameters()}
    for name, parameter in list(model.named_parameters()):
        if id(parameter) not in inside:
            _put(model, name, _parameter(reader[name]))
    model.tie_weights()
    for name, buffer in list(model.named_buffers()):
        _put(model, name, reader[name] if name in names else buffer.to(device))
    return model, Offload(model, {name: name for name in names}, reader)


def _require_whole(model: Any, reader: MergedFiles, folder: Path) -> None:
    """Raise InputError unless the files hold each parameter in its shape, and nothing else."""
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    known = parameters.keys() | model.state_dict().keys()
    stored = parameters.keys() & reader.names
    shapes = {(name, reader.shape(name), parameters[name]) for name in stored}
    found = SimpleNamespace(
        missing_keys=parameters.keys() - reader.names,
        unexpected_keys=reader.names - known,
        mismatched_keys={each for each in shapes if each[1] != each[2]},
    )
    model._adjust_missing_and_unexpected_keys(found)
    require_whole(vars(found), str(folder))


def with_stand_ins(model: nn.Module) -> None:
    """Put tensors in place of those on the meta device that have their shape and take no memory.

    For code that asks parameters where they are, and reads none: they are no number, and so is
    what is computed from them.
    """
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            one = torch.full((), float("nan"), dtype=parameter.dtype)
            _put(model, name, _parameter(one.expand(parameter.shape)))


def beside(base: Offload, tuned: nn.Module) -> Offload:
    """Offload a PEFT model around a copy of the base: both read the same tensors once."""
    names = {}
    inner = causal_lm(tuned)
    for name, _ in inner.named_parameters():
        stored = base.names.get(name.replace(".base_layer", ""))
        if stored is not None:
            names[name] = stored
    return Offload(inner, names, base.reader)


def _names_in(model: nn.Module, block: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    prefix = next(name for name, module in model.named_modules() if module is block)
    full = {name: f"{prefix}.{name}" for name, _ in block.named_parameters()}
    return {name: names[where] for name, where in full.items() if where in names}


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = tensor  # type: ignore[assignment]
    else:
        owner._buffers[leaf] = tensor


def state_tensors(model: nn.Module, offload: Offload | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model's state by name, in the names' order; one at a time from files."""
    stored: Sequence[tuple[str, Tensor]] = sorted(model.state_dict().items())
    prefix = next(n for n, module in model.named_modules() if module is causal_lm(model))
    for name, tensor in stored:
        if tensor.is_meta:
            assert offload is not None
            inner = name.removeprefix(f"{prefix}.") if prefix else name
            tensor = offload.reader[offload.names[inner]]
        yield name, tensor
