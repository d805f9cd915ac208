"""The format ``gguf``: llama.cpp's control vectors, and its LoRA adapters.

The rules are those of llama.cpp's reader (``common_control_vector_load_one`` and
``llama_adapter_cvec::init``): ``direction.N`` is added to the output of block N, counted from 0,
at every token; N = 0 is an error there. A LoRA has no biases.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGUFType, GGUFWriter, Keys, get_tensor_name_map

from toolkit.adapters.affine import Affine, affine_maps
from toolkit.adapters.collection import Adapters
from toolkit.adapters.weight_change import WeightChange
from toolkit.export.format import Base, Fidelity, Format, on_every_token, refused
from toolkit.export.peft import in_weights
from toolkit.models.locations import resolve

CONTROL_VECTOR, LORA = "control_vector.gguf", "lora.gguf"
# What llama.cpp calls the architectures whose graphs add the matrices' outputs as they are; what
# transformers calls them is the key.
ARCHITECTURES = {name: name for name in ("llama", "qwen2", "qwen3", "gpt2", "phi3", "gemma3")}
ARCHITECTURES |= {"mistral": "llama", "gemma3_text": "gemma3"}


@final
class Gguf(Format):
    """Write a control vector for vectors at ``post_block``, else a LoRA."""

    name: ClassVar[str] = "gguf"
    needs_base: ClassVar[bool] = True

    def fidelity(self, adapters: Adapters, base: Base | None) -> Fidelity:
        """Hold vectors after blocks but the first, and affine maps that have no constant."""
        assert base is not None
        if (family := base.model.config.model_type) not in ARCHITECTURES:
            return refused(f"llama.cpp's name of the family {family} is not known here")
        if adapters.location == "post_block":
            return _after_blocks(adapters, base.model)
        change = in_weights(adapters, base)
        if isinstance(change, Fidelity):
            return change
        if change.biases:
            return refused("the adapters have a constant, and llama.cpp's LoRAs have no biases")
        if not change.parameters:
            return refused("the adapters change nothing, and llama.cpp has no empty LoRA")
        names = _names(change, base.model)
        if None in names.values():
            return refused("llama.cpp has no name for one of the matrices that change")
        architecture = ARCHITECTURES[family]
        return on_every_token(adapters, partial(_write_lora, change, names, architecture))


def _after_blocks(adapters: Adapters, model: Any) -> Fidelity:
    """Return what control vectors hold of adapters at ``post_block``: all blocks but block 0."""
    maps = affine_maps(adapters.by_layer)
    if maps is None or any(len(found.down) for found in maps.values()):
        return refused(
            f"a {adapters.kind} adapter at post_block depends on the state: control vectors are "
            "constants"
        )
    found = on_every_token(adapters, partial(_write_control_vector, maps, model))
    if found.held is None or 0 not in maps:
        return found if maps else refused("the adapters change nothing")
    later = {layer: adapter for layer, adapter in adapters.by_layer.items() if layer}
    if maps.keys() == {0}:
        return refused("control vectors have no direction for block 0")
    reasons = ["control vectors have no direction for block 0, which is left out", found.reason]
    reason = "; and ".join(filter(None, reasons))
    return replace(found, held=replace(found.held, by_layer=later), reason=reason)


def _write_control_vector(maps: dict[int, Affine], model: Any, out: Path) -> None:
    """Write ``control_vector.gguf``: ``direction.N``, float32 `[d]`, of each block N but 0."""
    with _writer(out / CONTROL_VECTOR, "controlvector") as writer:
        writer.add_string("controlvector.model_hint", model.config.model_type)
        writer.add_uint32("controlvector.layer_count", resolve(model).n_layers)
        for layer, found in maps.items():
            if layer > 0:
                writer.add_tensor(f"direction.{layer}", _float32(found.bias))


def _write_lora(
    change: WeightChange,
    names: dict[tuple[int, str], str | None],
    architecture: str,
    out: Path,
) -> None:
    """Write ``lora.gguf``: ``lora_a`` `[r, in]`, ``lora_b`` `[out, r]` of matrices that change.

    llama.cpp scales each by alpha over its own rank: alpha is the largest, and B makes up for it.
    """
    alpha = max(len(down) for _, down in change.by_module.values())
    with _writer(out / LORA, architecture) as writer:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        for place, (up, down) in sorted(change.by_module.items()):
            if not len(down):  # nothing changes here, and llama.cpp reads no empty tensor
                continue
            name = f"{names[place]}.weight"
            writer.add_tensor(f"{name}.lora_a", _float32(down))
            writer.add_tensor(f"{name}.lora_b", _float32(up * (len(down) / alpha)))


def _names(change: WeightChange, model: Any) -> dict[tuple[int, str], str | None]:
    """Return llama.cpp's name of each matrix that changes, by its block and module."""
    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    number = numbers[ARCHITECTURES[model.config.model_type]]
    names = get_tensor_name_map(number, resolve(model).n_layers)
    return {
        (layer, module): names.get_name(f"{change.blocks[layer]}.{module}")
        for layer, module in change.by_module
    }


def _float32(values: torch.Tensor) -> np.ndarray:
    """Return `values` as numpy's contiguous float32."""
    return np.ascontiguousarray(values.float().numpy())


@contextmanager
def _writer(path: Path, architecture: str) -> Iterator[GGUFWriter]:
    """Write what the context adds, with ``general.architecture``, into a file at its end."""
    writer = GGUFWriter(path, architecture)
    yield writer
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
