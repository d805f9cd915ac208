"""Locations of a block and the modules that carry them.

Which module is which is the package interp-engine's knowledge: it resolves its named points on a
live model of any family, and says why where a point does not exist.
"""

import logging
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from peft import PeftModel
from torch import nn
from transformers.integrations.heterogeneity.configuration_utils import (
    AmbiguousGlobalPerLayerAttributeError,
)

from toolkit.errors import InputError, one_line
from toolkit.models.hooks import Site

# The toolkit's name of each location and interp-engine's name of the same point.
POINTS = {
    "heads": "z",
    "pre_mlp": "attn_out_post",
    "resid_mid": "resid_mid",
    "mlp_in": "mlp_in",
    "mlp_act": "mlp_act",
    "post_mlp": "mlp_out_post",
    "post_block": "resid_post",
}
# The residual branches and their sum: where deltas are taken and adapters are fitted.
BRANCHES = ("pre_mlp", "post_mlp", "post_block")


@dataclass(frozen=True)
class Sites:
    """Say where every location of one model is.

    `blocks` are the model's blocks in order; `at` maps (location, layer) to a `Site`; `unavailable`
    says, for a location that some layer lacks, why.
    """

    blocks: tuple[nn.Module, ...]
    at: dict[tuple[str, int], Site]
    unavailable: dict[str, str]

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def inputs(self) -> dict[str, Site]:
        """Tell what enters each block, by its number as a word."""
        return {str(layer): Site(block, "input") for layer, block in enumerate(self.blocks)}

    @property
    def outputs(self) -> dict[str, Site]:
        """Tell what leaves each block, by its number as a word."""
        return {str(layer): Site(block, "output") for layer, block in enumerate(self.blocks)}

    @property
    def leaving(self) -> dict[str, Site]:
        """Tell all that leaves each block, parallel streams included, by its number as a word."""
        return {name: site._replace(whole=True) for name, site in self.outputs.items()}

    def of_layer(self, layer: int, locations: tuple[str, ...]) -> dict[str, Site]:
        """The sites of `locations` in block `layer`; those that the family lacks are left out."""
        return {name: self.at[name, layer] for name in locations if name not in self.unavailable}


def causal_lm(model: nn.Module) -> Any:
    """Return the transformers model inside `model`: itself, or what a PEFT adapter was put into."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def width_of(config: Any, location: str) -> int:
    """Count how many numbers a token's state has at `location`, from a model's configuration."""
    if location != "heads":
        return config.hidden_size
    n_heads, head_dim = (of_blocks(config, name) for name in ("num_attention_heads", "head_dim"))
    if isinstance(n_heads, tuple) or isinstance(head_dim, tuple):
        raise InputError("this model's attention heads are not alike in all blocks: not served")
    return n_heads * (head_dim or config.hidden_size // n_heads)


def of_blocks(config: Any, name: str) -> Any:
    """Return what a configuration says under `name`; a tuple where its blocks differ in it."""
    try:
        return getattr(config, name, None)
    except AmbiguousGlobalPerLayerAttributeError:
        return tuple(getattr(layer, name, None) for layer in config.per_layer_config)


def n_embeddings(model: nn.Module) -> int:
    """Count the tokens that the model has an embedding of."""
    embedding = causal_lm(model).get_input_embeddings()
    inner = getattr(embedding, "get_base_layer", lambda: embedding)()  # where PEFT wraps it
    return inner.weight.shape[0]


def learned_positions(model: nn.Module) -> float:
    """Return how many positions the model has learned embeddings for; no end where it has none.

    They are a table beside the tokens' own, of the length that the configuration names or a few
    rows longer (OPT).
    """
    inner = causal_lm(model)
    named = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    tokens = set(inner.get_input_embeddings().modules())
    tables = (m for m in inner.modules() if isinstance(m, nn.Embedding) and m not in tokens)
    if named and any(0 <= table.num_embeddings - named <= 2 for table in tables):
        return named
    return float("inf")


def blocks_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the blocks of the language model in `model`, in order."""
    return resolve(model).blocks


def resolve(model: nn.Module) -> Sites:
    """Find every location of `model`, a causal language model (PEFT-wrapped or not).

    Where nothing is known of a family but its blocks, what leaves them is all there is.
    """
    try:
        engine = _engine(causal_lm(model))
        blocks = tuple(
            engine.resolve_point("resid_post", layer)[0] for layer in range(engine.n_layers)
        )
    except Exception as error:  # interp-engine raises several kinds, each with its reason
        return _blocks_alone(causal_lm(model), one_line(error))
    at: dict[tuple[str, int], Site] = {}
    unavailable: dict[str, str] = {}
    for name, point in POINTS.items():
        for layer in range(engine.n_layers):
            try:
                module, side = engine.resolve_point(point, layer)
            except Exception as error:  # interp-engine raises several kinds, each with its reason
                unavailable[name] = re.sub(r"\s+", " ", str(error))
                break
            at[name, layer] = Site(module, side)
    return Sites(blocks, at, unavailable)


def _blocks_alone(model: Any, reason: str) -> Sites:
    """Find the one list of as many modules as the configuration names, below the language model."""
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if len(lists) != 1:
        raise InputError(
            f"a {type(model).__name__} has {len(lists)} lists of {n_layers} blocks, where one is "
            f"expected ({reason}): this family is not served yet"
        )
    blocks = tuple(lists[0])
    at = {("post_block", layer): Site(block, "output") for layer, block in enumerate(blocks)}
    others = [name for name in POINTS if name != "post_block"]
    return Sites(blocks, at, dict.fromkeys(others, re.sub(r"\s+", " ", reason)))


def mlp_projections(model: nn.Module) -> list[dict[str, nn.Module]]:
    """Each block's MLP projections: ``pre`` (activated), ``linear`` (the ungated branch), ``down``.

    Where one projection computes both branches (Phi-3), ``pre`` and ``linear`` are that module; an
    MLP without a gate has no ``linear``. Raises ValueError, with the reason, where a block has no
    such dense MLP.
    """
    try:
        engine = _engine(causal_lm(model))
        return [_projections(engine, layer) for layer in range(engine.n_layers)]
    except Exception as error:  # interp-engine raises several kinds, each with its reason
        raise ValueError(one_line(error)) from error


def _projections(engine: Any, layer: int) -> dict[str, nn.Module]:
    found = {"down": engine.resolve_point("mlp_act", layer)[0]}
    found["pre"] = engine.resolve_point("mlp_pre", layer)[0]
    if engine.serves("mlp_pre_linear", layer):
        found["linear"] = engine.resolve_point("mlp_pre_linear", layer)[0]
    return found


def _engine(model: nn.Module) -> Any:
    from interp_engine.model import EagerModel  # takes seconds to import

    logging.getLogger("interp_engine").setLevel(logging.ERROR)
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    training = model.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine = EagerModel(name, hf_model=model, tokenizer=SimpleNamespace(), dtype=None)
    # EagerModel puts the model into evaluation mode and freezes it; a look must change nothing.
    model.train(training)
    for parameter in trainable:
        parameter.requires_grad_(True)
    return engine


INSIDE = ("heads", "pre_mlp")  # locations whose state the rest of the block reads
