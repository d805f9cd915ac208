"""Quantised checkpoints: de-quantised on loading where transformers can do so, else refused."""

import inspect
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from toolkit.errors import InputError, one_line


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


def forget(model: Any) -> None:
    """Take from a model whose weights are plain again what says that they are quantised."""
    for part in (model.config, model.config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
