"""The format ``gguf``: llama.cpp's control vectors, and its LoRA adapters.

The rules are those of llama.cpp's reader (``common_control_vector_load_one`` and
``llama_adapter_cvec::init``): ``direction.N`` is added to the output of block N, counted from 0,
at every token; N = 0 is an error there. A LoRA has no biases.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGUFType, GGUFWriter, Keys, get_tensor_name_map

from toolkit.adapters.affine import affine
from toolkit.adapters.collection import Adapters
from toolkit.adapters.merge import weight_change_of
from toolkit.adapters.weight_change import WeightChange
from toolkit.export.format import Base, Fidelity, Format, refused, steering_only
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
            return _after_blocks(adapters)
        change = in_weights(adapters, base)
        if isinstance(change, Fidelity):
            return change
        if change.biases:
            return refused("the adapters have a constant, and llama.cpp's LoRAs have no biases")
        if not change.parameters:
            return refused("the adapters change nothing, and llama.cpp has no empty LoRA")
        if None in _names(change, base.model).values():
            return refused("llama.cpp has no name for one of the matrices that change")
        return steering_only("every", adapters)

    def write(self, adapters: Adapters, base: Base | None, out: Path) -> None:
        """Write ``control_vector.gguf`` or ``lora.gguf``."""
        assert base is not None
        if adapters.location == "post_block":
            _write_control_vector(adapters, base.model, out / CONTROL_VECTOR)
        else:
            _write_lora(adapters, base.model, out / LORA)


def _after_blocks(adapters: Adapters) -> Fidelity:
    """Return what control vectors hold of adapters at ``post_block``: all blocks but block 0."""
    for adapter in adapters.by_layer.values():
        if (change := affine(adapter)) is None or len(change.down):
            return refused(
                f"a {adapter.kind} adapter at post_block depends on the state: control vectors "
                "are constants"
            )
    found = steering_only("every", adapters)
    if found.held is None or 0 not in adapters.by_layer:
        return found
    later = {layer: adapter for layer, adapter in adapters.by_layer.items() if layer}
    if not later:
        return refused("control vectors have no direction for block 0")
    reasons = ["control vectors have no direction for block 0, which is left out", found.reason]
    return Fidelity(replace(found.held, by_layer=later), "; and ".join(filter(None, reasons)))


def _write_control_vector(adapters: Adapters, model: Any, path: Path) -> None:
    """Write ``direction.N``, float32 `[d]`, of each block N."""
    with _writer(path, "controlvector") as writer:
        writer.add_string("controlvector.model_hint", model.config.model_type)
        writer.add_uint32("controlvector.layer_count", resolve(model).n_layers)
        for layer, adapter in sorted(adapters.by_layer.items()):
            found = affine(adapter)
            assert found is not None
            assert layer > 0
            writer.add_tensor(f"direction.{layer}", _float32(found.bias))


def _write_lora(adapters: Adapters, model: Any, path: Path) -> None:
    """Write ``lora_a`` `[r, in]` and ``lora_b`` `[out, r]` of each matrix that changes.

    llama.cpp scales each by alpha over its own rank: alpha is the largest, and B makes up for it.
    """
    change = weight_change_of(model, adapters)
    names = _names(change, model)
    alpha = max(len(down) for _, down in change.by_module.values())
    with _writer(path, ARCHITECTURES[model.config.model_type]) as writer:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        for place, (up, down) in sorted(change.by_module.items()):
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
