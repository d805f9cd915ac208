"""How many parameters a model and a method have, from the model's configuration alone."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from toolkit.adapters.kinds import KINDS
from toolkit.training.methods import Method, options_of, width_of, with_lora


def model_parameters(config: Any) -> int:
    """Count the parameters of the whole causal language model; tied embeddings count once."""
    return _count(_empty(config))


def adapter_parameters(config: Any, method: Method) -> int:
    """Count the parameters of the method's adapters; those of ``joint`` without its LoRA."""
    config = config.get_text_config()
    kind = KINDS["linear" if method.kind == "joint" else method.kind]
    with torch.device("meta"):
        adapter = kind.identity(width_of(config, method.location), **options_of(config, method))
    return config.num_hidden_layers * _count(adapter)


def lora_parameters(config: Any, rank: int) -> int:
    """Count the parameters of LoRA on all linear modules but the head."""
    with torch.device("meta"):
        model = with_lora(_empty(config), rank)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _empty(config: Any) -> nn.Module:
    """Return the model without storage: shapes alone."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
