"""One forward pass over one document is watched, steered or overwritten by plain hooks."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.support.textbook.definitions import Array, Map, to_numpy
from tests.support.textbook.modules import (
    WITH_A_TAIL,
    attention_projection,
    branch_modules,
    is_parallel,
    mlp_input_module,
)
from tests.support.tiny import blocks_of


@dataclass
class Seen:
    """One forward pass over one document: states by (location, layer), and logits `[t, v]`."""

    states: dict[tuple[str, int], Array] = field(default_factory=dict)
    logits: Array = field(default_factory=lambda: np.zeros(0))


def run(
    model: Any,
    ids: Sequence[int],
    block_inputs: Callable[[int], Array] | None = None,
    location: str = "post_block",
    maps: dict[int, Map] | None = None,
    overwrite: dict[int, Array] | None = None,
) -> Seen:
    """`model` on one document.

    `block_inputs(layer)` is put in place of what enters each block; `maps` steer `location` in the
    blocks that they name, at every position but the first; `overwrite` replaces block outputs.
    """
    seen = Seen()
    dtype = next(model.parameters()).dtype

    def tensor(array: Array) -> torch.Tensor:
        return torch.from_numpy(array).to(dtype)

    def look(name: str, layer: int):
        def hook(module: Any, args: Any, output: Any) -> Any:
            bare = output[0] if isinstance(output, tuple) else output
            value = bare.reshape(len(ids), -1).clone()
            if name == location and maps and layer in maps:
                A, b = (tensor(part) for part in maps[layer])
                value[1:] = value[1:] + value[1:] @ A.T + b
            if name == "post_block" and overwrite:
                value = tensor(overwrite[layer])
            seen.states[name, layer] = to_numpy(value)
            value = value.reshape(bare.shape)
            return (value, *output[1:]) if isinstance(output, tuple) else value

        return hook

    def enter(layer: int):
        def hook(module: Any, args: Any) -> Any:
            if block_inputs is None:
                return None
            return (tensor(block_inputs(layer))[None], *args[1:])

        return hook

    def listen(name: str, layer: int):
        def hook(module: Any, args: Any) -> None:
            seen.states[name, layer] = to_numpy(args[0].reshape(len(ids), -1))

        return hook

    with ExitStack() as stack:
        for layer, block in enumerate(blocks_of(model)):
            handles = [block.register_forward_pre_hook(enter(layer))]
            handles += [mlp_input_module(block).register_forward_pre_hook(listen("mlp_in", layer))]
            if type(block).__name__.startswith(WITH_A_TAIL):
                heads = attention_projection(block)
                handles += [heads.register_forward_pre_hook(listen("heads", layer))]
            for name, module in branch_modules(block).items():
                handles.append(module.register_forward_hook(look(name, layer)))
            for handle in handles:
                stack.callback(handle.remove)
        with torch.no_grad():
            seen.logits = to_numpy(model(torch.tensor([list(ids)]), use_cache=False).logits[0])
    for layer, block in enumerate(blocks_of(model)):
        if not is_parallel(block):
            whole, mlp = (seen.states[name, layer] for name in ("post_block", "post_mlp"))
            seen.states["resid_mid", layer] = whole - mlp
    return seen


def run_first_input(model: Any, ids: Sequence[int]) -> Array:
    """What enters block 0, `[t, d]`."""
    seen: list[Array] = []
    hook = lambda module, args: seen.append(to_numpy(args[0][0]))  # noqa: E731
    handle = blocks_of(model)[0].register_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            model(torch.tensor([list(ids)]), use_cache=False)
    finally:
        handle.remove()
    return seen[0]
