"""Quantised checkpoints: de-quantised on loading where transformers can do so, else refused."""

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from toolkit.errors import InputError, one_line
from toolkit.models.locations import causal_lm

# Models whose weights were float8 with a scale for each block of a matrix, and the blocks' shapes.
FLOAT8: "WeakKeyDictionary[nn.Module, tuple[int, int] | None]" = WeakKeyDictionary()
LARGEST = 448.0  # of float8_e4m3fn, to which a block's largest weight is scaled
BITS, LEAST_EXPONENT = 3, -6  # of its mantissa, and of its normal numbers
ROUNDED = 2.0**-7  # transformers multiplies by the scale in bfloat16


def plain_weights(config: Any, source: str) -> dict[str, Any]:
    """Return the arguments with which transformers loads plain weights; none if they are plain.

    Raises InputError, with what to do, where a checkpoint's format cannot be turned into plain
    weights on loading.
    """
    method = quantisation(config)
    if method is None:
        return {}
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    if kind is None or "dequantize" not in inspect.signature(kind).parameters:
        raise InputError(
            f"{source} is quantised ({method}), and transformers cannot turn this format into "
            "plain weights on loading: give the model it was made from, or save it de-quantised "
            "(model.dequantize() on a machine that loads it)"
        )
    try:
        return {"quantization_config": kind(dequantize=True)}
    except ImportError as error:
        raise InputError(f"{source} is quantised ({method}): {one_line(error)}") from error


def quantisation(config: Any) -> str | None:
    """Return by which method the checkpoint of `config` is quantised, if it is."""
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found:
            asked = found if isinstance(found, dict) else found.to_dict()
            method = asked.get("quant_method")
            return str(getattr(method, "value", method) or "an unnamed method")
    return None


def forget(model: Any, stored: Any) -> None:
    """Take from a model whose weights are plain again what says that they are quantised.

    `stored` is the configuration of the checkpoint. `FLOAT8` remembers its blocks.
    """
    if quantisation(stored) == "fp8":
        parts = (stored, stored.get_text_config())
        asked = next(p.quantization_config for p in parts if hasattr(p, "quantization_config"))
        known = asked if isinstance(asked, dict) else vars(asked)
        block = known.get("weight_block_size", (128, 128))
        FLOAT8[causal_lm(model)] = tuple(block) if block else None
    for part in (model.config, model.config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    model.is_quantized, model.hf_quantizer = False, None


def cells(weight: Tensor, block: tuple[int, int] | None) -> Tensor | None:
    """Return the width of the interval that was rounded to each float8 weight, `[out, in]`.

    `block` is the shape of what has one scale (None: the whole matrix). None for a matrix whose
    weights are not on such a grid: it was not quantised.
    """
    rows, columns = block or tuple(weight.shape)
    scale = torch.empty_like(weight, dtype=torch.float32)
    for i in range(0, weight.shape[0], rows):
        for j in range(0, weight.shape[1], columns):
            part = (slice(i, i + rows), slice(j, j + columns))
            scale[part] = weight[part].abs().max().float().clamp(min=1e-30) / LARGEST
    scaled = weight.float() / scale
    stored = scaled.to(torch.float8_e4m3fn).float()
    if not torch.allclose(stored, scaled, rtol=ROUNDED, atol=2.0**LEAST_EXPONENT * ROUNDED):
        return None
    exponent = stored.abs().clamp(min=2.0**LEAST_EXPONENT).log2().floor()
    return scale * torch.exp2(exponent - BITS)
