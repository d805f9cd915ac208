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
BITS, LEAST_EXPONENT, LARGEST_EXPONENT = 3, -6, 8  # of float8_e4m3fn's mantissa and its numbers
ROUNDED = 2.0**-7  # weights were rounded once more, to the model's precision


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
    asked = _asked(config)
    if not asked:
        return None
    method = asked.get("quant_method")
    return str(getattr(method, "value", method) or "an unnamed method")


def _asked(config: Any) -> dict[str, Any]:
    """Return what a configuration, or its text part, says about quantisation; empty if nothing."""
    for part in (config, config.get_text_config()):
        if found := getattr(part, "quantization_config", None):
            return found if isinstance(found, dict) else found.to_dict()
    return {}


def forget(model: Any, stored: Any) -> None:
    """Take from a model whose weights are plain again what says that they are quantised.

    `stored` is the configuration of the checkpoint. `FLOAT8` remembers its blocks.
    """
    if quantisation(stored) == "fp8":
        block = _asked(stored).get("weight_block_size", (128, 128))
        FLOAT8[causal_lm(model)] = tuple(block) if block else None
    for part in (model.config, model.config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    model.is_quantized, model.hf_quantizer = False, None


def cells(weight: Tensor, block: tuple[int, int] | None) -> Tensor | None:
    """Return the width of the interval that was rounded to each float8 weight, `[..., out, in]`.

    `block` is the shape of what has one scale (None: the whole matrix, or each half of its rows
    where two were joined). None where the weights are on no such grid: they were not quantised.
    Scales are found by the grid itself, up to powers of two: the widths of numbers below the least
    normal one may be too small.
    """
    if weight.ndim == 3:  # experts
        parts = [cells(part, block) for part in weight]
        found = [part for part in parts if part is not None]
        return torch.stack(found) if len(found) == len(parts) else None
    rows, columns = block or tuple(weight.shape)
    width = _cells(weight, rows, columns)
    if width is None and block is None and rows % 2 == 0:
        width = _cells(weight, rows // 2, columns)
    return width


def _cells(weight: Tensor, rows: int, columns: int) -> Tensor | None:
    """Return the widths where every block of `rows` x `columns` is on a grid, else None."""
    out, d = weight.shape
    padded = nn.functional.pad(weight.float(), (0, -d % columns, 0, -out % rows))
    tiles = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2)
    largest = tiles.abs().amax((2, 3), keepdim=True)
    least = torch.finfo(weight.dtype).smallest_normal * torch.finfo(weight.dtype).eps
    width = torch.zeros_like(tiles)
    todo = largest > 0
    for eighths in range(8):  # the largest weight of a block is one of eight numbers times 2^k
        mantissa = 1 + eighths / 8
        exponent = LARGEST_EXPONENT - (eighths == 7)  # 480 is no number of this format
        scale = (largest / (mantissa * 2.0**exponent)).clamp(min=torch.finfo(torch.float32).tiny)
        scaled = tiles / scale
        stored = scaled.to(torch.float8_e4m3fn).float()
        step = torch.exp2(stored.abs().clamp(min=2.0**LEAST_EXPONENT).log2().floor() - BITS)
        near = (stored - scaled).abs() <= ROUNDED * scaled.abs() + least / scale
        fits = todo & near.all(-1, keepdim=True).all(-2, keepdim=True)
        width = torch.where(fits, step * scale, width)
        todo = todo & ~fits
    if todo.any():
        return None
    return width.transpose(1, 2).flatten(2, 3).flatten(0, 1)[:out, :d]
